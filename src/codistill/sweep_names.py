"""Names of runs of a sweep, made of the values in which they differ; each is a folder name."""

import collections
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from codistill.sweep_identity import canonical

# What stands first in a name, and without the key in front of it.
NAMED_BY_VALUE = ("method.name", "networks", "data")
# What a sweep folder holds beside its runs, in lower case.
TAKEN = ("logs", "recipes", "table.json", "table.md")


def unique_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name settings by the values in which they differ; where two names would be one, a part of a hash is added.

    Args:
        settings: Equal ones get equal names.
    """
    keys = {key for each in settings for key in each}
    differing = {key for key in keys if len({canonical({"": each.get(key)}) for each in settings}) > 1}
    ordered = [key for key in NAMED_BY_VALUE if key in differing]
    ordered += sorted(differing - {*NAMED_BY_VALUE, "seed"}) + ["seed"] * ("seed" in differing)
    names = []
    for each in settings:
        parts = [part(key, each[key]) for key in ordered if key in each]
        names.append("-".join(parts)[:100] or str(each["method.name"]))
    counts = collections.Counter(name.lower() for name in names)
    return [
        f"{name}-{hashlib.sha256(canonical(each).encode()).hexdigest()[:8]}"
        if counts[name.lower()] > 1 or name.lower() in TAKEN
        else name
        for name, each in zip(names, settings, strict=True)
    ]


def part(key: str, value: Any) -> str:
    """Write a setting as a part of a folder name."""
    if isinstance(value, list):
        same = [(each, len(list(group))) for each, group in itertools.groupby(map(str, value))]
        text = "+".join(f"{each}x{count}" if count > 1 and key == "networks" else each for each, count in same)
    else:
        text = str(value)
    if key not in NAMED_BY_VALUE:
        text = f"seed{text}" if key == "seed" else f"{key.removeprefix('method.')}-{text}"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")
