"""Which folder each run of a sweep has, and which runs share a process."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from codistill.core.errors import CodistillError, UsageError
from codistill.methods import METHODS
from codistill.runs.folder import RunFolder
from codistill.settings.config import RunConfig
from codistill.sweeps.naming import differences, digest
from codistill.sweeps.spec import PlannedRun
from codistill.training.fleet import shared

# How many runs one process gets at most: each holds a file open, and has its networks on the host.
LARGEST_SHARE = 64


def find_folders(folder: Path, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Name runs by the folders that they have, whatever the spec called them when they were started."""
    found: dict[str, RunConfig] = {}
    for path in sorted(folder.glob("*/config.json")):
        with contextlib.suppress(CodistillError):  # a damaged one keeps its name, and its process reports the damage
            found[path.parent.name] = RunFolder(path.parent).asked
    digests = {name: digest(config) for name, config in found.items()}
    names: dict[str | None, str] = {key: name for name, key in reversed(digests.items())}
    named: dict[str, PlannedRun] = {}
    for run in runs:
        key = digest(run.config) if run.config else digests.get(run.name)
        name = run.name if key == digests.get(run.name) else names.get(key, run.name)
        if run.config and digests.get(name, key) != key:
            changed = differences(found[name], run.config)
            raise UsageError(f"{folder / name} holds a run with other settings: {changed}: choose another --out")
        if name in named:
            raise UsageError(f"{folder / name} would be the folder of two runs of the spec: choose another --out")
        named[name] = dataclasses.replace(run, name=name)
    return list(named.values())


def assign(runs: Sequence[PlannedRun], slots: int, side_by_side: bool | None) -> list[list[PlannedRun]]:
    """Return the runs of each process: runs with equal keys share processes, dealt out to the slots."""
    groups: dict[str, list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault(group_key(run, side_by_side), []).append(run)
    dealt: list[list[PlannedRun]] = []
    for group in groups.values():
        count = min(len(group), max(slots, math.ceil(len(group) / LARGEST_SHARE)))
        dealt += [group[number::count] for number in range(count)]
    return dealt


def group_key(run: PlannedRun, side_by_side: bool | None) -> str:
    """Return the key of a run: runs with equal keys may share a process."""
    assert run.config is not None
    if side_by_side is None:
        cuda = run.config.execution.device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
        side_by_side = cuda and METHODS[run.config.method_name].capturable
    return json.dumps(shared(run.config)) if side_by_side else run.name
