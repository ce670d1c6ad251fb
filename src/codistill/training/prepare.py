"""Before the first step: check a run, open its folder, put it on its device."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from codistill.core.console import note, note_once, warn, warn_once
from codistill.core.device import choose_precision, fast_bf16, set_up_gpu
from codistill.core.errors import ResourceError, UsageError
from codistill.core.extras import refuse_missing
from codistill.core.files import system_error
from codistill.core.host import set_up_cpu
from codistill.data.augment import Augmentation, DeviceImages, seeded_order
from codistill.data.dataset import Dataset
from codistill.data.duplicates import Duplicate, duplicates, line_about
from codistill.data.splitting import divided
from codistill.data.stream import Streaming, check_streaming, on_device
from codistill.deploy.run import Run
from codistill.methods import METHODS, Method
from codistill.methods.kd import WithTeacher, check_teacher
from codistill.methods.teacher import TeacherEnsemble
from codistill.networks.network import parameter_count
from codistill.networks.probe import label
from codistill.report.trackers import trackers
from codistill.runs.folder import Continued
from codistill.runs.images import write_duplicates, write_images
from codistill.runs.metadata import data_digests, held_out_digest, run_metadata, weights_digest
from codistill.runs.saving import Saver
from codistill.runs.summary import write_summary_of_failure
from codistill.settings.build import build_method, weights_of
from codistill.settings.config import RunConfig, TeacherSettings, TrainSettings
from codistill.training.compiling import Execution, choose_execution
from codistill.training.initial import Origin, draw_weights, read_weights, start_from
from codistill.training.ranks import ALONE, Ranks
from codistill.training.step import make_step
from codistill.training.teacher import load_teacher, top1_error
from codistill.training.trainer import OnEpochEnd, Trainer
from codistill.training.trial import try_method

Positions = Int[Tensor, " image"] | None  # of the images that are used, on the host; None: all of them, in order


@dataclass(frozen=True)
class Plan:
    """A run that has passed all checks; nothing is written yet, and nothing is on the device."""

    method: Method  # still on the host
    data: Dataset
    config: RunConfig  # with absolute paths
    device: torch.device
    augmentation: Augmentation
    training: Positions
    validation: Positions  # of training images that are held out; None: there are none
    execution: Execution
    notices: tuple[str, ...]  # lines about what is other than one may expect
    initial: Mapping[str, Any]  # of the initial weights, see `draw_weights`
    asked: Mapping[str, Any]  # settings in place of which others were chosen
    duplicates: Sequence[Duplicate]  # images that are in two splits, where they were looked for

    @property
    def held_out(self) -> dict[str, str]:
        """SHA-256 of the positions of the images that are held out; empty: there are none."""
        return {} if self.validation is None else held_out_digest(self.validation)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides on the time and the memory of a step, of runs that train side by side."""
        config, settings, teacher = self.config, self.config.train, self.method.taught_by
        taught = None if teacher is None else (type(teacher.network), parameter_count(teacher.network))
        method = config.method_name, repr(config.method), config.networks  # settings of one's own may have no hash
        return *method, settings.optimizer, settings.ema_decay > 0, taught


def announce(plans: Sequence[Plan]) -> None:
    """Print the notices of runs that start together on one data set, each once."""
    data = plans[0].data
    if data.drawn:
        note(f"{data.root} has no test images: {data.drawn}, are the test set; images.csv in the run folder lists them")
    for line in dict.fromkeys(line for plan in plans for line in plan.notices):
        warn(line)


