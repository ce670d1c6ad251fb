"""The identity of a run, wherever it is trained, and its name, which is a folder name."""

import collections
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.settings.config import PLACES, RunConfig

# What stands first in a name, and without the key in front of it.
NAMED_BY_VALUE = ("method.name", "networks", "data")
# What a sweep folder holds beside its runs, in lower case.
TAKEN = (
    *("comparison.csv", "comparison.html", "comparison.tex", "controls.json"),
    *("logs", "recipes", "slurm", "sweep.json", "table.json", "table.md"),
)


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the settings that make a run the run that it is: all by key, but places and devices."""
    mapping = config.as_mapping()
    method = {f"method.{key}": value for key, value in mapping.pop("method").items()}
    settings = {**method, **{key: value for key, value in mapping.items() if key not in PLACES}}
    places = [str(Path(each).absolute()) for each in config.teaching.teachers]
    settings["teacher"] = places if len(places) > 1 else next(iter(places), None)
    files = [each.partition("=") for each in settings["weights"]]
    settings["weights"] = [f"{name}={Path(file).absolute()}" for name, _, file in files]
    settings["init"] = settings["init"] and str(Path(settings["init"]).absolute())
    return settings


def digest(config: RunConfig) -> str:
    """Return the SHA-256 of a run's identity."""
    return hashlib.sha256(canonical(identity(config)).encode()).hexdigest()


def canonical(settings: Mapping[str, Any]) -> str:
    """Write settings so that equal ones are equal text."""
    return json.dumps(settings, sort_keys=True, default=str)


def differences(before: RunConfig, after: RunConfig) -> str:
    """List the settings in which two runs differ, with both values."""
    old, new = identity(before), identity(after)
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if before.method_name != after.method_name:  # its settings are others then
        changed = ["method.name", *(key for key in changed if not key.startswith("method."))]
    return ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)


def unique_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name settings by the values in which they differ; equal ones get equal names.

    Where two names would be one, a part of a hash is added.
    """
    keys = {key for each in settings for key in each}
    differing = {key for key in keys if len({canonical({"": each.get(key)}) for each in settings}) > 1}
    ordered = [key for key in NAMED_BY_VALUE if key in differing]
    ordered += sorted(differing - {*NAMED_BY_VALUE, "seed"}) + ["seed"] * ("seed" in differing)
    names = {}
    for each in settings:
        parts = [part(key, each[key]) for key in ordered if key in each]
        names[canonical(each)] = "-".join(parts)[:100] or str(each["method.name"])
    counts = collections.Counter(name.lower() for name in names.values())
    for text, name in names.items():
        if counts[name.lower()] > 1 or name.lower() in TAKEN:
            names[text] = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return [names[canonical(each)] for each in settings]


def part(key: str, value: Any) -> str:
    """Write a setting as a part of a folder name."""
    text = str(value)
    if isinstance(value, list):
        same = [(each, len(list(group))) for each, group in itertools.groupby(map(str, value))]
        text = "+".join(f"{each}x{count}" if count > 1 and key == "networks" else each for each, count in same)
    if key not in NAMED_BY_VALUE:
        text = f"seed{text}" if key == "seed" else f"{key.removeprefix('method.')}-{text}"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")
