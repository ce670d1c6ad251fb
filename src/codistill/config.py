"""A whole run as one frozen value: TOML recipes, JSON and command lines in, JSON out."""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from codistill.data.augment import Augmentation, PaddingMode
from codistill.data.dataset import Dataset
from codistill.errors import UsageError
from codistill.methods import METHODS, MethodSettings
from codistill.registry import near_matches

Precision = Literal["float32", "bf16"]
# For counts without a bound of their own.
LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a method is trained, whatever it is; the defaults are MFEF's recipe."""

    epochs: int = 300
    """How often each training image is seen."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=("-b",))] = 128
    """Images per step, at least 2."""
    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch (other images in each epoch)."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=("--lr",))] = 0.1
    """Initial learning rate of SGD."""
    momentum: float = 0.9
    """Momentum, from 0 to below 1."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: Annotated[float, tyro.conf.arg(aliases=("--wd",))] = 1e-4
    """L2 factor on all parameters of the students; a method's own modules may have another."""
    milestones: tuple[int, ...] | None = None
    """Epochs at which the learning rate is multiplied by learning_rate_decay. None: at 1/2 and 3/4 of the epochs."""
    learning_rate_decay: float = 0.1
    """Factor on the learning rate at each milestone."""
    padding: int = 4
    """Pixels around a training image before a random crop of its size; 0: no crop."""
    padding_mode: PaddingMode = "zeros"
    """What is in the padding: black, or the image reflected."""
    flip: bool | None = None
    """Mirror half of the training images. None: where the data set says that a mirrored image keeps its label."""
    train_limit: int | None = None
    """Use only the first so many training images of the seeded order."""
    validation: int = 0
    """Hold out so many training images, the last of the seeded order, to choose the best epoch by."""
    seed: int = 0
    """Seed of initial weights, order, crops, flips and splits."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: cuda where there is one."""
    precision: Precision = "float32"
    """float32, or bf16: autocast with float32 weights, batch statistics and losses."""
    deterministic: bool = False
    """On CUDA, use only algorithms that repeat to the last bit, which costs speed; a CPU always does."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile compiles the students' stages, heads and modules (the first step then takes about a
    minute, later runs less). auto: on CUDA in bf16, for networks for which it was measured faster and runs that are
    long enough to pay it back."""
    kernels: Literal["stock", "fused"] = "stock"
    """What computes batch normalisation with the addition and the ReLU behind it: PyTorch, or on CUDA two own kernels
    forward and two backward. Kept only if measured faster; not yet measured."""
    threads: int | None = None
    """CPU threads. None: torch's choice, one for each core, or fewer in a container that may use less. Results repeat
    to the last bit for one number of threads."""
    processes: int = 1
    """Processes that share each batch, on CUDA with a GPU each; batch statistics are those of a process's part."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, LARGEST),
            ("batch_size", 2, LARGEST),
            ("learning_rate_decay", 0, 1),
            ("weight_decay", 0, 1),
            ("padding", 0, LARGEST),
            ("train_limit", 1, LARGEST),
            ("validation", 0, LARGEST),
            ("seed", 0, 2**32 - 1),
            ("threads", 1, 1024),
            ("processes", 1, 1024),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bound = f"at least {low}" if high == LARGEST and value < low else f"from {low} to {high}"
                raise UsageError(f"{name} is {value}; it must be {bound}")
        for name in ("compile", "kernels"):
            value, choices = getattr(self, name), get_args(get_type_hints(type(self))[name])
            if value not in choices:
                raise UsageError(f"{name} is {value!r}: {near_matches(str(value), choices)}")
        if self.compile == "on" and self.kernels == "fused":
            raise UsageError("compile on and kernels fused: the compiler cannot look into own kernels: choose one")
        if self.batch_size < 2 * self.processes:
            raise UsageError(
                f"batch_size is {self.batch_size}; {self.processes} processes need at least {2 * self.processes}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be a number above 0")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum is {self.momentum}; it must be from 0 to below 1")
        steps = self.milestones or ()
        if list(steps) != sorted(set(steps)) or any(not 0 < step < self.epochs for step in steps):
            raise UsageError(f"milestones are {list(steps)}; they must rise and lie between 1 and epochs - 1")

    @property
    def learning_rate_steps(self) -> tuple[int, ...]:
        """Epochs at which the learning rate falls."""
        if self.milestones is not None:
            return self.milestones
        return math.ceil(self.epochs / 2), math.ceil(self.epochs * 3 / 4)

    def augmentation(self, data: Dataset) -> Augmentation:
        """Decide on crops and flips for a data set.

        Raises:
            UsageError: More padding than the images have pixels.
        """
        smallest = min(data.image_size)
        if self.padding_mode == "reflect" and self.padding >= smallest:
            raise UsageError(f"padding is {self.padding}, but reflection needs less than {smallest} pixels")
        if self.padding > smallest:
            raise UsageError(f"padding is {self.padding}, but images of {smallest} pixels leave room for {smallest}")
        flip = data.flip if self.flip is None else self.flip
        return Augmentation(padding=self.padding, padding_mode=self.padding_mode, flip=flip)


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """A frozen teacher: kd needs one, other methods may have one beside the students' own exchange."""

    teacher: str | None = None
    """A run folder, a .safetensors file that export wrote, or a checkpoint with teacher_network."""
    teacher_predictor: str | None = None
    """Which predictor of a run folder teaches. None: its best student."""
    teacher_network: str | None = None
    """The network whose weights a checkpoint holds: {"model": weights} as of RepDistiller or mdistiller."""
    teacher_weight: float = 1.0
    """Factor on the teacher's terms."""
    teacher_temperature: float = 3.0
    """T of the teacher's terms, > 0; they are multiplied by T^2."""

    def __post_init__(self) -> None:
        if not 0 < self.teacher_temperature < math.inf:
            raise UsageError(f"teacher_temperature is {self.teacher_temperature}; it must be a number above 0")
        if not 0 <= self.teacher_weight < math.inf:
            raise UsageError(f"teacher_weight is {self.teacher_weight}; it must be a number, at least 0")
        if self.teacher is None and (self.teacher_network or self.teacher_predictor):
            raise UsageError("teacher_network and teacher_predictor say more of a teacher, but --teacher names none")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: what is trained, how, on what."""

    method_name: Annotated[str, tyro.conf.Suppress] = "mfef"
    networks: tuple[str, ...] = ()
    """The students, one name each: resnet32 wrn-16-2. Options behind a colon: resnet20:shortcut=A."""
    data: str = ""
    """The data set; options behind a colon: folder:resize=64."""
    data_dir: str | None = None
    """Folder, archive or file that holds the data set."""
    train: Annotated[TrainSettings, tyro.conf.arg(name="")] = field(default_factory=TrainSettings)
    teaching: Annotated[TeacherSettings, tyro.conf.arg(name="")] = field(default_factory=TeacherSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    """Settings of the method."""

    def as_mapping(self) -> dict[str, Any]:
        """Give what `config.json` and recipes hold: plain JSON types, flat but for the method's settings."""
        mapping: dict[str, Any] = {"method": {"name": self.method_name, **dataclasses.asdict(self.method)}}
        mapping |= {"networks": self.networks, "data": self.data, "data_dir": self.data_dir}
        mapping |= dataclasses.asdict(self.train) | dataclasses.asdict(self.teaching)
        plain: dict[str, Any] = json.loads(json.dumps(mapping))
        return plain


