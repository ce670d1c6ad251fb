"""The epoch loop of one run, or of several that train side by side: train, evaluate, log, save, summarise."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from codistill.checkpoint import load_weights, warn, write_json
from codistill.cohort import Cohort
from codistill.config import RunConfig
from codistill.console import TrainingDisplay, summary_table
from codistill.data.augment import Batch, DeviceImages, epoch_plan
from codistill.device import Stopwatch
from codistill.errors import CheckpointError, DivergedError
from codistill.evaluate import Evaluation
from codistill.health import troubles
from codistill.methods import Method
from codistill.metrics import read_together
from codistill.networks.network import parameter_count
from codistill.optim import learning_rate_at, momentum_buffers, set_learning_rate
from codistill.report import write_report
from codistill.run import Run
from codistill.saving import Saver
from codistill.signals import Pending, deferred
from codistill.step import CapturedFleet, PlainStep, SequentialFleet, make_fleet
from codistill.watch import culprits, part_of, state_damage


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
    """The state of a training between steps.

    Args:
        run: Where results go.
        config: What is run.
        step: The training step, which holds method, images and optimiser.
        held: The splits that are evaluated each epoch; `test`, and `validation` where one is held out.
        saver: What writes.
        show: Whether to print.
        label: What its lines begin with, among those of other runs.

    Attributes:
        position: Completed epochs, and steps done of the one after them, when this process took the run up.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        step: PlainStep,
        held: dict[str, DeviceImages],
        saver: Saver,
        show: bool,
        label: str = "",
    ) -> None:
        self.run, self.config, self.step, self.saver = run, config, step, saver
        self.method = step.method
        self.evaluation = Evaluation(self.method, held, config.train.precision, captured=step.ranks.count == 1)
        size, images = config.train.batch_size, len(step.images)
        self.used = images // size * size if config.train.drop_last else images
        self.steps = [(start, min(start + size, self.used)) for start in range(0, self.used, size)]
        self.display = TrainingDisplay(config.train.epochs, len(self.steps), self.used, show, label)
        self.watch = Stopwatch(step.images.labels.device)
        self.rate = config.train.learning_rate
        self.position = (0, 0)
        self.best: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        self._floating: list[str] = []

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the run up where a checkpoint left it.

        Randomness is a function of (seed, epoch), so that what follows is what would have followed without the break.

        Raises:
            CheckpointError: It does not fit the run.
        """
        what = f"{self.run.path}: the last checkpoint"
        load_weights(self.method, state.get("method"), what)
        try:
            for own, saved in zip(momentum_buffers(self.step.optimizer), state["momentum"], strict=True):
                own.copy_(saved)
            if state["step"]:
                self.step.sums.load(state["sums"])
                self.step.watch.load(state["watch"])
            self.rows = [json.loads(line) for line in state["rows"]]
            if len(self.rows) != state["epoch"] or state["step"] > len(self.steps):
                raise ValueError("its epochs and steps are not those of the run")
            if self.step.ranks.leads:
                self.run.write_metrics(state["rows"])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{what} does not fit the run: {reason}") from None
        self.saver.rows = list(state["rows"])
        self.position = (state["epoch"], state["step"])
        self.best = min(self.rows, key=self.selection_error, default=None)
        self.display.resume(*self.position)

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

    def first_step(self, epoch: int) -> int:
        """Say how many steps of an epoch are done already, by the process before."""
        return self.position[1] if epoch == self.position[0] else 0

    def after_step(self, epoch: int, number: int) -> None:
        """Show where the training is, now and then; steps are counted from 1."""
        if self.display.due():
            # On a GPU a read would wait for all work in the queue; there terms are shown once an epoch.
            readable = self.step.images.labels.device.type == "cpu"
            self.display.step(epoch, number, self.step.sums.means() if readable else {})

    def evaluate(self, between: Callable[[], None]) -> None:
        """Score all predictors on the held splits.

        Args:
            between: Called between batches; where others wait for this process, which does not evaluate in step with
                them, once at the end.
        """
        if self.step.ranks.count == 1:
            self.evaluation.run(between)
        else:
            self.evaluation.run()
            between()

    def state(self, step: int = 0) -> dict[str, Any]:
        """Give all that a resume needs, on the device; `step` steps into an epoch, what has been summed in it too."""
        state = {
            "config": self.config.as_mapping(),
            "method": self.method.state_dict(),
            "momentum": momentum_buffers(self.step.optimizer),
        }
        inside = {"sums": self.step.sums.state(), "watch": self.step.watch.state()} if step else {}
        return {**state, **inside}

    def health(self) -> list[Tensor]:
        """Give vectors that say, once read, whether terms, gradients and the whole state are finite."""
        self._floating, damage = state_damage(self.method.state_dict())
        return [self.step.watch.packed(), damage]

    def refuse_divergence(self, epoch: int, watched: Sequence[float], damage: Sequence[float]) -> None:
        """Stop where a term, a gradient or a tensor of the state is no number; nothing of it is saved.

        Args:
            epoch: Counted from 0.
            watched: The first vector of `health`, read.
            damage: The second one.

        Raises:
            DivergedError: Names the student or module, epoch, step and learning rate.
        """
        found = self.step.watch.first_bad(watched)
        shared = self.method.cohort.shared_stages
        if found is not None:
            where = f"at step {found[0]} of epoch {epoch + 1}"
            who = culprits(found[1], shared)
        else:
            bad = [name for name, number in zip(self._floating, damage, strict=True) if number != 0]
            if not bad:
                return
            where = f"in epoch {epoch + 1}"
            who = f"{', '.join(dict.fromkeys(part_of(name, shared) for name in bad))} (weights {bad[0]})"
        raise DivergedError(
            f"{who} became NaN or infinite {where} at learning rate {self.rate:g}: lower --learning-rate; {self.kept}"
        )

    @property
    def kept(self) -> str:
        """Say what a run that diverges leaves."""
        self.saver.settle()
        kept = "keeps the last whole checkpoint" if self.run.checkpoints.entries() else "has no checkpoint yet"
        return f"{self.run.path} {kept}"

    def save_inside(self, epoch: int, step: int) -> None:
        """Save between two steps, and wait for it; a diverged state is not saved.

        Args:
            epoch: Counted from 0.
            step: Steps done of it; after none there is nothing to save.
        """
        if step == 0:
            return
        copy = self.saver.copy(self.state(step))
        try:
            self.refuse_divergence(epoch, *read_together(self.health()))
        except DivergedError as error:
            warn(f"not saved: {error}")
            return
        self.saver.save(copy, epoch, step)
        self.saver.settle()

    def end_epoch(self, epoch: int, numbers: Sequence[Sequence[float]], state: dict[str, Any]) -> None:
        """Keep what came out of an epoch.

        Args:
            epoch: Counted from 0.
            numbers: What was read: terms, health, scores.
            state: What is saved, on the host.

        Raises:
            DivergedError: A number is none any more; nothing of the epoch is kept.
        """
        terms, watched, damage, *packed = numbers
        self.refuse_divergence(epoch, watched, damage)
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": self.rate, "train": self.step.sums.means(terms)}
        self.step.sums.reset()
        self.step.watch.reset()
        row |= self.scored(packed)
        self.refuse_bad_scores(row)
        row["warnings"] = troubles(row, self.rows, self.config.train.epochs)
        seconds = self.watch.seconds()
        trained = self.used - sum(stop - start for start, stop in self.steps[: self.first_step(epoch)])
        row |= {"seconds": seconds, "images_per_second": trained / seconds}
        score = self.selection_error(row)
        best = self.best is None or score < self.selection_error(self.best)
        if best:
            self.best = row
        self.saver.log(row, state, best)
        self.display.end_epoch(row)
        self.rows.append(row)

    def scored(self, packed: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Give scores of all predictors on the held splits, and how the students differ on the last one, the test."""
        row: dict[str, Any] = {}
        for name, (scores, diversity) in self.evaluation.scored(packed).items():
            row[name] = {predictor: dataclasses.asdict(each) for predictor, each in scores.items()}
            row["diversity"] = dataclasses.asdict(diversity)
        errors = {name: each["top1_error"] for name, each in row["test"].items()}
        if "fused" in errors:
            row["diversity"]["gap_to_fused"] = {
                name: error - errors["fused"] for name, error in errors.items() if name.startswith("student")
            }
        return row

    def refuse_bad_scores(self, row: Mapping[str, Any]) -> None:
        """Stop where finite weights give logits that are no numbers.

        Raises:
            DivergedError: Names predictors, epoch and learning rate.
        """
        for split in self.evaluation.splits:
            bad = [name for name, each in row[split].items() if not math.isfinite(each["nll"])]
            if bad:
                raise DivergedError(
                    f"{', '.join(bad)} ({split} NLL) became NaN or infinite in epoch {row['epoch'] + 1} at learning "
                    f"rate {self.rate:g}: lower --learning-rate; {self.kept}"
                )

    def finish(self, seconds: float) -> None:
        """Write summary and report, and show the table.

        Args:
            seconds: From the first step to now.

        Raises:
            ResourceError: The last checkpoint or the metrics could not be written.
        """
        lost = self.saver.finish()
        summary = self.summarise(self.rows, seconds)
        write_json(self.run.path / "summary.json", summary)
        if lost is not None:
            raise lost
        write_report(self.run)
        self.display.console.print(summary_table(summary, self.rows[-1]["test"]))
        self.display.console.print(f"run folder: {self.run.path}", soft_wrap=True)

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
            "best_epoch_chosen_on": "validation" if "validation" in self.evaluation.splits else "test",
            "test": rows[-1]["test"],
            "diversity": rows[-1]["diversity"],
            "warnings": [f"epoch {row['epoch'] + 1}: {each}" for row in rows for each in row["warnings"]],
            "images_per_second": sum(row["images_per_second"] * row["seconds"] for row in rows) / trained,
            "train_seconds": trained,
            "wall_seconds": seconds,
            "environment": self.run.record["environment"],
        }


