"""The trainer of one run: position, metrics, evaluation and checkpoints."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from codistill.core.console import TrainingDisplay, summary_table, warn
from codistill.core.device import Stopwatch, fast_bf16
from codistill.core.errors import CheckpointError, DivergedError, UsageError, typed_reason
from codistill.core.files import write_json
from codistill.core.host import release_freed_memory
from codistill.core.imports import resuming
from codistill.core.randomness import STEP_STREAM, draws_kept, stream_seed
from codistill.data.augment import BatchIndices, DeviceImages
from codistill.deploy.run import Run
from codistill.evaluation.diversity import Diversity, health_warnings
from codistill.evaluation.evaluation import Evaluation
from codistill.evaluation.metrics import Scores, own_student, read_together
from codistill.methods.mistakes import blamed
from codistill.report.page import page_if_possible, write_report
from codistill.report.pictures import keep_pictures
from codistill.runs.choice import ERRORS, choice, evaluated, lowest_student
from codistill.runs.predictions import NAME, write_predictions
from codistill.runs.saving import Saver
from codistill.runs.state import TrainingState, load_weights, tensors_once
from codistill.runs.summary import summarise
from codistill.settings.config import RunConfig
from codistill.training.compiling import Execution
from codistill.training.finite import bad_scores, divergence, health, infinite
from codistill.training.optim import optimizer_tensors, rate_of, set_learning_rate
from codistill.training.pace import Pace
from codistill.training.step import TrainStep

LONG_RUN = 600.0  # seconds
SHOWN_IMAGES = 16
OnEpochEnd = Callable[[dict[str, Any]], None]
"""A function of a user that gets each line of metrics.jsonl."""
BF16_GAIN = 1.5  # of a step of MFEF without compiled chains: the table of docs/speed.md


class Trainer:
    """One run between its steps.

    `held` are the splits that are evaluated each epoch: `test` last, and `validation` where one is held out. `position`
    is the completed epochs, and the steps done of the next one, at which this process starts or resumes the run.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        step: TrainStep,
        execution: Execution,
        held: dict[str, DeviceImages],
        saver: Saver,
        show: bool,
        label: str = "",
    ) -> None:
        self.run, self.config, self.step, self.execution, self.saver = run, config, step, execution, saver
        self.method = step.method
        self.masks = infinite(self.method)  # they have not diverged
        self.evaluation = Evaluation(
            self.method,
            held,
            config.execution.scored_in,
            captured=step.ranks.count == 1 and self.method.capturable,
            seed=config.train.seed,
            averaged=step.average.method if step.average is not None else None,
        )
        images = len(step.images)
        size = min(config.train.batch_size, images)
        self.used = images // size * size if config.train.drop_last else images
        self.steps = [(start, min(start + size, self.used)) for start in range(0, self.used, size)]
        self.display = TrainingDisplay(config.train.epochs, len(self.steps), self.used, show, label)
        self.stopwatch = Stopwatch(step.device)
        self.pace = Pace(run.path)
        self.rate = config.train.learning_rate
        self.evaluated = False  # whether this process did
        self.evaluates = True  # at the end of the current epoch
        self.position = (0, 0)
        self.done = 0  # epochs
        self.on_epoch_end: OnEpochEnd | None = None
        self.best: Mapping[str, Any] | None = None
        self.rows: list[Mapping[str, Any]] = []

    def restore(self, state: TrainingState) -> None:
        """Continue from the state of a checkpoint.

        Randomness is a function of (seed, epoch), so the steps that follow are those of a run without the break.
        """
        what = f"{self.run.path}: the last checkpoint"
        load_weights(self.method, state.method, what)
        try:
            for own, saved in zip(optimizer_tensors(self.step.optimizer), state.momentum, strict=True):
                own.copy_(saved)
            if state.step:
                self.step.sums.load(state.sums)
                self.step.finite.load(state.finite)
            if self.step.average is not None:
                done = state.epoch * len(self.steps) + state.step
                self.step.average.load(state.method, state.ema, done, f"{what}'s average")
            if state.step > len(self.steps):
                raise ValueError(f"it is at step {state.step}, but an epoch has {len(self.steps)}")
            counted = [row for row in evaluated(state.rows) if row["epoch"] >= self.initial_epochs]
            self.best = min(counted, key=self.selection_error, default=None)
            if self.step.ranks.leads:
                self.run.write_metrics(state.rows)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{what} does not fit the run: {reason}") from None
        self.rows = list(state.rows)
        self.position = state.position
        self.display.resume(*self.position)

    def begin_epoch(self, epoch: int) -> BatchIndices:
        """Set the learning rate and draw the order and the augmentation of an epoch."""
        settings = self.config.train
        self.set_rate(epoch)
        self.method.initialising = epoch < self.initial_epochs
        if epoch == self.initial_epochs > 0 and self.first_step(epoch) == 0:
            self.step.sums.rename()
            self.step.finite.rename()
            for tensor in optimizer_tensors(self.step.optimizer):
                tensor.zero_()
        if epoch > 0 and self.first_step(epoch) == 0:
            with blamed(type(self.method), "between_epochs"):
                self.method.between_epochs()
        self.evaluates = settings.evaluates(epoch)
        self.display.begin_epoch(epoch)
        self.pace.pause()
        return self.step.images.epoch(settings.seed, epoch, self.step.augmentation, self.method.views)

    def set_rate(self, epoch: int, share: float = 1.0) -> None:
        """Write the learning rate that a share of an epoch ends with; see `rate_of`."""
        self.rate = rate_of(self.config.train, epoch, share)
        set_learning_rate(self.step.optimizer, self.rate)

    def before_step(self, epoch: int, number: int) -> None:
        """Raise the learning rate in the epochs of the warm-up; steps are counted from 1."""
        if epoch < self.config.train.warm_up:
            self.set_rate(epoch, number / len(self.steps))

    def first_step(self, epoch: int) -> int:
        """Return how many steps of an epoch the process before has done."""
        return self.position[1] if epoch == self.position[0] else 0

    def draws_seed(self, epoch: int, number: int) -> int:
        """Return the seed of what the networks draw in a step, counted from 1; each rank draws for its own images."""
        return stream_seed(self.config.train.seed, STEP_STREAM, epoch, number, self.step.ranks.number)

    def after_step(self, epoch: int, number: int) -> None:
        """Show the progress now and then; steps are counted from 1."""
        # The host does not wait for a GPU.
        if self.step.device.type == "cpu":
            before, line = self.pace.usual, self.pace.step()
            if before is None and self.pace.usual is not None:
                self.display.expect(epoch, number, self.pace.usual)
            if line:
                warn(line)
        if self.display.due():
            # On a GPU a read would wait for all work in the queue; there terms are shown once an epoch.
            readable = self.step.device.type == "cpu"
            self.display.step(epoch, number, self.step.sums.means() if readable else {})

    def evaluate(self, between: Callable[[], None]) -> None:
        """Score all predictors on the held splits, in an epoch that ends so.

        Of several ranks rank 0 does, and the others wait in `between`.
        """
        if not self.evaluates:
            return
        self.evaluated = True
        if self.step.ranks.count == 1:
            self.evaluation.run(between)
            return
        if self.step.ranks.leads:
            self.evaluation.run()
        between()

    @functools.cached_property
    def initial_epochs(self) -> int:
        """Epochs of the initialisation, which an extension of the run does not change; 0: it has none."""
        planned = [each["epochs"] for each in self.run.extensions]
        return self.method.initial_epochs(planned[0] if planned else self.config.train.epochs)

    @property
    def over(self) -> bool:
        """Whether the run is at its end: all epochs are done, or its patience is.

        It counts from the last extension, and from the best epoch, which is none of an initialisation: errors there
        mean nothing.
        """
        patience, extensions = self.config.train.patience, self.run.extensions
        if len(self.rows) >= self.config.train.epochs:
            return True
        if not patience or self.best is None:
            return False
        extended: int = extensions[-1]["after_epoch"] if extensions else 0
        first = max(self.best["epoch"] + 1, extended)
        return bool(sum(row["epoch"] >= first for row in evaluated(self.rows)) >= patience)

    def stops(self) -> bool:
        """Whether this was the last epoch, on all ranks alike; one before its time is said."""
        epochs, patience = self.config.train.epochs, self.config.train.patience
        early: bool = patience > 0 and self.done < epochs and self.step.ranks.from_leader(lambda: self.over)
        if early and self.best and self.step.ranks.leads:
            words = f"no lower validation error in {patience} evaluations since epoch {self.best['epoch'] + 1}"
            self.display.note(f"stopped after epoch {self.done} of {epochs}: {words}")
        return early or self.done >= epochs

    def show_images(self, batch: BatchIndices) -> None:
        """Have the trackers take some images of a batch, as the networks see them."""
        if not self.step.ranks.leads:
            return
        images = self.step.images
        normalised, _ = images.augmented(batch, self.step.augmentation)
        pixels = (normalised.flatten(0, -4)[:SHOWN_IMAGES] - images.affine.shift) / images.affine.scale
        self.saver.tell("pictures", pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())

    def state(self, step: int = 0) -> TrainingState:
        """Return all that a resume needs, on the device, after some steps of the epoch after the completed ones."""
        momentum, rows = optimizer_tensors(self.step.optimizer), tuple(self.rows)
        sums, finite = (self.step.sums.state(), self.step.finite.state()) if step else ({}, {})
        config, tensors = self.config.as_mapping(), tensors_once(self.method)
        ema = self.step.average.state() if self.step.average is not None else {}
        return TrainingState(config, tensors, momentum, rows, step, sums=sums, finite=finite, ema=ema)

    def tensors(self) -> dict[str, Any]:
        """Return the numbers of the epoch on the device, for `read_together`: terms, health, scores."""
        checked = health(self.method, self.step.finite, self.masks)
        scores = self.evaluation.tensors() if self.evaluates else {}
        return {"terms": self.step.sums.tensors(), "health": checked, "scores": scores}

    def save_inside(self, epoch: int, step: int) -> None:
        """Save after some steps of an epoch, and wait for it; a diverged state is not saved."""
        if step == 0 or not self.step.ranks.leads:
            return
        copy = self.saver.copy(self.state(step))
        numbers = read_together(health(self.method, self.step.finite, self.masks))
        try:
            self.refuse(divergence(numbers, self.method.cohort.shared_stages, epoch))
        except DivergedError as error:
            warn(f"not saved: {error}")
            return
        self.saver.save(copy)
        self.saver.flush()

    def refuse(self, words: str | None) -> None:
        """Raise DivergedError with the words who diverged and where; without words the run continues."""
        if words is not None:
            self.saver.flush()
            kept = "keeps the last whole checkpoint" if self.run.checkpoints.entries() else "has no checkpoint yet"
            rate = f"at learning rate {self.rate:g}: lower --learning-rate"
            raise DivergedError(f"{words} {rate}; {self.run.path} {kept}")

    def end_epoch(self, epoch: int, numbers: Mapping[str, Any], state: TrainingState | None) -> None:
        """Check, log and save an epoch, of several ranks on rank 0; on the others `state` is None."""
        self.done = epoch + 1
        with self.step.ranks.together():
            if state is not None:
                self.log_epoch(epoch, numbers, state)
        self.step.sums.reset()
        self.step.finite.reset()

    def log_epoch(self, epoch: int, numbers: Mapping[str, Any], state: TrainingState) -> None:
        """Check, log and save an epoch."""
        self.refuse(divergence(numbers["health"], self.method.cohort.shared_stages, epoch))
        train = self.step.sums.means(numbers["terms"])
        row: dict[str, Any] = {"epoch": epoch, "learning_rate": self.rate, "train": train}
        row |= scored_row(self.evaluation.scored(numbers["scores"])) if self.evaluates else {}
        for split in numbers["scores"]:
            self.refuse(bad_scores(row, split))
        before, epochs = evaluated(self.rows), self.config.train.epochs
        row["warnings"] = health_warnings(row, before, epochs) if self.evaluates else []
        seconds = self.stopwatch.seconds()
        trained = self.used - sum(stop - start for start, stop in self.steps[: self.first_step(epoch)])
        row |= {"seconds": seconds, "images_per_second": trained / seconds}
        counted = self.evaluates and epoch >= self.initial_epochs
        best = counted and (self.best is None or self.selection_error(row) < self.selection_error(self.best))
        if best:
            self.best = row
        self.rows.append(row)
        self.saver.log(dataclasses.replace(state, rows=tuple(self.rows), best=best))
        self.display.end_epoch(row)
        if self.on_epoch_end is not None:
            self.call(self.on_epoch_end, row)

    def call(self, on_epoch_end: OnEpochEnd, row: Mapping[str, Any]) -> None:
        """Call a user's function with a copy of the epoch's line; where it raises, the run is saved, and ends."""
        try:
            on_epoch_end(copy.deepcopy(dict(row)))
        except Exception as error:
            self.saver.flush()
            kept = f"the run is saved up to epoch {row['epoch'] + 1}: {resuming(self.run.path)}"
            raise UsageError(f"on_epoch_end raised {typed_reason(error)}; {kept}") from error

    def suggest(self) -> None:
        """Show after the first epoch what bf16 would gain a long run on a CPU that is fast in it."""
        fast = fast_bf16(self.step.device) if self.step.device.type == "cpu" else ""
        long = self.rows[0]["seconds"] * self.config.train.epochs > LONG_RUN
        if fast and long and self.config.execution.precision == "float32":
            factor = f"about {BF16_GAIN} times as fast as in float32"
            self.display.note(f"this CPU has {fast}: with --precision bf16 a step is {factor}")

    def keep_predictions(self) -> None:
        """Write what the last evaluation answered for each image; a run is worth more than that."""
        if not self.evaluated:  # a run that was interrupted after its last epoch
            with draws_kept(self.step.device):
                self.evaluation.run()
        try:
            write_predictions(self.run.path, self.evaluation.predictions())
        except OSError as error:
            warn(f"{self.run.path / NAME} is not written: {error.strerror}; codistill evaluate makes it")

    def keep_pictures(self) -> None:
        """Write the test images that the report shows, and attention on them; a run is worth more than that."""
        test, student = self.evaluation.predictions()["test"], lowest_student(self.rows[-1])[0]
        try:
            keep_pictures(self.run, self.method, test, student, self.run.load_data().test)
        except Exception as error:
            reason = typed_reason(error)
            warn(f"{self.run.path}: the pictures of its report are not written: {reason}; codistill report makes them")

    def finish(self, seconds: float) -> None:
        """Write report and summary, and show the table; `seconds` are those since the first step."""
        lost = self.saver.finish()
        self.keep_predictions()
        if self.step.device.type == "cpu":  # the report needs memory, and so may the program that has trained
            release_freed_memory()
        best = self.best or self.rows[-1]
        execution = dataclasses.asdict(self.execution)
        images = {split: len(each) for split, each in self.evaluation.splits.items()}
        summary = summarise(self.run, self.config, self.method, self.rows, best, seconds, execution, images)
        self.saver.tell("end", summary)
        if lost is None:
            with page_if_possible(self.run):
                self.keep_pictures()
                write_report(self.run, summary)
        # Last, for a run is finished once it is there.
        write_json(self.run.path / "summary.json", summary)
        if lost is not None:
            raise lost
        self.display.console.print(summary_table(summary, ERRORS))
        if chosen := choice(summary):
            self.display.console.print(chosen, soft_wrap=True)
        self.display.console.print(f"run folder: {self.run.path}", soft_wrap=True)

    @staticmethod
    def selection_error(row: Mapping[str, Any]) -> float:
        """Return the error that the best epoch has least of, and of equal ones the first: the best student's."""
        return lowest_student(row)[1]


def scored_row(found: Mapping[str, tuple[Mapping[str, Scores], Diversity]]) -> dict[str, Any]:
    """Return what a line of metrics.jsonl says of the splits, `test` last, and how the students differ on that one."""
    row: dict[str, Any] = {}
    for name, (scores, diversity) in found.items():
        row[name] = {predictor: dataclasses.asdict(each) for predictor, each in scores.items()}
        row["diversity"] = dataclasses.asdict(diversity)
    errors = {name: each["top1_error"] for name, each in row["test"].items()}
    if "fused" in errors:
        row["diversity"]["gap_to_fused"] = {
            name: error - errors["fused"] for name, error in errors.items() if own_student(name)
        }
    return row
