"""The epoch loop: train, evaluate, log, save; then summarise."""

import dataclasses
import math
import time
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from codistill.checkpoint import write_json
from codistill.cohort import Cohort
from codistill.config import RunConfig
from codistill.console import TrainingDisplay, summary_table
from codistill.data.augment import DeviceImages, epoch_plan
from codistill.errors import DivergedError
from codistill.evaluate import evaluate
from codistill.health import DiversitySums, troubles
from codistill.methods import Method
from codistill.metrics import Scores
from codistill.networks.network import parameter_count
from codistill.optim import learning_rate_at, set_learning_rate
from codistill.report import write_report
from codistill.run import Run
from codistill.step import Step


def network_names(cohort: Cohort) -> list[str]:
    """Name the students by their specs, or by their class where they have none."""
    return [student.spec or type(student).__name__ for student in cohort]


def status_of(error: BaseException) -> str:
    """Name the end of a run that did not finish."""
    if not isinstance(error, Exception):  # Ctrl-C, SIGTERM
        return "interrupted"
    return "diverged" if isinstance(error, DivergedError) else "failed"


def run_facts(config: RunConfig, method: Method) -> dict[str, Any]:
    """Give the part of summary.json that is known before training."""
    return {
        "method": config.method_name,
        "networks": network_names(method.cohort),
        "data": config.data,
        "seed": config.train.seed,
        "epochs": config.train.epochs,
        "parameters": {name: parameter_count(each) for name, each in method.predictors().items()},
    }


