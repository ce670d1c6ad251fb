"""What makes a run of a sweep the run that it is, whatever it is called and wherever it is trained."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codistill.config import PLACES, RunConfig


def identity(config: RunConfig) -> dict[str, Any]:
    """Give what makes a run the run that it is: all settings by key, but places and devices."""
    mapping = config.as_mapping()
    method = {f"method.{key}": value for key, value in mapping.pop("method").items()}
    settings = {**method, **{key: value for key, value in mapping.items() if key not in PLACES}}
    if settings["teacher"] is not None:
        settings["teacher"] = str(Path(settings["teacher"]).absolute())
    return settings


def digest(config: RunConfig) -> str:
    """Give the SHA-256 of a run's identity."""
    return hashlib.sha256(canonical(identity(config)).encode()).hexdigest()


def canonical(settings: Mapping[str, Any]) -> str:
    """Write settings so that equal ones are equal text."""
    return json.dumps(settings, sort_keys=True, default=str)


def differences(before: RunConfig, after: RunConfig) -> str:
    """Say in which settings two runs differ."""
    old, new = identity(before), identity(after)
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if before.method_name != after.method_name:  # its settings are others then
        changed = ["method.name", *(key for key in changed if not key.startswith("method."))]
    return ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)