def check(
    method: Method,
    data: Dataset,
    config: RunConfig,
    device: torch.device,
    alone: bool = True,
    ranks: Ranks = ALONE,
    begins: bool = True,
) -> Plan:
    """Check that a run can work, draw its weights, and set the process up for its device; all ranks that share it do.

    `alone` says whether no other run trains on the device at the same time; `begins` whether this one does, rather than
    go on from a checkpoint.
    """
    settings, asked = config.train, config.execution.precision
    config = config.in_precision(ranks.from_leader(lambda: choose_precision(asked, device)))
    set_up_cpu(config.execution.threads, device)
    set_up_gpu(device, config.execution.deterministic)
    with ranks.together():
        check_streaming(data, config.execution.stream)
        training, validation = split_training(data, settings)
        augmentation = config.augmentation(data, training)
        images = len(data.train) if training is None else len(training)
        found = duplicates(data, training, validation) if data.own and ranks.leads else []
        uneven = data.uneven if data.own else ""
        if uneven and (config.augment.class_weights, config.augment.sampling) == ("none", "shuffled"):
            uneven += ": --class-weights balanced or --sampling balanced counts them alike"
        notices = [line for line in (data.bounded, uneven, line_about(data, found)) if line]
        if images < settings.batch_size:
            less = f"there are {images} training images, less than a batch of {settings.batch_size}"
            notices.append(f"{less}: each step trains on all of them")
        if config.execution.precision == "bf16" and not fast_bf16(device):
            lack = "this CPU has no AMX or avx512_bf16" if device.type == "cpu" else "this GPU is older than Ampere"
            notices.append(
                f"precision bf16: {lack}, so a step may take far longer than in float32: see --precision auto"
            )
        if begins:
            method.refuse_useless()
        check_parts(config, images, ranks, method)
        for tracker in config.execution.track:
            refuse_missing(f"track {tracker}", tracker)
        if settings.patience and validation is None and data.validation is None:
            words = f"patience is {settings.patience}, but no images are held out to stop by"
            raise UsageError(f"{words}: --validation 20%, or leave it out")
        try:
            try_method(method, data, settings, config.execution.precision, device, augmentation)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise out_of_memory(config, method, error) from error
        pixels = settings.epochs * images * math.prod(data.image_size)
        captured = alone and ranks.count == 1 and method.capturable
        execution = choose_execution(config.execution, device, pixels, overlap=captured)
        initial = draw_weights(method, settings.seed)
    if settings.init is not None:
        if begins:
            origin = ranks.from_leader(functools.partial(read_weights, settings.init))
            with ranks.together():
                refuse_two_origins(config, origin)
                initial |= start_from(method, origin, data.class_names)
            if ranks.leads:
                note_once(str(initial["from"]))
        settings = dataclasses.replace(settings, init=str(Path(settings.init).absolute()))
        config = dataclasses.replace(config, train=settings)
    # Absolute paths: a run is used from other folders than it was started in.
    teaching = config.teaching
    absolute = tuple(str(Path(each).absolute()) for each in teaching.teachers)
    teaching = dataclasses.replace(teaching, teacher=absolute)
    files = tuple(f"student{index}={Path(file).absolute()}" for index, file in weights_of(config).items())
    config = dataclasses.replace(config, data_dir=data.root or None, teaching=teaching, weights=files)
    chosen = {"precision": asked} if asked == "auto" else {}
    places, warnings = (training, validation), tuple(notices)
    return Plan(method, data, config, device, augmentation, *places, execution, warnings, initial, chosen, found)


def refuse_two_origins(config: RunConfig, origin: Origin) -> None:
    """Raise `UsageError` for a file of weights of a student that the run to start from has, too."""
    for student, file in weights_of(config).items():
        if any(name.startswith(f"cohort.students.{student}.") for name in origin.weights):
            raise UsageError(f"weights student{student}={file}: init {origin.run} has it, too: name one")


def split_training(data: Dataset, settings: TrainSettings) -> tuple[Positions, Positions]:
    """Return the positions of the training images that are used, and of those held out, both in the seeded order."""
    count, held_out = len(data.train), settings.held_out(len(data.train))
    if held_out and data.validation is not None:
        own = f"data set {data.name} has {len(data.validation)} validation images of its own"
        raise UsageError(f"validation is {settings.validation}, but {own}: leave --validation out")
    if held_out >= count:
        raise UsageError(
            f"validation is {held_out}, but data set {data.name} has {count} training images: hold less out"
        )
    wanted = count - held_out if settings.train_limit is None else settings.train_limit
    if wanted > count - held_out:
        raise UsageError(
            f"train_limit {wanted} and validation {held_out} together exceed the {count} training images of {data.name}"
        )
    size = settings.batch_size
    if wanted == 1:
        raise UsageError("there is one training image, but batch normalisation needs two: train on more")
    if wanted > size and wanted % size == 1 and not settings.drop_last:
        raise UsageError(
            f"the last batch of {wanted} images would be a single image, which batch normalisation cannot use: "
            f"set drop_last (--drop-last), or another batch_size than {size}"
        )
    if not held_out:
        return None if wanted == count else seeded_order(count, settings.seed)[:wanted], None
    training, validation = map(torch.from_numpy, divided(data.train.labels, held_out, settings.seed))
    return training[:wanted], validation