def run_epochs(
    loops: Sequence[Loop],
    diverged: Callable[[Loop, DivergedError], None],
    breaks: Collection[tuple[int, int]] = (),
) -> None:
    """Train runs side by side until their last epoch; each ends as it would have ended alone.

    The host waits for the device once an epoch: terms, scores and the state's copy come together. Writing goes on
    beside the next epoch.

    Args:
        loops: Runs with the same number of images, batch size and epochs, taken up at the same position.
        diverged: Called with a run that is dropped because a number of it is none any more; the others go on.
        breaks: Epochs, counted from 0, and steps done of them, after which to stop as at Ctrl-C.

    Raises:
        Interrupted: A signal or a break; all runs were saved before.
    """
    active = list(loops)
    started = time.monotonic()
    fleet: CapturedFleet | SequentialFleet | None = None
    with contextlib.ExitStack() as shown:
        pending = shown.enter_context(deferred())
        pending.breaks = breaks
        # One signal may reach a rank from several sides.
        pending.insistent = loops[0].step.ranks.count == 1
        for loop in loops[:1]:
            shown.enter_context(loop.display)
        for epoch in range(loops[0].position[0], loops[0].config.train.epochs):
            fleet = fleet or make_fleet([loop.step for loop in active])
            train_epoch(active, fleet, epoch, functools.partial(heed, pending, active, epoch))
            for loop in active:
                loop.evaluate(functools.partial(heed, pending, active, epoch, len(loop.steps)))
            for loop, (numbers, state) in zip(list(active), completed(active), strict=True):
                try:
                    loop.end_epoch(epoch, numbers, state)
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
    loops: Sequence[Loop], fleet: CapturedFleet | SequentialFleet, epoch: int, after_step: Callable[[int], None]
) -> None:
    """Run the steps of an epoch that are still to do for all runs, and call something after each with its number."""
    first = loops[0].first_step(epoch)
    plans = [loop.begin_epoch(epoch) for loop in loops]
    progress = torch.full((), epoch / loops[0].config.train.epochs, device=loops[0].step.images.labels.device)
    for loop in loops:
        loop.watch.start()
    for number, (start, stop) in enumerate(loops[0].steps[first:], start=first + 1):
        fleet([plan.part(start, stop) for plan in plans], progress)
        loops[0].after_step(epoch, number)
        after_step(number)
    for loop in loops:
        loop.watch.stop()


