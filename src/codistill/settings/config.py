"""All settings of a run as one frozen value: training, execution, teacher, method."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.core.kinds import take_kinds
from codistill.core.registry import near_matches
from codistill.data.augment import Augmentation, PaddingMode
from codistill.data.dataset import Dataset
from codistill.data.splitting import checked_part, part_of
from codistill.methods import METHODS, MethodSettings
from codistill.methods.losses import KLForm, check_teaching
from codistill.settings.augment import AugmentSettings
from codistill.settings.updates import UpdateSettings

# For counts without a bound of their own.
LARGEST = 2**31 - 1
TRACKERS = ("trackio", "wandb", "mlflow")
# Metadata of settings: results do not depend on a place, runs that train side by side have common ones in common, and
# what moves is known by its contents.
PLACE, COMMON, MOVES = {"place": True}, {"common": True}, {"moves": True}


@dataclass(frozen=True, kw_only=True)
class TrainSettings(UpdateSettings):
    """Settings of the training, the same for all methods; the defaults are MFEF's recipe."""

    epochs: int = field(default=300, metadata=COMMON)
    """Number of passes over the training set."""
    batch_size: int = field(default=128, metadata=COMMON | {"alias": "-b"})
    """Images per step, at least 2."""
    drop_last: bool = field(default=False, metadata=COMMON)
    """Leave out the last, smaller batch of an epoch (other images in each epoch)."""
    learning_rate: float = field(default=0.1, metadata={"alias": "--lr"})
    """Initial learning rate; with warm_up that of its end."""
    momentum: float = 0.9
    """Momentum, from 0 to below 1."""
    nesterov: bool = True
    """Nesterov momentum."""
    weight_decay: float = field(default=1e-4, metadata={"alias": "--wd"})
    """Weight decay (L2) of all parameters of the students; a method's own modules may have another."""
    milestones: tuple[int, ...] | None = None
    """Epochs at which the learning rate is multiplied by learning_rate_decay. None: at 1/2 and 3/4 of the epochs."""
    learning_rate_decay: float = 0.1
    """Factor on the learning rate at each milestone."""
    padding: int = 4
    """Pixels around a training image before a random crop of its size; 0: no crop."""
    padding_mode: PaddingMode = "zeros"
    """Fill of the padding: black (zeros), or the mirrored image (reflect)."""
    flip: bool | None = None
    """Mirror half of the training images. None: where the data set says that a mirrored image keeps its label."""
    train_limit: int | None = field(default=None, metadata=COMMON)
    """Train only on the first N images of the seeded order."""
    validation: int | str = field(default=0, metadata=COMMON | {"metavar": "N|P%"})
    """Hold out N training images, or a part of all of them as 20%, of each class its share, to choose epoch and
    student; each seed has others."""
    evaluate_every: int = 1
    """Epochs from one evaluation to the next; the last epoch is always evaluated, and the best is one of these."""
    seed: int = 0
    """Seed of initial weights, order of images, crops, flips and splits."""

    def __post_init__(self) -> None:
        take_kinds(self)
        for name, low, high in (
            ("epochs", 1, LARGEST),
            ("batch_size", 2, LARGEST),
            ("learning_rate_decay", 0, 1),
            ("weight_decay", 0, 1),
            ("padding", 0, LARGEST),
            ("train_limit", 1, LARGEST),
            ("validation", 0, LARGEST),
            ("evaluate_every", 1, LARGEST),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if isinstance(value, str):
                checked_part(name, value)
                continue
            if value is not None and not low <= value <= high:
                bound = f"at least {low}" if high == LARGEST and value < low else f"from {low} to {high}"
                raise UsageError(f"{name} is {value}; it must be {bound}")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be a number above 0")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}; it must be from 0 to below 1")
        steps = self.milestones or ()
        if list(steps) != sorted(set(steps)) or any(not 0 < step < self.epochs for step in steps):
            raise UsageError(f"milestones are {list(steps)}; they must rise and lie between 1 and epochs - 1")
        if steps and self.schedule == "cosine":
            raise UsageError(f"milestones are {list(steps)}, but schedule cosine has none: leave one of them out")
        self.check_updates(self.learning_rate, self.epochs)

    @property
    def learning_rate_steps(self) -> tuple[int, ...]:
        """Epochs at which the learning rate falls."""
        halves = math.ceil(self.epochs / 2), math.ceil(self.epochs * 3 / 4)
        return halves if self.milestones is None else self.milestones

    def held_out(self, images: int) -> int:
        """Return how many of so many training images are held out for validation, with a percentage at least one."""
        return part_of(images, self.validation)

    def evaluates(self, epoch: int) -> bool:
        """Whether an epoch, counted from 0, ends with an evaluation."""
        return (epoch + 1) % self.evaluate_every == 0 or epoch + 1 == self.epochs

    def augmentation(self, data: Dataset) -> Augmentation:
        """Decide on crops and flips for a data set; raise UsageError if its images are smaller than the padding."""
        smallest = min(data.image_size)
        if self.padding_mode == "reflect" and self.padding >= smallest:
            raise UsageError(f"padding is {self.padding}, but reflection needs less than {smallest} pixels")
        if self.padding > smallest:
            raise UsageError(f"padding is {self.padding}, but images of {smallest} pixels leave room for {smallest}")
        flip = data.flip if self.flip is None else self.flip
        return Augmentation(padding=self.padding, padding_mode=self.padding_mode, flip=flip)


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """Device, precision and the like: settings of the computation, apart from the experiment."""

    device: str = field(default="auto", metadata=PLACE | COMMON)
    """cpu, cuda, cuda:1, or auto: cuda where there is one."""
    precision: Literal["float32", "bf16", "auto"] = field(default="float32", metadata=COMMON)
    """float32, or bf16: autocast with float32 weights, batch statistics and losses. auto: bf16 where the device is fast
    in it (GPUs from Ampere on, CPUs with AMX or avx512_bf16), else float32."""
    evaluation_precision: Literal["same", "float32", "bf16"] = field(default="same", metadata=COMMON)
    """Precision of the evaluation; same: that of the training."""
    deterministic: bool = field(default=False, metadata=COMMON)
    """On CUDA, use only algorithms that repeat bit for bit, which costs speed; a CPU always does."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether chains of small operations are compiled for training (docs/speed.md); auto: on a CPU, in runs that are
    long enough to pay for it."""
    threads: int | None = field(default=None, metadata=PLACE | COMMON)
    """CPU threads. None: one for each core, fewer in a container that may use less or where a short measurement finds
    them distinctly faster. Results repeat bit for bit with the same number of threads."""

    data_cache: str | None = field(default=None, metadata=PLACE | COMMON | {"metavar": "PATH|off"})
    """Folder for images that are decoded once (docs/large-data.md). None: in the user's cache folder; off: none."""
    stream: Literal["auto", "on", "off"] = field(default="auto", metadata=PLACE | COMMON)
    """Whether images are read from the file of decoded images, a batch at a time, instead of being held in memory; the
    results are the same. auto: on a CPU, where they would take more than half of the free memory."""
    track: tuple[str, ...] = field(default=(), metadata=PLACE | {"metavar": "{trackio,wandb,mlflow} .."})
    """Trackers that are told of each epoch beside TensorBoard."""

    def __post_init__(self) -> None:
        take_kinds(self)
        if self.data_cache not in (None, "off"):  # a run is used from other folders than it was started in
            object.__setattr__(self, "data_cache", os.path.abspath(os.path.expanduser(str(self.data_cache))))
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise UsageError(f"threads is {self.threads}; it must be from 1 to 1024")
        for each in self.track:
            if each not in TRACKERS:
                raise UsageError(f"track is {each!r}: {near_matches(each, TRACKERS)}")

    @property
    def scored_in(self) -> str:
        """The precision of the evaluation."""
        return self.precision if self.evaluation_precision == "same" else self.evaluation_precision


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """A frozen teacher: kd needs one, other methods may have one."""

    teacher: str | tuple[str, ...] | None = field(default=None, metadata=MOVES | {"metavar": "PATH .."})
    """A run folder, a .safetensors file that export wrote, or a checkpoint with teacher_network; of several the mean of
    their softened predictions teaches."""
    teacher_predictor: str | None = None
    """The predictor of a run folder that teaches, the same of several. None: its best student."""
    teacher_network: str | None = None
    """The network whose weights a checkpoint holds, the same of several: any name of --networks, such as those of
    RepDistiller or mdistiller, resnet8 to resnet110, resnet8x4, resnet32x4, wrn-16-1 to wrn-40-2, vgg8, vgg13;
    `codistill list` shows all."""
    teacher_weight: float = 1.0
    """Weight of the teacher's terms."""
    teacher_temperature: float = 3.0
    """T of the teacher's terms, > 0; they are multiplied by T^2."""
    teacher_kl: KLForm = "kl"
    """Form of the teacher's terms, as method.kl is that of the method's own (docs/kl.md)."""
    teacher_kl_weights: tuple[float, ...] = ()
    """Factors on the two parts of dkd or dist. Empty: 1 8 or 1 1."""
    teacher_train: str | None = field(default=None, metadata={"metavar": "PATTERN"})
    """Train parts of the teacher by the labels: those of its parameters in whose names this regular expression is
    found, as head. None: all of it is frozen."""

    @property
    def teachers(self) -> tuple[str, ...]:
        """The places of all teachers; empty: there is none."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher or ()

    def __post_init__(self) -> None:
        take_kinds(self)
        if not isinstance(self.teacher, str) and len(self.teachers) < 2:
            object.__setattr__(self, "teacher", self.teachers[0] if self.teachers else None)
        how = self.teacher_temperature, self.teacher_weight, self.teacher_kl, self.teacher_kl_weights
        check_teaching(*how, prefix="teacher_")
        if self.teacher is None and (self.teacher_network or self.teacher_predictor):
            raise UsageError("teacher_network and teacher_predictor describe a teacher, but --teacher names none")
        if self.teacher is None and self.teacher_train is not None:
            raise UsageError(f"teacher_train is {self.teacher_train!r}, but --teacher names none")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one run."""

    method_name: str = "mfef"
    networks: tuple[str, ...] = ()
    """The students, one name each: resnet32 timm/resnet18. Options behind a colon: resnet20:shortcut=A."""
    weights: tuple[str, ...] = field(default=(), metadata=MOVES | {"metavar": "STUDENT=FILE .."})
    """Weights that students begin with, student0=FILE: of torch.save or .safetensors, also of timm or torchvision; a
    classifier for other classes is drawn."""
    data: str = field(default="", metadata=COMMON)
    """The data set; options behind a colon: folder:resize=64."""
    data_dir: str | None = field(default=None, metadata=PLACE | COMMON | {"metavar": "PATH"})
    """Folder, archive or file that holds the data set."""
    train: TrainSettings = field(default_factory=TrainSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    teaching: TeacherSettings = field(default_factory=TeacherSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    """Settings of the method."""

    def augmentation(self, data: Dataset, training: Int[Tensor, " image"] | None = None) -> Augmentation:
        """Decide on the augmentation for a data set, of which the training images at positions are used; None: all."""
        transforms = self.augment.transforms(data, training, self.train.batch_size)
        return dataclasses.replace(self.train.augmentation(data), transforms=transforms)

    def in_precision(self, precision: Literal["float32", "bf16"]) -> "RunConfig":
        """Return the run with the precision that was chosen for it."""
        return dataclasses.replace(self, execution=dataclasses.replace(self.execution, precision=precision))

    def values(self) -> dict[str, Any]:
        """Return all settings by key, flat but for the method's."""
        method = {"name": self.method_name, **dataclasses.asdict(self.method)}
        found = {key: getattr(getattr(self, part) if part else self, key) for key, (part, _) in SETTINGS.items()}
        return {"method": method, **found}

    def as_mapping(self) -> dict[str, Any]:
        """Return what `config.json` and recipes hold: the settings as plain JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(self.values()))
        return plain


_PARTS = {
    "": RunConfig,
    "train": TrainSettings,
    "augment": AugmentSettings,
    "execution": ExecutionSettings,
    "teaching": TeacherSettings,
}
SETTINGS = {
    each.name: (part, each)
    for part, kind in _PARTS.items()
    for each in dataclasses.fields(kind)
    if each.name not in ("method_name", "method", *_PARTS)
}
"""All settings of a run but its method's, by key: the part of `RunConfig` that has the field, and the field."""
PLACES = tuple(key for key, (_, each) in SETTINGS.items() if each.metadata.get("place"))
"""Settings that do not affect results and may change on resume."""
MOVABLE = (*PLACES, *(key for key, (_, each) in SETTINGS.items() if each.metadata.get("moves")))
"""Settings that may change on resume: the places, and the teacher, which is known by the digest of its weights."""
SHARED = tuple(key for key, (_, each) in SETTINGS.items() if each.metadata.get("common"))
"""Settings that runs which train side by side have in common."""


def default_config(method_name: str) -> RunConfig:
    """Return the defaults of a method."""
    return RunConfig(method_name=method_name, method=METHODS[method_name].Settings())