def check_parts(config: RunConfig, images: int, ranks: Ranks, method: Method | None = None) -> None:
    """Refuse what would be another experiment on several ranks, or leave one less than the two images BN needs.

    `method` has the teacher that was attached in Python, if any.
    """
    if ranks.count == 1:
        return
    size, least, needs = min(config.train.batch_size, images), 2 * ranks.count, config.method.needs_full_batch
    last = 0 if config.train.drop_last else images % size
    taught = config.teaching.teacher or (method is not None and method.taught_by is not None)
    if not needs and taught and config.teaching.teacher_kl == "dist":
        needs = "teacher_kl dist"
    if needs:
        raise UsageError(f"{config.method_name} with {needs} needs the full batch in one process: omit torchrun")
    if size < least:
        found = f"there are {images} training images" if size == images else f"batch_size is {size}"
        raise UsageError(f"{found}; {ranks.count} ranks need at least {least}, two images each")
    if 0 < last < least:
        raise UsageError(
            f"the last batch of {images} images would have {last}, too few for {ranks.count} ranks: "
            f"set drop_last or another batch_size than {size}"
        )


def build_taught(config: RunConfig, data: Dataset, own: Method | None = None, fresh: bool = True) -> Method:
    """Build a run's method, with its teacher if it names one; `own` is a method that is built already.

    `fresh` says whether it begins, from weights of others where the run names them, or goes on from a checkpoint.
    """
    taught = own is not None and own.taught_by is not None
    check_teacher(
        type(own) if own is not None else METHODS[config.method_name], taught or bool(config.teaching.teacher)
    )
    method = own if own is not None else build_method(config, data.num_classes, data.image_size, fresh)
    if config.teaching.teacher is None or taught:
        return method
    named = config.teaching
    teacher = load_teacher(named, data.class_names, data.statistics, data.image_size)
    how = named.teacher_weight, named.teacher_temperature, named.teacher_kl, named.teacher_kl_weights
    return WithTeacher(method, teacher, *how, named.teacher_train)


def teaching_of(method: Method) -> TeacherSettings:
    """Return how the teacher of a method teaches, as settings without its place and what of it is trained."""
    teacher = method.taught_by
    if teacher is None:
        return TeacherSettings()
    return TeacherSettings(
        teacher_weight=teacher.weight,
        teacher_temperature=teacher.temperature,
        teacher_kl=teacher.kl,
        teacher_kl_weights=tuple(teacher.kl_weights),
    )


