"""The kinds of values that settings have, as in a file or in Python."""

import contextlib
import os
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches


def take_kinds(settings: Any, prefix: str = "") -> None:
    """Convert the values of settings that a program made as those of a file; numbers of NumPy and paths are taken too.

    Args:
        settings: A dataclass.
        prefix: What errors write before the names.

    Raises:
        UsageError: A value of another kind, or none of the choices. Percentages are left to the settings themselves.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        value = value.item() if isinstance(value, np.generic) else value
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        try:
            value = convert(value, kind)
        except TypeError:
            if get_origin(kind) is Literal:
                raise UsageError(f"{prefix}{name} is {value!r}: {near_matches(str(value), get_args(kind))}") from None
            raise UsageError(f"{prefix}{name} is {shown(value)}; it must be {describe(kind)}") from None
        object.__setattr__(settings, name, value)


def convert(value: Any, kind: Any) -> Any:
    """Return a TOML or JSON value as one of a type (lists as tuples, whole numbers as floats) or raise TypeError."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        for each in get_args(kind):
            with contextlib.suppress(TypeError):
                return convert(value, each)
    elif origin is Literal:
        if value in get_args(kind):
            return value
    elif origin is tuple:
        several = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(each, get_args(kind)[0]) for each in several)
    elif kind is str and isinstance(value, str):  # as a command line and a file name can hold it
        with contextlib.suppress(UnicodeEncodeError):
            if b"\0" not in os.fsencode(value):
                return value
    elif kind in (int, float) and type(value) is int:
        if abs(value) < 2**63:
            return kind(value)
    elif type(value) is kind:
        return value
    raise TypeError


def describe(kind: Any) -> str:
    """Return in words which values a type has."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if int in inner and str in inner:
            return "a whole number, or a percentage between 0 and 100 as 20%"
        return " or ".join(describe(each) for each in inner if each is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        return {int: "a list of whole numbers", str: "a list of names"}.get(inner[0], "a list")
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))


def shown(value: Any) -> str:
    """Return a value from a file for an error line: short, and without line breaks."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number too large to write"
    return text if len(text) <= 80 else f"{text[:77]}..."
