"""The ledger: one line of JSON a finished run, each with its own SHA-256; lines are only ever appended."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.core.errors import CheckpointError, UsageError
from codistill.core.files import system_error
from codistill.core.source import source
from codistill.runs.folder import RunFolder
from codistill.sweeps.naming import canonical
from codistill.sweeps.reproduce.cells import (
    Cell,
    Protocol,
    completed,
    contents,
    differing,
    digest_of,
    protocols,
    resolved,
    tables,
)
from codistill.sweeps.reproduce.data import data_name

# What a line has, and of which type.
FORM: dict[str, type] = {
    **{"protocol": str, "seed": int, "precision": str, "settings_sha256": str, "settings": dict, "data_sha256": dict},
    **{"epochs": int, "best_epoch": int, "best_student": str, "chosen_by": str, "commit": str},
    **{"top1_error": dict, "best_epoch_top1_error": dict, "validation_top1_error": dict, "parameters": dict},
    **{"environment": dict, "train_seconds": float, "wall_seconds": float},
}
TEACHER = "teacher"
"""Column of the cell that a teacher is."""
SAME = ("epochs", "best_epoch", "best_student", "chosen_by", "top1_error", "best_epoch_top1_error", "parameters")
"""What a line has as summary.json has it."""


@dataclass(frozen=True)
class Entry:
    """A finished run: the contents of its line, and where that or the run is."""

    line: Mapping[str, Any]
    place: str

    @functools.cached_property
    def key(self) -> str:
        """The SHA-256 of its settings with the defaults of this version, by which cells find it; see `Cell.key`."""
        try:
            return digest_of(completed(self.line["settings"]))
        except UsageError as error:
            raise CheckpointError(f"{self.place}: of another version of codistill: {error}") from None

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.line["seed"])

    @property
    def errors(self) -> dict[str, float]:
        """The error of each predictor on the test set after the last epoch, percent."""
        return {name: float(each) for name, each in self.line["top1_error"].items()}


def line_digest(line: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a line, of all that it has but this digest."""
    return hashlib.sha256(canonical({key: each for key, each in line.items() if key != "sha256"}).encode()).hexdigest()


