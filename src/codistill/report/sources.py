"""From the folders that a comparison names to its groups: those of a sweep, or of runs with equal settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.core.errors import CheckpointError
from codistill.core.files import read_json
from codistill.report.groups import Group, Lost, Seen, coloured, grouped, seen_in
from codistill.runs.folder import RunFolder, runs_in

TABLE = "table.json"
"""What the folder of a sweep has, and no other one."""


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / TABLE).exists()


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """Return run folders: of each path itself, or where it is no run, those directly in it; each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        for each in runs_in(path) or [path]:
            found.setdefault(each.resolve(), each)
    return list(found.values())


def groups_of(paths: Sequence[Path]) -> list[Group]:
    """Return the groups of runs that folders hold.

    A sweep that stands alone has the groups, and the runs that never began, of its `table.json`; how a run ended is
    told by its own folder. Otherwise runs whose settings are equal but for the seed are one group.

    Raises:
        CheckpointError: No run has finished an epoch, or the files of a run or the table are damaged.
    """
    if len(paths) == 1 and is_sweep(paths[0]):
        groups = _sweep_groups(paths[0])
    else:
        groups = grouped([seen_in(RunFolder(path)) for path in run_folders(paths)])
    if not any(seen.rows for group in groups for seen in group.runs):
        raise CheckpointError(f"{paths[0]}: no run has finished an epoch: there is nothing to report yet")
    return groups


def _sweep_groups(folder: Path) -> list[Group]:
    try:
        rows: list[Mapping[str, Any]] = read_json(folder / TABLE)["runs"]
        names = [(str(row["name"]), str(row["group"]), str(row["reason"])) for row in rows]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / TABLE}: damaged: {type(error).__name__}: {error}") from None
    members: dict[str, tuple[list[Seen], list[Lost]]] = {}
    for name, group, reason in names:
        runs, lost = members.setdefault(group, ([], []))
        if not (folder / name).exists():
            lost.append(Lost(name, reason))
            continue
        try:
            runs.append(seen := seen_in(RunFolder(folder / name)))
            if not seen.finished:
                lost.append(Lost(name, reason or seen.ending))
        except CheckpointError as error:
            lost.append(Lost(name, reason or str(error)))
    return coloured([(name, runs, lost) for name, (runs, lost) in members.items()])
