"""The epoch loop of one run, or of several that train side by side: train, evaluate, log, save, summarise."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from codistill.checkpoint import write_json
from codistill.cohort import Cohort
from codistill.config import RunConfig
from codistill.console import TrainingDisplay, summary_table
from codistill.data.augment import Batch, DeviceImages, epoch_plan
from codistill.errors import CheckpointError, DivergedError
from codistill.evaluate import evaluate
from codistill.health import DiversitySums, troubles
from codistill.methods import Method
from codistill.metrics import Scores
from codistill.networks.network import parameter_count
from codistill.optim import learning_rate_at, momentum_buffers, set_learning_rate
from codistill.report import write_report
from codistill.run import Run
from codistill.signals import deferred
from codistill.step import CapturedFleet, PlainStep, SequentialFleet, make_fleet


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
        label: What its lines begin with, among those of other runs.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        step: PlainStep,
        held: dict[str, DeviceImages],
        board: SummaryWriter,
        show: bool,
        label: str = "",
    ) -> None:
        self.run, self.config, self.step, self.held, self.board = run, config, step, held, board
        self.method = step.method
        size, images = config.train.batch_size, len(step.images)
        self.used = images // size * size if config.train.drop_last else images
        self.display = TrainingDisplay(config.train.epochs, math.ceil(self.used / size), self.used, show, label)
        self.rate = config.train.learning_rate
        self.best: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []

    def restore(self) -> None:
        """Take the run up where its last whole checkpoint left it.

        Randomness is a function of (seed, epoch), so that what follows is what would have followed without the break.

        Raises:
            CheckpointError: No whole checkpoint, or one that does not fit.
        """
        state = self.run.checkpoints.load("last")
        try:
            self.method.load_state_dict(state["method"])
            buffers = momentum_buffers(self.step.optimizer)
            for own, saved in zip(buffers, state["momentum"], strict=True):
                own.copy_(saved)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.run.path}: the last checkpoint does not fit the run: {reason}") from None
        self.rows = self.run.keep_metrics(state["epoch"])
        scores = [self.selection_error(row) for row in self.rows]
        self.best = self.rows[scores.index(min(scores))]
        self.display.resume(len(self.rows))

    @property
    def steps(self) -> list[tuple[int, int]]:
        """First and last (exclusive) place of each batch in the order of an epoch."""
        size = self.config.train.batch_size
        return [(start, min(start + size, self.used)) for start in range(0, self.used, size)]

    def begin_epoch(self, epoch: int) -> Batch:
        """Set the learning rate and draw the order, crops and flips of an epoch."""
        settings = self.config.train
        self.rate = learning_rate_at(
            epoch, settings.learning_rate, settings.learning_rate_steps, settings.learning_rate_decay
        )
        set_learning_rate(self.step.optimizer, self.rate)
        self.display.begin_epoch(epoch)
        device = self.step.images.labels.device
        count, augmentation = len(self.step.images), self.step.augmentation
        return epoch_plan(count, settings.seed, epoch, augmentation, device, self.method.views)

    def after_step(self, epoch: int, number: int) -> None:
        """Show where the training is, now and then; steps are counted from 1."""
        if self.display.due():
            # On a GPU a read would wait for all work in the queue; there terms are shown once an epoch.
            readable = self.step.images.labels.device.type == "cpu"
            self.display.step(epoch, number, self.step.sums.means() if readable else {})

    def read_terms(self) -> dict[str, float]:
        """Read the mean loss terms of the epoch: the host waits here for all of its steps."""
        self.method.after_epoch()
        terms = self.step.sums.means()
        self.step.sums.reset()
        return terms

    def end_epoch(self, epoch: int, terms: dict[str, float], seconds: float) -> None:
        """Evaluate, and keep what came out.

        Args:
            epoch: Counted from 0.
            terms: Mean loss terms of the epoch.
            seconds: What its training took; side by side, that of all runs together.

        Raises:
            DivergedError: A term or a score is no number; nothing of the epoch is kept.
        """
        self.refuse_divergence(epoch, terms)
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": self.rate, "train": terms}
        row |= self.evaluate_epoch(epoch)
        row["warnings"] = troubles(row, self.rows, self.config.train.epochs)
        row |= {"seconds": seconds, "images_per_second": self.used / seconds}
        self.keep(row)
        self.rows.append(row)

    def evaluate_epoch(self, epoch: int) -> dict[str, Any]:
        """Score all predictors on the held splits, and how the students differ on the last one, the test split."""
        row: dict[str, Any] = {}
        for name, images in self.held.items():
            sums = DiversitySums(len(self.method.cohort), self.method.num_classes, images.labels.device)
            scores = evaluate(self.method, images, self.config.train.precision, diversity=sums)
            self.refuse_divergence(epoch, {f"{name} NLL of {key}": each.nll for key, each in scores.items()})
            row[name] = {predictor: dataclasses.asdict(each) for predictor, each in scores.items()}
            row["diversity"] = dataclasses.asdict(sums.read())
        errors = {name: each["top1_error"] for name, each in row["test"].items()}
        if "fused" in errors:
            row["diversity"]["gap_to_fused"] = {
                name: error - errors["fused"] for name, error in errors.items() if name.startswith("student")
            }
        return row

    def finish(self, seconds: float) -> None:
        """Write summary and report, and show the table.

        Args:
            seconds: From the first step to now.
        """
        summary = self.summarise(self.rows, seconds)
        write_json(self.run.path / "summary.json", summary)
        write_report(self.run)
        self.display.console.print(summary_table(summary, self.rows[-1]["test"]))
        self.display.console.print(f"run folder: {self.run.path}", soft_wrap=True)

    def refuse_divergence(self, epoch: int, numbers: dict[str, float]) -> None:
        """Stop where a loss term or a score is no number.

        Raises:
            DivergedError: Names the numbers, the epoch and the learning rate.
        """
        bad = [name for name, value in numbers.items() if name != "loss" and not math.isfinite(value)]
        if bad:
            raise DivergedError(
                f"{', '.join(bad)} became NaN or infinite in epoch {epoch + 1} at learning rate {self.rate:g}: "
                f"lower --learning-rate; {self.run.path} keeps the last whole checkpoint"
            )

    def keep(self, row: dict[str, Any]) -> None:
        """Save a checkpoint, then the row; show it and write its events."""
        score = self.selection_error(row)
        best = self.best is None or score < self.selection_error(self.best)
        if best:
            self.best = row
        state = {"method": self.method.state_dict(), "momentum": momentum_buffers(self.step.optimizer)}
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


def run_epochs(loops: Sequence[Loop], diverged: Callable[[Loop, DivergedError], None]) -> None:
    """Train runs side by side until their last epoch; each ends as it would have ended alone.

    Args:
        loops: Runs with the same number of images, batch size and epochs.
        diverged: Called with a run that is dropped because a number of it is none any more; the others go on.
    """
    active = list(loops)
    started = time.monotonic()
    fleet: CapturedFleet | SequentialFleet | None = None
    with contextlib.ExitStack() as shown:
        act_on_signals = shown.enter_context(deferred())
        for loop in loops[:1]:
            shown.enter_context(loop.display)
        for epoch in range(len(loops[0].rows), loops[0].config.train.epochs):
            fleet = fleet or make_fleet([loop.step for loop in active])
            began = time.monotonic()
            train_epoch(active, fleet, epoch, act_on_signals)
            terms = [loop.read_terms() for loop in active]
            seconds = time.monotonic() - began
            for loop, read in zip(list(active), terms, strict=True):
                try:
                    loop.end_epoch(epoch, read, seconds)
                except DivergedError as error:
                    diverged(loop, error)
                    active.remove(loop)
                    fleet = None
            if not active:
                return
    for loop in active:
        loop.method.cohort.streams.clear()
        loop.finish(time.monotonic() - started)


def train_epoch(
    loops: Sequence[Loop], fleet: CapturedFleet | SequentialFleet, epoch: int, after_step: Callable[[], None]
) -> None:
    """Run all steps of an epoch for all runs, and call something after each."""
    settings = loops[0].config.train
    plans = [loop.begin_epoch(epoch) for loop in loops]
    progress = torch.tensor(epoch / settings.epochs, device=loops[0].step.images.labels.device)
    for number, (start, stop) in enumerate(loops[0].steps, start=1):
        fleet([plan.part(start, stop) for plan in plans], progress)
        loops[0].after_step(epoch, number)
        after_step()
