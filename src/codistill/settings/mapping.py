"""Settings from the mappings that recipes, config.json and cards of exported files hold: checked and typed once."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from codistill.core.errors import UsageError
from codistill.core.kinds import convert, describe, shown
from codistill.core.registry import near_matches, unknown_name
from codistill.methods import METHODS
from codistill.settings.config import SETTINGS, RunConfig, default_config
from codistill.settings.removed import VALUES, instead

T = TypeVar("T")
Where = Callable[[str], str]
"""The place of a key, for error lines: `recipe FILE:3`."""
# What config.json holds beside the run itself.
RECORDED_KEYS: tuple[str, ...] = ("codistill", "environment", "dataset", "teacher_sha256", "own_method", "imports")
RECORDED_KEYS += ("extended", "own_loop", "initial_weights", "asked")


def run_from_mapping(mapping: Mapping[str, Any], where: Where, base: RunConfig | None = None) -> RunConfig:
    """Make a run of a mapping as `RunConfig.as_mapping` returns it.

    Args:
        mapping: Settings by key. `method` is a name or a table of a name and settings; keys that only config.json has
            are ignored.
        where: The place of a key.
        base: Values of what the mapping leaves out; None: the method's defaults.

    Raises:
        UsageError: An unknown key or method, or a value that a setting cannot have; says where.
    """
    values = typed_mapping(mapping, where)
    settings = values.pop("method")
    base = base or default_config(settings.pop("name", "mfef"))
    parts: dict[str, dict[str, Any]] = {part: {} for part, _ in SETTINGS.values()} | {"method": settings}
    for key, value in values.items():
        parts[SETTINGS[key][0]][key] = value
    own = parts.pop("")
    changes = {part: _changed(getattr(base, part), changes, where) for part, changes in parts.items()}
    return dataclasses.replace(base, **own, **changes)


def typed_mapping(mapping: Mapping[str, Any], where: Where, method: str | None = None) -> dict[str, Any]:
    """Return a run's mapping with values of the settings' types, whatever else may be wrong with them."""
    name, settings = split_method(mapping.get("method", {}), where)
    if settings and not (name or method):
        raise UsageError(f'{where("method")}: settings of a method need its name: name = "mfef"')
    run = {key: value for key, value in mapping.items() if key != "method" and key not in RECORDED_KEYS}
    _refuse_unknown(run, SETTINGS, where)
    kinds = get_type_hints(METHODS[name or method or "mfef"].Settings)
    _refuse_unknown(settings, kinds, where)
    typed = {key: _typed(key, value, SETTINGS[key][1].type, where(key)) for key, value in run.items()}
    inner = {key: _typed(f"method.{key}", value, kinds[key], where(key)) for key, value in settings.items()}
    return {**typed, "method": {"name": name, **inner} if name else inner}


def split_method(method: Any, where: Where) -> tuple[str | None, dict[str, Any]]:
    """Split what a mapping says of the method into its name, if it is there, and its settings."""
    key = "method" if isinstance(method, str) else "name"
    table = {"name": method} if isinstance(method, str) else method
    if not isinstance(table, dict) or not isinstance(table.get("name", ""), str):
        raise UsageError(f'{where("method")}: method must be a name, or a table with a name: [method] name = "mfef"')
    name = table.get("name")
    if name is not None and name not in METHODS:
        raise UsageError(f"{where(key)}: {unknown_name('method', name, METHODS)}")
    return name, {key: value for key, value in table.items() if key != "name"}


def _refuse_unknown(mapping: Mapping[str, Any], known: Iterable[str], where: Where) -> None:
    for key in mapping:
        if key not in known:
            if text := instead(key):
                raise UsageError(f"{where(key)}: {key} {text}")
            raise UsageError(f"{where(key)}: unknown key {shown(key)}: {near_matches(key, known)}")


def _changed(settings: T, changes: Mapping[str, Any], where: Where) -> T:
    try:
        return dataclasses.replace(settings, **changes)  # type: ignore[type-var]
    except UsageError as error:  # it begins with the name of the setting
        found = re.match(r"(?:method\.)?(\w+)", str(error))
        raise UsageError(f"{where(found[1])}: {error}" if found and found[1] in changes else str(error)) from None


def _typed(key: str, value: Any, kind: Any, where: str) -> Any:
    try:
        return convert(value, kind)
    except TypeError:
        now = VALUES.get((key, value)) if isinstance(value, bool) else None
        use = f"; in place of {str(value).lower()} write {now!r}" if now else ""
        raise UsageError(f"{where}: {key} is {shown(value)}; it must be {describe(kind)}{use}") from None


LISTS = tuple(key for key, (_, field) in SETTINGS.items() if describe(field.type).startswith("a list"))
"""Settings that are lists themselves."""
