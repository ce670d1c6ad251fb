"""The folder of a sweep: held by one process at a time, and searched for the folders that its runs have."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from codistill.core.errors import CodistillError, UsageError
from codistill.deploy.run import Run
from codistill.runs.lock import RunLock
from codistill.settings.config import RunConfig
from codistill.sweeps.naming import differences, digest
from codistill.sweeps.spec import PlannedRun


def held(folder: Path) -> RunLock:
    """Make the folder of a sweep and hold it.

    Raises:
        UsageError: It cannot be made, is a run folder, or another process holds it.
    """
    if (folder / "config.json").exists():
        raise UsageError(f"sweep folder {folder} is a run folder: choose another --out")
    try:
        for each in ("logs", "recipes"):
            (folder / each).mkdir(parents=True, exist_ok=True)
        return RunLock(folder)
    except OSError as error:
        raise UsageError(f"sweep folder {folder}: {error.strerror}: choose another --out") from None


def find_folders(folder: Path, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Name runs by the folders that they have, whatever the spec called them when they were begun.

    Raises:
        UsageError: The folder of one holds another run, or would be that of two.
    """
    found: dict[str, RunConfig] = {}
    for path in sorted(folder.glob("*/config.json")):
        with contextlib.suppress(CodistillError):  # a damaged one keeps its name, and its process says what is wrong
            found[path.parent.name] = Run(path.parent).config
    names = {digest(config): name for name, config in reversed(found.items())}
    named: list[PlannedRun] = []
    for run in runs:
        name = run.name
        if run.config is not None and (name not in found or digest(found[name]) != digest(run.config)):
            name = names.get(digest(run.config), name)
            if name in found and name == run.name:
                raise UsageError(
                    f"{folder / name} holds a run with other settings: {differences(found[name], run.config)}: "
                    "choose another --out, or remove that folder"
                )
        if name in {each.name for each in named}:
            raise UsageError(f"{folder / name} would be the folder of two runs of the spec: choose another --out")
        named.append(dataclasses.replace(run, name=name))
    return named