class Loop:
    """The state of a training between epochs.

    Args:
        run: Where results go.
        config: What is run.
        step: The training step, which holds method, images and optimiser.
        held: The splits that are evaluated each epoch; `test`, and `validation` where one is held out.
        board: TensorBoard events.
        show: Whether to print.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        step: Step,
        held: dict[str, DeviceImages],
        board: SummaryWriter,
        show: bool,
    ) -> None:
        self.run, self.config, self.step, self.held, self.board = run, config, step, held, board
        self.method = step.method
        size, images = config.train.batch_size, len(step.images)
        self.used = images // size * size if config.train.drop_last else images
        self.display = TrainingDisplay(config.train.epochs, math.ceil(self.used / size), self.used, show)
        self.best: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []

    def run_epochs(self) -> None:
        """Train, evaluate, log and save until the last epoch; then summarise."""
        started = time.monotonic()
        with self.display:
            for epoch in range(self.config.train.epochs):
                self.rows.append(self.run_epoch(epoch))
        rows = self.rows
        summary = self.summarise(rows, time.monotonic() - started)
        write_json(self.run.path / "summary.json", summary)
        write_report(self.run)
        self.display.console.print(summary_table(summary, rows[-1]["test"]))
        self.display.console.print(f"run folder: {self.run.path}", soft_wrap=True)

    def run_epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch, evaluate and save; give its line of metrics.jsonl."""
        settings = self.config.train
        rate = learning_rate_at(
            epoch, settings.learning_rate, settings.learning_rate_steps, settings.learning_rate_decay
        )
        set_learning_rate(self.step.optimizer, rate)
        started = time.monotonic()
        terms = self.train_epoch(epoch)
        seconds = time.monotonic() - started
        self.refuse_divergence(epoch, rate, terms)
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": rate, "train": terms}
        for name, images in self.held.items():
            # Of the validation and the test split, the last one, the test split, says how the students differ.
            sums = DiversitySums(len(self.method.cohort), self.method.num_classes, images.labels.device)
            scores = evaluate(self.method, images, settings.precision, diversity=sums)
            row[name] = {predictor: dataclasses.asdict(each) for predictor, each in scores.items()}
            row["diversity"] = dataclasses.asdict(sums.read())
            self.refuse_divergence(epoch, rate, {f"{name} NLL of {key}": each.nll for key, each in scores.items()})
        if "fused" in row["test"]:
            fused = row["test"]["fused"]["top1_error"]
            students = {name: each["top1_error"] for name, each in row["test"].items() if name.startswith("student")}
            row["diversity"]["gap_to_fused"] = {name: error - fused for name, error in students.items()}
        row["warnings"] = troubles(row, self.rows, settings.epochs)
        row |= {"seconds": seconds, "images_per_second": self.used / seconds}
        self.keep(row)
        return row

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Run all steps of an epoch; give the mean loss terms."""
        settings, device = self.config.train, self.step.images.labels.device
        plan = epoch_plan(
            len(self.step.images), settings.seed, epoch, self.step.augmentation, device, self.method.views
        )
        progress = torch.tensor(epoch / settings.epochs, device=device)
        self.display.begin_epoch(epoch)
        for number, start in enumerate(range(0, self.used, settings.batch_size), start=1):
            self.step(plan.part(start, min(start + settings.batch_size, self.used)), progress)
            if self.display.due():
                # On a GPU a read would wait for all work in the queue; there terms are shown once an epoch.
                self.display.step(epoch, number, self.step.sums.means() if device.type == "cpu" else {})
        self.method.after_epoch()
        means = self.step.sums.means()
        self.step.sums.reset()
        return means

    def refuse_divergence(self, epoch: int, rate: float, numbers: dict[str, float]) -> None:
        """Stop where a loss term or a score is no number.

        Raises:
            DivergedError: Names the numbers, the epoch and the learning rate.
        """
        bad = [name for name, value in numbers.items() if name != "loss" and not math.isfinite(value)]
        if bad:
            raise DivergedError(
                f"{', '.join(bad)} became NaN or infinite in epoch {epoch + 1} at learning rate {rate:g}: "
                f"lower --learning-rate; {self.run.path} keeps the last whole checkpoint"
            )

    def keep(self, row: dict[str, Any]) -> None:
        """Save a checkpoint, then the row; show it and write its events."""
        score = self.selection_error(row)
        best = self.best is None or score < self.selection_error(self.best)
        if best:
            self.best = row
        state = {"method": self.method.state_dict(), "optimizer": self.step.optimizer.state_dict()}
        self.run.checkpoints.save({**state, "epoch": row["epoch"] + 1}, row["epoch"] + 1, best)
        self.run.append_metrics(row)
        self.display.end_epoch(row)
        write_events(self.board, row)

    @staticmethod
    def selection_error(row: dict[str, Any]) -> float:
        """Give what the best epoch is chosen by: the better student's error, on validation images where there are."""
        students = (each for name, each in row.get("validation", row["test"]).items() if name.startswith("student"))
        return min(float(each["top1_error"]) for each in students)

    def summarise(self, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """Make the contents of summary.json."""
        best = self.best or rows[-1]
        trained = sum(row["seconds"] for row in rows)

        def errors(row: dict[str, Any]) -> dict[str, float]:
            return {name: each["top1_error"] for name, each in row["test"].items()}

        return {
            "status": "finished",
            **run_facts(self.config, self.method),
            "top1_error": errors(rows[-1]),
            "best_epoch_top1_error": errors(best),
            "best_epoch": best["epoch"] + 1,
            "best_epoch_chosen_on": "validation" if "validation" in self.held else "test",
            "test": rows[-1]["test"],
            "diversity": rows[-1]["diversity"],
            "warnings": [f"epoch {row['epoch'] + 1}: {each}" for row in rows for each in row["warnings"]],
            "images_per_second": self.used * len(rows) / trained,
            "train_seconds": trained,
            "wall_seconds": seconds,
            "environment": self.run.record["environment"],
        }


def write_events(board: SummaryWriter, row: dict[str, Any]) -> None:
    """Write a row of metrics.jsonl as TensorBoard scalars: train/<term>, test/<predictor>/<score>."""
    step = row["epoch"] + 1
    for name, value in row["train"].items():
        board.add_scalar(f"train/{name.replace('->', '_to_')}", value, step)
    for split in ("validation", "test"):
        for predictor, scores in row.get(split, {}).items():
            for name in (field.name for field in dataclasses.fields(Scores)):
                board.add_scalar(f"{split}/{predictor}/{name}", scores[name], step)
    for name in ("disagreement", "kl"):
        board.add_scalar(f"diversity/{name}", row["diversity"][name], step)
    board.add_scalar("train/learning_rate", row["learning_rate"], step)
    board.add_scalar("train/images_per_second", row["images_per_second"], step)
