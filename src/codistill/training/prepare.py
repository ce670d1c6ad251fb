"""What comes before the first step: data, networks, teacher, checks, run folder, device."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from codistill.core.device import set_up_gpu
from codistill.core.errors import ResourceError, UsageError
from codistill.core.host import set_up_cpu
from codistill.data.augment import DeviceImages, seeded_order
from codistill.data.dataset import Dataset, Split
from codistill.deploy.run import Run
from codistill.methods import METHODS, Method
from codistill.methods.teacher import WithTeacher
from codistill.runs.metadata import run_metadata
from codistill.runs.saving import Saver
from codistill.runs.summary import network_names, write_summary_of_failure
from codistill.settings.build import build_method
from codistill.settings.config import RunConfig, TrainSettings
from codistill.training.compiling import choose_execution
from codistill.training.optim import make_optimizer
from codistill.training.ranks import ALONE, Ranks
from codistill.training.step import TrainStep
from codistill.training.teacher import load_teacher
from codistill.training.trainer import Trainer


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


def check_parts(config: RunConfig, images: int, ranks: Ranks) -> None:
    """Refuse what would be another experiment on several ranks, or leave one less than the two images BN needs.

    Raises:
        UsageError: Names the setting to change.
    """
    size, least, needs = config.train.batch_size, 2 * ranks.count, config.method.needs_full_batch
    last = 0 if config.train.drop_last else images % size
    if ranks.count > 1 and needs:
        raise UsageError(f"{config.method_name} with {needs} needs the full batch in one process: omit torchrun")
    if ranks.count > 1 and size < least:
        raise UsageError(f"batch_size is {size}; {ranks.count} ranks need at least {least}, two images each")
    if ranks.count > 1 and 0 < last < least:
        raise UsageError(
            f"the last batch of {images} images would have {last}, too few for {ranks.count} ranks: "
            f"set drop_last or another batch_size than {size}"
        )


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
    return WithTeacher(method, teacher, config.teaching.teacher_weight, config.teaching.teacher_temperature)


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


class DeviceSplits:
    """Splits on a device; runs side by side have one copy of what they have in common.

    Args:
        statistics: Mean and standard deviation of the data set.
        device: Where they lie.
    """

    def __init__(self, statistics: tuple[tuple[float, ...], tuple[float, ...]], device: torch.device) -> None:
        self._statistics, self._device = statistics, device
        self._placed: list[tuple[Split, DeviceImages]] = []

    def images(self, split: Split) -> DeviceImages:
        """Give a split on the device."""
        for known, images in self._placed:
            if known is split:
                return images
        images = DeviceImages(split, self._statistics, self._device)
        self._placed.append((split, images))
        return images


def with_absolute_paths(config: RunConfig, data: Dataset) -> RunConfig:
    """Write the places of data and teacher in full: a run is used from other folders than it was started in."""
    teaching = config.teaching
    if teaching.teacher is not None:
        teaching = dataclasses.replace(teaching, teacher=str(Path(teaching.teacher).absolute()))
    return dataclasses.replace(config, data_dir=data.root or None, teaching=teaching)


@contextlib.contextmanager
def set_up(
    method: Method,
    data: Dataset,
    config: RunConfig,
    out: Path,
    device: torch.device,
    show: bool,
    label: str = "",
    run: Run | None = None,
    ranks: Ranks = ALONE,
    resident: DeviceSplits | None = None,
    runs: int = 1,
) -> Iterator[Trainer]:
    """Check everything, make the run folder and put the run on its device; close all at the end, however it comes.

    A `run` that has a folder is opened again instead of made. Of the processes that share a run, rank 0 holds the
    folder. Splits that are `resident` already are used as they are. `runs` train side by side, this one among them.
    """
    settings, show = config.train, show and ranks.leads
    set_up_cpu(config.execution.threads, device)
    set_up_gpu(device, config.execution.deterministic)
    with ranks.together():
        augmentation = settings.augmentation(data)
        training, validation = split_training(data, settings)
        check_parts(config, len(training), ranks)
        check_shapes(method, data)
        steps = settings.epochs * math.ceil(len(training) / settings.batch_size)
        execution = choose_execution(config.execution, device, 1 if ranks.count > 1 else runs, steps)
        execution.prepare(method, device, config.execution.deterministic)
    config = with_absolute_paths(config, data)
    resident = resident or DeviceSplits(data.statistics, device)
    metadata = None if run else run_metadata(config, data, device)
    with opened_folder(out, metadata, method, data, ranks) as folder:
        try:
            method.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
            optimizer = make_optimizer(
                method, settings.learning_rate, settings.momentum, settings.nesterov, settings.weight_decay
            )
            splits = {"validation": validation, "test": data.test}
            held = {name: resident.images(each) for name, each in splits.items() if each is not None}
            images = resident.images(training)
            step = TrainStep(method, images, augmentation, optimizer, config.execution.precision, ranks, execution)
            with contextlib.closing(Saver(folder)) as saver:
                yield Trainer(folder, config, step, held, saver, show, label)
        except (torch.OutOfMemoryError, MemoryError) as error:
            lack = out_of_memory(config, method, error)
            if ranks.leads:
                write_summary_of_failure(folder, config, method, lack)
            raise lack from error
        except BaseException as error:
            if ranks.leads:
                write_summary_of_failure(folder, config, method, error)
            raise


@contextlib.contextmanager
def opened_folder(
    path: Path, metadata: dict[str, Any] | None, method: Method, data: Dataset, ranks: Ranks
) -> Iterator[Run]:
    """Make or open the run folder; rank 0 holds it for all."""
    with contextlib.ExitStack() as held:
        run: Run | None = None
        with ranks.together():
            if ranks.leads:
                run = held.enter_context(Run.opened(path, metadata, method, data))
        # The others cannot read it: it may lie on a disk of rank 0's machine.
        known = ranks.from_leader(lambda: Run(path)) if ranks.count > 1 else run
        yield run or known  # type: ignore[misc]


def out_of_memory(config: RunConfig, method: Method, error: BaseException) -> ResourceError:
    """Say what did not fit into memory; the batch is never split, for that would change its statistics."""
    names = " + ".join(network_names(method.cohort))
    reason = " ".join(str(error).split())[:200]
    return ResourceError(
        f"out of memory: {config.method_name} with {names} at batch size {config.train.batch_size}: use a smaller "
        f"--batch-size, or fewer or smaller --networks{f' ({reason})' if reason else ''}"
    )