# Where a run finds things and what it computes on: they do not belong to the experiment, and may change on the way.
PLACES = ("data_dir", "device", "threads")
# What config.json holds beside the run itself.
RECORDED_KEYS = ("codistill", "environment", "dataset")


def default_config(method_name: str) -> RunConfig:
    """Give the defaults of a method."""
    return RunConfig(method_name=method_name, method=METHODS[method_name].Settings())


def read_recipe(path: Path) -> tuple[str | None, list[str]]:
    """Read a TOML recipe, or a run's config.json, as the command line that it stands for.

    Args:
        path: The file.

    Returns:
        The method's name, where the file says one, and flags with their values.

    Raises:
        UsageError: Unreadable, not TOML or JSON, or with an unknown key; names the line.
    """
    mapping, text = read_table(path, "recipe")

    def where(key: str) -> str:
        return place_in_recipe(path, text, key)

    method = mapping.pop("method", {})
    key_of_name = "method" if isinstance(method, str) else "name"
    method = {"name": method} if isinstance(method, str) else method
    if not isinstance(method, dict) or not isinstance(method.get("name", ""), str):
        raise UsageError(f'{where("method")}: method must be a name, or a table with a name: [method] name = "mfef"')
    name = method.pop("name", None)
    if name is not None and name not in METHODS:
        raise UsageError(f"{where(key_of_name)}: unknown method {shown(name)}: {near_matches(name, METHODS)}")
    return name, mapping_arguments(mapping, method, name, where)


