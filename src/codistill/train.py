"""From a method and a data set to a finished run folder."""

import contextlib
import copy
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from codistill.checkpoint import write_json
from codistill.config import RunConfig, TeacherSettings, TrainSettings
from codistill.data.augment import DeviceImages, seeded_order
from codistill.data.dataset import Dataset, Split, dataset
from codistill.device import choose_algorithms, choose_device
from codistill.errors import DivergedError, UsageError
from codistill.loop import Loop, network_names, run_epochs, run_facts, status_of
from codistill.methods import METHODS, Method
from codistill.optim import make_optimizer
from codistill.run import Run, build_method, dataset_record, environment
from codistill.step import PlainStep
from codistill.teacher import Taught, load_teacher

SHARED_IN_A_FLEET = (
    "epochs",
    "batch_size",
    "drop_last",
    "train_limit",
    "validation",
    "device",
    "precision",
    "deterministic",
    "threads",
)


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


def free_folder(config: RunConfig, ending: str | None = None) -> Path:
    """Find a new folder name below runs/ for a run, or for several that `ending` names."""
    names = [spec.partition(":")[0].replace("/", "-") for spec in config.networks]
    networks = "+".join(f"{name}x{len(list(same))}" for name, same in itertools.groupby(names))
    stem = f"{config.data.partition(':')[0]}-{config.method_name}-{networks}-{ending or f'seed{config.train.seed}'}"
    for number in itertools.count(1):
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists():
            return path
    raise AssertionError


def train_from_config(config: RunConfig, out: Path | None = None, show: bool = True) -> Run:
    """Load the data set, build the networks and train; see `train`."""
    device = choose_device(config.train.device, config.train.precision)
    data = load_named_data(config)
    return _train(build_taught(config, data), data, config, out or free_folder(config), device, show)


def load_named_data(config: RunConfig) -> Dataset:
    """Load the data set that a run names.

    Raises:
        UsageError: It names none.
    """
    if not config.data:
        raise UsageError("no data set: name one with --data, for example --data digits")
    return dataset(config.data, config.data_dir)


def build_taught(config: RunConfig, data: Dataset) -> Method:
    """Build a run's method, with its teacher if it names one.

    Raises:
        UsageError: Networks, method, teacher and settings do not go together.
    """
    check_teacher(METHODS[config.method_name], config.teaching.teacher is not None)
    method = build_method(config, data.num_classes, data.image_size)
    if config.teaching.teacher is None:
        return method
    teacher = load_teacher(config.teaching, data.class_names, data.statistics)
    return Taught(method, teacher, config.teaching.teacher_weight, config.teaching.teacher_temperature)


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
    inner, teaching = method, TeacherSettings()
    if isinstance(method, Taught):
        inner = method.method
        teaching = TeacherSettings(teacher_weight=method.weight, teacher_temperature=method.temperature)
    check_teacher(type(inner), inner is not method)
    settings = settings or TrainSettings()
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    config = RunConfig(
        method_name=method.name,
        networks=tuple(student.spec for student in method.cohort),
        data=data.spec or data.name,
        data_dir=data.root or None,
        train=settings,
        teaching=teaching,
        method=method.settings,
    )
    device = choose_device(settings.device, settings.precision)
    return _train(method, data, config, Path(out) if out else free_folder(config), device, show)


def _train(method: Method, data: Dataset, config: RunConfig, out: Path, device: torch.device, show: bool) -> Run:
    with contextlib.ExitStack() as held:
        loop = held.enter_context(prepared(method, data, config, out, device, show))

        def diverged(_: Loop, error: DivergedError) -> None:
            raise error

        run_epochs([loop], diverged)
    return loop.run


def train_fleet(configs: Sequence[RunConfig], outs: Sequence[Path], show: bool = True) -> list[Run]:
    """Train independent runs side by side on one device, each in its own run folder.

    Each run ends as it would have ended alone; one that diverges is marked in its summary.json, and the others go on.

    Args:
        configs: Runs with the same data set, epochs, batch size, device and precision; they may differ in method,
            networks and seed.
        outs: A run folder for each.
        show: Whether to print progress and the final tables.

    Returns:
        The runs, in order; `summary["status"]` says how each ended.

    Raises:
        UsageError: The runs do not go together, or one of them cannot work; nothing was written.
    """
    first = configs[0]
    for config in configs[1:]:
        for key in ("data", "data_dir"):
            if getattr(config, key) != getattr(first, key):
                raise UsageError(f"runs side by side must have one {key}: {getattr(first, key)!r} and another")
        for key in SHARED_IN_A_FLEET:
            if getattr(config.train, key) != getattr(first.train, key):
                raise UsageError(f"runs side by side must have one {key}: {getattr(first.train, key)!r} and another")
    if len(set(outs)) < len(outs):
        raise UsageError("runs side by side need a run folder each, but one is named twice")
    device = choose_device(first.train.device, first.train.precision)
    data = load_named_data(first)
    methods = [build_taught(config, data) for config in configs]
    # All of them before the first run folder is made.
    for method, config, out in zip(methods, configs, outs, strict=True):
        config.train.augmentation(data)
        split_training(data, config.train)
        check_shapes(method, data)
        Run.refuse_taken(out)
    with contextlib.ExitStack() as held:
        loops = [
            held.enter_context(prepared(method, data, config, out, device, show, label=out.name))
            for method, config, out in zip(methods, configs, outs, strict=True)
        ]
        run_epochs(loops, mark_diverged)
    return [loop.run for loop in loops]


