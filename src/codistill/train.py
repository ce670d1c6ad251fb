"""The epoch loop: from a method and a data set to a finished run folder."""

import copy
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from codistill.checkpoint import write_json
from codistill.cohort import Cohort
from codistill.config import RunConfig, TrainSettings
from codistill.console import TrainingDisplay, summary_table
from codistill.data.augment import DeviceImages, epoch_plan, seeded_order
from codistill.data.dataset import Dataset, Split, dataset
from codistill.device import choose_device
from codistill.errors import DivergedError, UsageError
from codistill.evaluate import evaluate
from codistill.methods import METHODS, Method
from codistill.metrics import Scores
from codistill.networks.network import parameter_count
from codistill.optim import learning_rate_at, make_optimizer, set_learning_rate
from codistill.report import write_report
from codistill.run import Run, build_method, dataset_record, environment
from codistill.step import PlainStep, Step, make_step
from codistill.teacher import Taught, load_teacher


def split_training(data: Dataset, settings: TrainSettings) -> tuple[Split, Split | None]:
    """Take the training images that are used, and the validation images if any, from the seeded order.

    Raises:
        UsageError: More images asked for than there are, or a last batch too small for batch statistics.
    """
    count, held_out = len(data.train), settings.validation
    if held_out >= count:
        raise UsageError(f"validation is {held_out}, but data set {data.name} has {count} training images")
    wanted = count - held_out if settings.train_limit is None else settings.train_limit
    if wanted > count - held_out:
        raise UsageError(
            f"train_limit {wanted} and validation {held_out} together exceed the {count} training images of {data.name}"
        )
    if wanted < settings.batch_size:
        raise UsageError(
            f"batch_size is {settings.batch_size}, but there are {wanted} training images: make it smaller"
        )
    if wanted % settings.batch_size == 1 and not settings.drop_last:
        raise UsageError(
            f"the last batch of {wanted} images would be a single image, which batch normalisation cannot use: "
            f"set drop_last or another batch_size than {settings.batch_size}"
        )
    order = seeded_order(count, settings.seed).numpy()

    def part(chosen: Any) -> Split:
        return Split(data.train.images[chosen], data.train.labels[chosen])

    training = data.train if wanted == count else part(order[:wanted])
    return training, part(order[count - held_out :]) if held_out else None