def read_table(path: Path, kind: str) -> tuple[dict[str, Any], str]:
    """Read a TOML or JSON file.

    Args:
        path: The file.
        kind: What it is, for error lines.

    Returns:
        Its contents, parsed and as text.

    Raises:
        UsageError: Unreadable, not TOML or JSON, or JSON of something else than a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
        mapping = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{kind} {path}: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise UsageError(f"{kind} {path}: must be a table of settings")
    return mapping, text


def place_in_recipe(path: Path, text: str, key: str) -> str:
    """Say in which file and, where it can be found, in which line a key stands."""
    found = re.search(rf'^[ \t{{]*\[?"?{re.escape(key)}\b', text, flags=re.MULTILINE)
    return f"recipe {path}:{text.count(chr(10), 0, found.start()) + 1}" if found else f"recipe {path}"


def with_place(error: UsageError, path: Path, method_name: str, arguments: Sequence[str]) -> UsageError:
    """Add the line of a recipe to an error about a setting, if the recipe alone has the same one.

    Args:
        error: What was wrong with the whole command line.
        path: The recipe.
        method_name: The method.
        arguments: The flags that the recipe stands for.
    """
    found = re.match(r"(?:method\.)?(\w+) (?:is|are) ", str(error))
    try:
        parse_config(method_name, arguments)
    except UsageError as alone:
        if found and str(alone) == str(error):
            return UsageError(f"{place_in_recipe(path, path.read_text(encoding='utf-8'), found[1])}: {error}")
    return error


def mapping_arguments(
    mapping: Mapping[str, Any], method: Mapping[str, Any], name: str | None, where: Callable[[str], str]
) -> list[str]:
    """Write settings as command-line flags.

    Args:
        mapping: Settings of the run by key.
        method: Settings of the method by key.
        name: The method's name, where it is known.
        where: Says where a key stands, for error lines.

    Raises:
        UsageError: A key that no setting has.
    """
    types = {**get_type_hints(TrainSettings), **get_type_hints(TeacherSettings)}
    types |= {key: kind for key, kind in get_type_hints(RunConfig).items() if key in ("networks", "data", "data_dir")}
    arguments: list[str] = []
    for key, value in mapping.items():
        if key not in RECORDED_KEYS:
            arguments += _flag(key, value, types, where(key))
    if method:
        if name is None:
            raise UsageError(f'{where("method")}: settings of a method need its name: name = "mfef"')
        types = get_type_hints(METHODS[name].Settings)
        for key, value in method.items():
            arguments += _flag(key, value, types, where(key), "method.")
    return arguments


def _flag(key: str, value: Any, types: Mapping[str, Any], where: str, prefix: str = "") -> list[str]:
    if key not in types:
        raise UsageError(f"{where}: unknown key {shown(key)}: {near_matches(key, types)}")
    if not fits(value, types[key]):
        raise UsageError(f"{where}: {prefix}{key} is {shown(value)}; it must be {describe(types[key])}")
    flag = f"--{prefix}{key.replace('_', '-')}"
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)]
    if types[key] is bool:
        return [flag if value else f"--{prefix}no-{key.replace('_', '-')}"]
    return [f"{flag}={value}"]


def fits(value: Any, kind: Any) -> bool:
    """Say whether a value of a TOML or JSON file is one of a type; whole numbers are also numbers."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        several = value if isinstance(value, (list, tuple)) else [value]
        # A name with a dash in front would be read as a flag.
        return all(fits(each, get_args(kind)[0]) and (type(each) is int or each[:1] != "-") for each in several)
    if kind is str:  # what a command line and a file name can hold
        return isinstance(value, str) and "\0" not in value and value.encode(errors="ignore").decode() == value
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    """Say in words what values a type has."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(each) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return {int: "a list of whole numbers", str: "a list of names"}[get_args(kind)[0]]
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def shown(value: Any) -> str:
    """Write a value from a file for an error line: short, and without line breaks."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number too large to write"
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_config(method_name: str, arguments: Sequence[str], prog: str = "codistill train METHOD") -> RunConfig:
    """Parse flags into a run, starting from the defaults of a method; later flags win.

    Raises:
        UsageError: An unknown flag or a value that it does not take, in one line.
    """
    parsed, unknown = parse_flags(RunConfig, arguments, default_config(method_name), prog)
    if unknown:
        raise UsageError(unknown_option(unknown[0], setting_names(method_name), prog))
    assert isinstance(parsed, RunConfig)
    return parsed


def setting_names(method_name: str) -> list[str]:
    """List the settings of a run with a method, as their flags are named."""
    names = [name for name in RunConfig().as_mapping() if name != "method"]
    return names + [f"method.{each.name}" for each in dataclasses.fields(METHODS[method_name].Settings)]


def unknown_option(flag: str, known: Iterable[str], command: str) -> str:
    """Say that a command has no such option, and which ones come close."""
    flags = [f"--{name.replace('_', '-')}" for name in known]
    close = difflib.get_close_matches(flag.partition("=")[0].replace("_", "-"), flags, n=3, cutoff=0.6)
    mend = f"did you mean {' or '.join(close)}?" if close else f"{command} --help lists them"
    return f"{command}: unknown option {flag}: {mend}"


def parse_flags(kind: Any, arguments: Sequence[str], default: Any, prog: str) -> tuple[Any, list[str]]:
    """Let tyro read flags into a dataclass, and give what it did not know.

    Raises:
        UsageError: What tyro found wrong, its box of several lines folded into one.
    """
    complaint = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(kind, args=list(arguments), prog=prog, return_unknown_args=True, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in complaint.getvalue().splitlines()]
        said = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
        raise UsageError(f"{prog}: {said.partition('Argument helptext')[0].strip()}") from None
    return parsed, list(unknown)
