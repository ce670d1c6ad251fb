"""Settings as flags of the command line: written from what a file holds, and parsed."""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from codistill.config import RECORDED_KEYS, RunConfig, TeacherSettings, TrainSettings, default_config
from codistill.errors import UsageError
from codistill.methods import METHODS
from codistill.registry import near_matches

T = TypeVar("T")


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


def options(kind: type[T], arguments: Sequence[str], command: str) -> T:
    """Parse the flags of a command.

    Raises:
        UsageError: In one line.
    """
    parsed, unknown = parse_flags(kind, arguments, None, command)
    if unknown:
        raise UsageError(unknown_option(unknown[0], (field.name for field in dataclasses.fields(kind)), command))  # type: ignore[arg-type]
    assert isinstance(parsed, kind)
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
        once = re.sub(r"^(.+?) (\1)\b", r"\2", said, flags=re.IGNORECASE)  # what the box's title and its text both say
        raise UsageError(f"{prog}: {once.partition('Argument helptext')[0].strip()}") from None
    return parsed, list(unknown)


def has_flag(arguments: Sequence[str], flag: str) -> bool:
    """Say whether a flag that takes a value was given, as `--flag value` or `--flag=value`."""
    return any(argument.partition("=")[0] == flag for argument in arguments)


def flag_value(arguments: Sequence[str], flag: str) -> str:
    """Give the value of a flag that was given; of the last one, if it was given twice."""
    found = ""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            found = value if equals else next(iter(arguments[index + 1 :]), "")
    return found