def check_shapes(method: Method, data: Dataset) -> None:
    """Run the method once without data, on the meta device, to find what cannot work before anything is written.

    Raises:
        UsageError: The students' classes are not the data set's, or shapes do not match.
    """
    height, width = data.image_size
    names = network_names(method.cohort)
    probe = copy.deepcopy(method).to("meta").eval()
    try:
        outputs = probe(torch.empty(2, 3, height, width, device="meta"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{method.name} with {' + '.join(names)} cannot take {height}x{width} images: {reason}"
        ) from None
    for name, logits in zip(names, outputs.logits, strict=True):
        if logits.shape[1] != data.num_classes:
            raise UsageError(
                f"network {name} has {logits.shape[1]} classes, but data set {data.name} {data.num_classes}"
            )
    if method.num_classes != data.num_classes:
        raise UsageError(
            f"{method.name} was made for {method.num_classes} classes, but data set {data.name} has {data.num_classes}"
        )


def network_names(cohort: Cohort) -> list[str]:
    """Name the students by their specs, or by their class where they have none."""
    return [student.spec or type(student).__name__ for student in cohort]


def free_folder(config: RunConfig) -> Path:
    """Find a new folder name below runs/ for a run."""
    names = [spec.partition(":")[0].replace("/", "-") for spec in config.networks]
    networks = "+".join(f"{name}x{len(list(same))}" for name, same in itertools.groupby(names))
    stem = f"{config.data.partition(':')[0]}-{config.method_name}-{networks}-seed{config.train.seed}"
    for number in itertools.count(1):
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists():
            return path
    raise AssertionError


def train_from_config(config: RunConfig, out: Path | None = None, show: bool = True) -> Run:
    """Load the data set, build the networks and train; see `train`."""
    if not config.data:
        raise UsageError("no data set: name one with --data, for example --data digits")
    check_teacher(METHODS[config.method_name], config.teaching.teacher is not None)
    device = choose_device(config.train.device, config.train.precision)
    data = dataset(config.data, config.data_dir)
    # The place in full: the run is used from other folders than it was started in.
    config = dataclasses.replace(config, data_dir=data.root or None)
    method = build_method(config, data.num_classes, data.image_size)
    if config.teaching.teacher is not None:
        teacher = load_teacher(config.teaching, data.class_names, data.statistics)
        method = Taught(method, teacher, config.teaching.teacher_weight, config.teaching.teacher_temperature)
    return _train(method, data, config, out or free_folder(config), device, show)


def check_teacher(method: type[Method], given: bool) -> None:
    """Refuse a teacher where none is used, and none where one is needed.

    Raises:
        UsageError: Either of them.
    """
    if given and method.teacher == "refused":
        raise UsageError(f"{method.name} has no use for a teacher: leave --teacher out, or choose kd")
    if not given and method.teacher == "required":
        raise UsageError(
            f"{method.name} needs a teacher: give --teacher a run folder, an exported file or a checkpoint"
        )


def train(
    method: Method,
    data: Dataset,
    *,
    epochs: int | None = None,
    out: str | Path | None = None,
    settings: TrainSettings | None = None,
    show: bool = True,
) -> Run:
    """Train the students of a method together.

    Args:
        method: Students with whatever teaches them; trained in place and left on the training device.
        data: What they are trained and tested on.
        epochs: How often each image is seen; overrides the settings.
        out: The run folder, which must not hold anything; None: a new one below runs/.
        settings: Everything else; None: the defaults, which are the paper's recipe.
        show: Whether to print progress and the final table.

    Returns:
        The finished run.

    Raises:
        UsageError: Settings, networks and data do not go together, or the folder is not empty; nothing was written.
        DivergedError: A loss became NaN or infinite; the last whole checkpoint is kept.
    """
    inner, given = (method.method, True) if isinstance(method, Taught) else (method, False)
    check_teacher(type(inner), given)
    settings = settings or TrainSettings()
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    config = RunConfig(
        method_name=method.name,
        networks=tuple(student.spec for student in method.cohort),
        data=data.spec or data.name,
        data_dir=data.root or None,
        train=settings,
        method=method.settings,
    )
    device = choose_device(settings.device, settings.precision)
    return _train(method, data, config, Path(out) if out else free_folder(config), device, show)


def _train(method: Method, data: Dataset, config: RunConfig, out: Path, device: torch.device, show: bool) -> Run:
    settings = config.train
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    augmentation = settings.augmentation(data)
    training, validation = split_training(data, settings)
    check_shapes(method, data)
    record = {**config.as_mapping(), "dataset": dataset_record(data), "environment": environment(device)}
    run, lock = Run.create(out, record, method, data)
    try:
        method.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = make_optimizer(
            method, settings.learning_rate, settings.momentum, settings.nesterov, settings.weight_decay
        )
        splits = {"validation": validation, "test": data.test}
        held = {name: DeviceImages(each, data.statistics, device) for name, each in splits.items() if each is not None}
        resident = DeviceImages(training, data.statistics, device)
        step = make_step(PlainStep(method, resident, augmentation, optimizer, settings.precision))
        with SummaryWriter(str(out / "tensorboard")) as board:
            Loop(run, config, step, held, board, show).run_epochs()
    except BaseException as error:
        write_json(out / "summary.json", {"status": status_of(error), "error": str(error), **run_facts(config, method)})
        raise
    finally:
        lock.release()
    return run


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

    def run_epochs(self) -> None:
        """Train, evaluate, log and save until the last epoch; then summarise."""
        started = time.monotonic()
        rows = []
        with self.display:
            for epoch in range(self.config.train.epochs):
                rows.append(self.run_epoch(epoch))
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
            row[name] = {
                predictor: dataclasses.asdict(each)
                for predictor, each in evaluate(self.method, images, settings.precision).items()
            }
            # The losses of the last step say nothing of the weights that it made.
            nll = {f"{name}/{predictor}/nll": each["nll"] for predictor, each in row[name].items()}
            self.refuse_divergence(epoch, rate, nll)
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

    def refuse_divergence(self, epoch: int, rate: float, terms: dict[str, float]) -> None:
        """Stop where a loss term is no number.

        Raises:
            DivergedError: Names the terms, the epoch and the learning rate.
        """
        bad = [name for name, value in terms.items() if name != "loss" and not math.isfinite(value)]
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
    board.add_scalar("train/learning_rate", row["learning_rate"], step)
    board.add_scalar("train/images_per_second", row["images_per_second"], step)