def read_ledger(path: Path) -> list[Entry]:
    """Read all lines of a ledger; none where there is no such file.

    Raises:
        CheckpointError: A line was edited, cut or lacks something; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    entries = []
    for number, text in enumerate(lines, 1):
        place = f"{path}:{number}"
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{place}: no line of JSON ({error}): restore it from the history") from None
        if not isinstance(line, dict) or line_digest(line) != line.get("sha256"):
            raise CheckpointError(f"{place}: edited after it was written, for its sha256 is another: restore the line")
        wrong = [key for key, kind in FORM.items() if not isinstance(line.get(key), kind)]
        wrong += ["settings_sha256"] if digest_of(line.get("settings", {})) != line.get("settings_sha256") else []
        wrong += [] if str(line.get("protocol")) in protocols() else ["protocol"]
        if wrong:
            raise CheckpointError(f"{place}: {wrong[0]} is not that of a ledger of this version")
        entries.append(Entry(line, place))
    return entries


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a ledger, which is made where it does not exist, and flush it to the disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # which an editor has taken from the last line
            file.write("".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise system_error(error, path, fix="choose another --ledger") from None


def known_cells(protocols: Sequence[Protocol]) -> dict[str, tuple[Protocol, Cell]]:
    """Return a cell of each kind of run that protocols have, teachers among them, by the SHA-256 of its settings."""
    found: dict[str, tuple[Protocol, Cell]] = {}
    for protocol in protocols:
        for table in tables():
            try:
                cells = contents(table, protocol).cells
            except UsageError:  # a table that the protocol is not for
                continue
            teachers = [teacher_of(cell) for cell in cells if cell.teacher]
            found |= {cell.key: (protocol, cell) for cell in (*teachers, *cells)}
    return found


def teacher_of(cell: Cell) -> Cell:
    """Return the run that teaches those of a cell, as a cell of its own."""
    assert cell.teacher is not None
    return Cell(row=cell.row, column=TEACHER, settings=cell.teacher)


def entry_of(run: RunFolder, known: Mapping[str, tuple[Protocol, Cell]]) -> Entry:
    """Return what the ledger holds of a finished run.

    Raises:
        UsageError: It was cut short, trained otherwise than by its settings alone, or its settings are those of no
            protocol; says what differs.
        CheckpointError: Its files are damaged.
    """
    if why := _unfit(run):
        raise UsageError(f"{run.path}: {why}")
    digests = {name: each for name, each in run.metadata["dataset"].get("sha256", {}).items() if "position" not in name}
    teacher = _teacher(run, known)
    settings = resolved(run.config, data_name(run.config.data, digests), teacher)
    key = digest_of(settings)
    if key not in known:
        raise UsageError(f"{run.path}: of no protocol: {_nearest(settings, known)}")
    summary, environment = run.summary, run.metadata["environment"]
    if lacking := [name for name in (*SAME, "train_seconds", "wall_seconds") if name not in summary]:
        raise UsageError(f"{run.path}: of an older version, for its summary.json has no {lacking[0]}")
    commit = environment.get("commit", "")
    if not commit and environment.get("source_sha256") == source()["source_sha256"]:  # trained in a copy without git
        commit = source().get("commit", "")
    line = {"protocol": known[key][0].name, "seed": run.config.train.seed, "settings_sha256": key}
    line |= {"precision": run.config.execution.precision}
    line |= {"settings": settings, "data_sha256": digests, "commit": commit, "environment": environment}
    line |= {name: summary[name] for name in SAME} | {"validation_top1_error": summary.get("validation_top1_error", {})}
    line |= {name: float(summary[name]) for name in ("train_seconds", "wall_seconds")}
    line = json.loads(json.dumps(line))
    return Entry({**line, "sha256": line_digest(line)}, str(run.path))


def _unfit(run: RunFolder) -> str:
    """Return why a run cannot enter whatever its settings are; empty: it can."""
    if not run.finished:
        return f"not finished ({run.status or 'without an end'})"
    for key, words in (("own_method", "a method of one's own"), ("own_loop", "a loop of one's own")):
        if key in run.metadata:
            return f"trained by {words}, not by settings alone"
    rows, epochs = run.metrics(), run.config.train.epochs
    if len(rows) != epochs or "stopped_early" in run.summary:
        return f"cut short: {len(rows)} of {epochs} epochs"
    if run.extensions:
        return f"extended from {run.extensions[0]['epochs']} epochs, whose learning rates were others"
    if not run.metadata.get("initial_weights", {}).get("from_recipe", True):
        return "began with weights of its own, not with those of its seed"
    return ""


def _teacher(run: RunFolder, known: Mapping[str, tuple[Protocol, Cell]]) -> dict[str, Any] | None:
    """Return the settings of the run that taught one, where it is or, where the sweep was moved, beside it."""
    if not run.config.teaching.teachers:
        return None
    places = [Path(each) for each in run.config.teaching.teachers]
    place = next((each for each in (places[0], run.path.parent / places[0].name) if each.is_dir()), None)
    if len(places) > 1 or place is None:
        raise UsageError(f"{run.path}: its teacher must be one run folder that is still there, not {places[0]}")
    taught_by = entry_of(RunFolder(place), known)
    if taught_by.seed != run.config.train.seed:
        raise UsageError(f"{run.path}: seed {run.config.train.seed}, but its teacher {place} has {taught_by.seed}")
    return dict(taught_by.line["settings"])


def _nearest(settings: Mapping[str, Any], known: Mapping[str, tuple[Protocol, Cell]]) -> str:
    """Return in what a run differs from the nearest kind of run that a protocol has."""
    found = min(known.values(), key=lambda each: len(differing(settings, each[1].resolved)))
    differences = differing(settings, found[1].resolved)
    more = f" and {len(differences) - 6} more" if len(differences) > 6 else ""
    row = f"{found[1].row}, its teacher" if found[1].column == TEACHER else found[1].row
    return f"beside protocol {found[0].name} ({row}) {', '.join(differences[:6])}{more}"