def resume(path: str | Path, data_dir: str | None = None, show: bool = True) -> Run:
    """Go on with an interrupted run from its last whole checkpoint, which is that of the last completed epoch.

    On a CPU, and on CUDA with `deterministic`, it ends as it would have ended without the break, to the last bit.

    Args:
        path: The run folder.
        data_dir: Where the data set is now, if not where it was.
        show: Whether to print progress and the final table.

    Raises:
        UsageError: The run is finished, or another process holds it.
        CheckpointError: Not a run folder, no whole checkpoint, or networks that only your program can build.
        DataError: The data set is missing, or not that of the run.
    """
    run = Run(path)
    config = run.config
    device = choose_device(config.train.device, config.train.precision)
    data = run.load_data(data_dir)
    method = build_taught(config, data)
    with prepared(method, data, config, run.path, device, show, run=run) as loop:
        loop.restore()

        def diverged(_: Loop, error: DivergedError) -> None:
            raise error

        run_epochs([loop], diverged)
    return run


def train_seeds(config: RunConfig, seeds: Sequence[int], out: Path | None = None, show: bool = True) -> list[Run]:
    """Train one run for each seed, side by side; see `train_fleet`.

    Raises:
        UsageError: A seed twice; otherwise as `train_fleet`.
    """
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds are {list(seeds)}: name each once")
    configs = [dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)) for seed in seeds]
    folder = out or free_folder(config, "seeds")
    return train_fleet(configs, [folder / f"seed{seed}" for seed in seeds], show)


def mark_diverged(loop: Loop, error: DivergedError) -> None:
    """Write how a run ended that is dropped from a fleet, and say so."""
    write_summary_of_failure(loop.run.path, loop.config, loop.method, error)
    print(f"codistill: warning: {loop.run.path.name} is dropped: {error}", file=sys.stderr)


@contextlib.contextmanager
def prepared(
    method: Method,
    data: Dataset,
    config: RunConfig,
    out: Path,
    device: torch.device,
    show: bool,
    label: str = "",
    run: Run | None = None,
) -> Iterator[Loop]:
    """Check everything, make the run folder and put the run on its device; close all at the end, however it comes.

    An interrupted `run` is opened again instead of made.
    """
    settings = config.train
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    choose_algorithms(device, settings.deterministic)
    augmentation = settings.augmentation(data)
    training, validation = split_training(data, settings)
    check_shapes(method, data)
    # The places of data and teacher in full: the run is used from other folders than it was started in.
    teaching = config.teaching
    if teaching.teacher is not None:
        teaching = dataclasses.replace(teaching, teacher=str(Path(teaching.teacher).absolute()))
    config = dataclasses.replace(config, data_dir=data.root or None, teaching=teaching)
    record = {**config.as_mapping(), "dataset": dataset_record(data), "environment": environment(device)}
    if run is None:
        run, lock = Run.create(out, record, method, data)
    else:
        lock = run.reopen(method, data)
    try:
        method.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = make_optimizer(
            method, settings.learning_rate, settings.momentum, settings.nesterov, settings.weight_decay
        )
        splits = {"validation": validation, "test": data.test}
        held = {name: DeviceImages(each, data.statistics, device) for name, each in splits.items() if each is not None}
        step = PlainStep(
            method, DeviceImages(training, data.statistics, device), augmentation, optimizer, settings.precision
        )
        with SummaryWriter(str(out / "tensorboard")) as board:
            yield Loop(run, config, step, held, board, show, label)
    except BaseException as error:
        write_summary_of_failure(out, config, method, error)
        raise
    finally:
        lock.release()


def write_summary_of_failure(out: Path, config: RunConfig, method: Method, error: BaseException) -> None:
    """Write the summary.json of a run that did not finish."""
    write_json(out / "summary.json", {"status": status_of(error), "error": str(error), **run_facts(config, method)})