class DeviceSplits:
    """The splits of a data set, on a device from their first use on; runs side by side share them."""

    def __init__(self, data: Dataset, device: torch.device, stream: Streaming = "auto") -> None:
        self._data, self._device, self._stream = data, device, stream
        self._teachers: dict[str, float] = {}

    @functools.cached_property
    def train(self) -> DeviceImages:
        """All training images."""
        return on_device(self._data.train, self._data.statistics, self._device, self._stream)

    @functools.cached_property
    def test(self) -> DeviceImages:
        """The test images."""
        return on_device(self._data.test, self._data.statistics, self._device, self._stream)

    @functools.cached_property
    def validation(self) -> DeviceImages | None:
        """The validation images that the data set has of its own."""
        own = self._data.validation
        return None if own is None else on_device(own, self._data.statistics, self._device, self._stream)

    def evaluated(self, held_out: Positions) -> dict[str, DeviceImages]:
        """Return the splits that are evaluated by name, `held_out` being the training images that validate, if any."""
        validation = self.validation if held_out is None else self.subset(held_out)
        return ({} if validation is None else {"validation": validation}) | {"test": self.test}

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of images and labels."""
        return data_digests(self._data)

    def examine_teacher(self, method: Method, config: RunConfig, show: Callable[[str], None]) -> None:
        """Find the test error of a method's teacher, if it has one, and show it; of runs side by side, each one's once.

        Weights of another forward pass, other classes, or another normalisation would teach without a word.
        """
        if method.taught_by is None:
            return
        key = weights_digest(method.taught_by.network)
        if key not in self._teachers:
            network, places = method.taught_by.network, config.teaching.teachers
            networks: list[nn.Module] = [network]
            if isinstance(network, TeacherEnsemble):
                networks = [*network.teachers, network]
            names = [f"teacher {each}" for each in places or range(len(networks) - 1)] or ["teacher"]
            for name, each in zip([*names, "the mean of the teachers"], networks, strict=False):
                self._teachers[key], fault = top1_error(
                    each, self.test, config.execution.precision, method.memory_format
                )
                show(f"{name}: error on the test set {self._teachers[key]:.2f} %")
                if fault:
                    warn_once(
                        f"{name} teaches nothing ({fault}): are these weights of another network or another form of "
                        "it, or was it trained with other classes or another normalisation?"
                    )
        method.taught_by = dataclasses.replace(method.taught_by, top1_error=self._teachers[key])

    def subset(self, positions: Positions) -> DeviceImages:
        """Return some of the training images; see `DeviceImages.subset`."""
        return self.train if positions is None else self.train.subset(positions)


@contextlib.contextmanager
def set_up(
    plan: Plan,
    out: Path,
    show: bool,
    label: str = "",
    continued: Continued | None = None,
    ranks: Ranks = ALONE,
    splits: DeviceSplits | None = None,
    on_epoch_end: OnEpochEnd | None = None,
) -> Iterator[Trainer]:
    """Open the folder of a run and put the run on its device; always release both, and leave the method as it was.

    `label` is a prefix of its lines among those of other runs; `continued` is the run that the folder holds already;
    `on_epoch_end` gets each line of metrics.jsonl; `splits` are data on the device that other runs use too. Rank 0
    holds the folder for all ranks.
    """
    method, config = plan.method, plan.config
    splits = splits or DeviceSplits(plan.data, plan.device, config.execution.stream)
    made = functools.partial(run_metadata, config, plan.data, plan.device, method)
    metadata = None if continued or not ranks.leads else made(splits.digests | plan.held_out, plan.initial, plan.asked)
    with contextlib.ExitStack() as folder:
        with ranks.together():
            opened = Run.opened(out, metadata, method, plan.data, continued)
            held_run = folder.enter_context(opened) if ranks.leads else None
        # The others cannot read it: it may lie on a disk of rank 0's machine.
        known = ranks.from_leader(lambda: Run(out))
        run = held_run or known
        try:
            if ranks.leads:
                write_images(run.path, plan.data, plan.training, plan.validation)
                write_duplicates(run.path, plan.data, plan.duplicates)
            with (
                plan.execution.on(method, plan.device, config.execution.deterministic),
                contextlib.closing(Saver(run, trackers(run, config.execution.track))) as saver,
            ):
                images, precision = splits.subset(plan.training), config.execution.precision
                images = images.for_steps(min(config.train.batch_size, len(images)))
                step = make_step(method, images, plan.augmentation, config.train, precision, ranks)
                held = splits.evaluated(plan.validation)
                trainer = Trainer(run, config, step, plan.execution, held, saver, show and ranks.leads, label)
                trainer.on_epoch_end = on_epoch_end
                with ranks.together():
                    if ranks.leads:
                        splits.examine_teacher(method, config, trainer.display.note)
                    if continued is not None and continued.state is not None:
                        trainer.restore(continued.state)
                    elif continued is not None and ranks.leads:  # it begins again, whatever was logged
                        (run.path / "metrics.jsonl").unlink(missing_ok=True)
                yield trainer
        except BaseException as error:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                error = out_of_memory(config, method, error)
            elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
                error = system_error(error)
            if ranks.leads:
                write_summary_of_failure(run, config, method, error)
            raise error


def out_of_memory(config: RunConfig, method: Method, error: BaseException) -> ResourceError:
    """Return the error of a run that does not fit into memory. To split its batch would change its statistics."""
    names = " + ".join(map(label, method.cohort))
    reason = " ".join(str(error).split())[:200]
    return ResourceError(
        f"out of memory: {config.method_name} with {names} at batch size {config.train.batch_size}: use a smaller "
        f"--batch-size, or fewer or smaller --networks{f' ({reason})' if reason else ''}"
    )
