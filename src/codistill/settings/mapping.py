"""Settings from the mappings that recipes, config.json and cards of exported files hold: checked and typed once."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches
from codistill.methods import METHODS
from codistill.settings.config import GROUPS, RECORDED_KEYS, RunConfig, default_config

T = TypeVar("T")
OWN_KEYS = ("networks", "data", "data_dir")
Where = Callable[[str], str]
"""The place of a key, for error lines: `recipe FILE:3`."""


def run_from_mapping(
    mapping: Mapping[str, Any], where: Where, method: str | None = None, base: RunConfig | None = None
) -> RunConfig:
    """Make a run of a mapping as `RunConfig.as_mapping` returns it; what it leaves out has its default.

    Args:
        mapping: Settings by key. `method` is a name or a table of a name and settings; keys that only config.json has
            are passed over.
        where: The place of a key.
        method: The method where the mapping names none; None: mfef.
        base: The defaults; None: those of the method.

    Raises:
        UsageError: An unknown key or method, or a value that a setting cannot have; says where.
    """
    name, settings = split_method(mapping.get("method", {}), where)
    if name is None and settings and method is None:
        raise UsageError(f'{where("method")}: settings of a method need its name: name = "mfef"')
    base = base or default_config(name or method or "mfef")
    flat = flat_part(mapping, where)
    groups = {group: {field.name for field in dataclasses.fields(kind)} for group, kind in GROUPS.items()}
    changes: dict[str, Any] = {
        group: from_mapping(getattr(base, group), {key: value for key, value in flat.items() if key in keys}, where)
        for group, keys in groups.items()
    }
    changes["method"] = from_mapping(base.method, settings, where, prefix="method.")
    changes |= {key: value for key, value in typed(RunConfig, flat, where).items() if key in OWN_KEYS}
    return dataclasses.replace(base, **changes)


def flat_part(mapping: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """Return the settings of a run that are not its method's.

    Raises:
        UsageError: An unknown key.
    """
    flat = {key: value for key, value in mapping.items() if key != "method" and key not in RECORDED_KEYS}
    known = [*OWN_KEYS, *(field.name for kind in GROUPS.values() for field in dataclasses.fields(kind))]
    for key in flat:
        if key not in known:
            raise UsageError(f"{where(key)}: unknown key {shown(key)}: {near_matches(key, known)}")
    return flat


def refuse_untyped(mapping: Mapping[str, Any], where: Where) -> None:
    """Refuse unknown keys and values of a wrong type in a run's mapping, whatever else may be wrong with the values.

    Raises:
        UsageError: Says where.
    """
    name, settings = split_method(mapping.get("method", {}), where)
    flat = flat_part(mapping, where)
    for kind in (RunConfig, *GROUPS.values()):
        typed(kind, flat, where)
    kind = METHODS[name or "mfef"].Settings
    refuse_unknown(kind, settings, where)
    typed(kind, settings, where, "method.")


def refuse_unknown(kind: Any, mapping: Mapping[str, Any], where: Where) -> None:
    """Refuse keys that a dataclass of settings does not have.

    Raises:
        UsageError: Says where, and which keys come close.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    for key in mapping:
        if key not in names:
            raise UsageError(f"{where(key)}: unknown key {shown(key)}: {near_matches(key, names)}")


def split_method(method: Any, where: Where) -> tuple[str | None, dict[str, Any]]:
    """Split what a mapping says of the method into its name, if it is there, and its settings.

    Raises:
        UsageError: Neither a name nor a table, or an unknown method.
    """
    key = "method" if isinstance(method, str) else "name"
    table = {"name": method} if isinstance(method, str) else method
    if not isinstance(table, dict) or not isinstance(table.get("name", ""), str):
        raise UsageError(f'{where("method")}: method must be a name, or a table with a name: [method] name = "mfef"')
    name = table.get("name")
    if name is not None and name not in METHODS:
        raise UsageError(f"{where(key)}: unknown method {shown(name)}: {near_matches(name, METHODS)}")
    return name, {key: value for key, value in table.items() if key != "name"}


def from_mapping(base: T, mapping: Mapping[str, Any], where: Where, prefix: str = "") -> T:
    """Return settings with the values of a mapping in place of their own.

    Args:
        base: An instance of a dataclass of settings.
        mapping: New values by field.
        where: The place of a key.
        prefix: What stands before a key in error lines.

    Raises:
        UsageError: An unknown key, or a value that the field cannot have; says where.
    """
    kind: Any = type(base)
    refuse_unknown(kind, mapping, where)
    changes = typed(kind, mapping, where, prefix)
    try:
        return dataclasses.replace(base, **changes)  # type: ignore[type-var]
    except UsageError as error:
        found = re.match(r"(?:method\.)?(\w+)", str(error))
        raise UsageError(f"{where(found[1])}: {error}" if found and found[1] in mapping else str(error)) from None


def typed(kind: type, mapping: Mapping[str, Any], where: Where, prefix: str = "") -> dict[str, Any]:
    """Turn the values of a mapping into those of a dataclass's fields; keys of other fields are passed over.

    Raises:
        UsageError: A value of another type.
    """
    types = get_type_hints(kind)
    found = {}
    for key, value in mapping.items():
        if key in types:
            if not fits(value, types[key]):
                raise UsageError(f"{where(key)}: {prefix}{key} is {shown(value)}; it must be {describe(types[key])}")
            found[key] = converted(value, types[key])
    return found


def converted(value: Any, kind: Any) -> Any:
    """Turn a value that fits a type into one of it: lists into tuples, whole numbers into floats."""
    alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if float in alternatives and int not in alternatives and type(value) is int:
        return float(value)
    if any(get_origin(each) is tuple for each in alternatives) and value is not None:
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML or JSON file is one of a type; whole numbers are also numbers."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        several = value if isinstance(value, (list, tuple)) else [value]
        return all(fits(each, get_args(kind)[0]) for each in several)
    if kind is str:  # what a command line and a file name can hold
        return isinstance(value, str) and "\0" not in value and value.encode(errors="ignore").decode() == value
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    """Return in words what values a type has."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(each) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return {int: "a list of whole numbers", str: "a list of names"}[get_args(kind)[0]]
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def shown(value: Any) -> str:
    """Return a value from a file for an error line: short, and without line breaks."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number too large to write"
    return text if len(text) <= 80 else f"{text[:77]}..."