def heed(pending: Pending, loops: Sequence[Loop], epoch: int, step: int) -> None:
    """Do what signals have asked for: save the runs, and stop.

    Args:
        pending: The signals.
        loops: The runs.
        epoch: Counted from 0.
        step: Steps done of it.
    """
    # All ranks stop after the same step, whichever of them a signal has reached.
    number, saving = loops[0].step.ranks.largest(pending.stopping or 0, pending.saving)
    pending.stopping = number or pending.stopping
    stopping = number or (epoch, step) in pending.breaks
    if saving or stopping:
        pending.saving = False
        for loop in loops:
            loop.save_inside(epoch, step)
    if stopping:
        runs = " ".join(str(loop.run.path) for loop in loops)
        pending.act(f"after step {step} of epoch {epoch + 1} and saved: codistill resume {runs}")


def completed(loops: Sequence[Loop]) -> list[tuple[list[list[float]], dict[str, Any]]]:
    """Read the numbers of an epoch of all runs at once, and copy their states to the host on the way."""
    vectors, states = [], []
    for loop in loops:
        vectors.append([loop.step.sums.packed(), *loop.health(), *loop.evaluation.packed()])
        loop.method.after_epoch()
        states.append(loop.saver.copy(loop.state()))
    numbers = iter(read_together([vector for run in vectors for vector in run]))
    return [([next(numbers) for _ in run], state) for run, state in zip(vectors, states, strict=True)]
