"""Settings as flags of the command line: written from what a file holds, and parsed."""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import tyro

from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.settings.config import RunConfig, default_config

T = TypeVar("T")


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
