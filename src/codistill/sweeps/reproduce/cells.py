"""Protocols, and the cells of the paper's tables: what each trains by a protocol, and which number is its value."""

import fnmatch
import functools
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches
from codistill.evaluation.predictions import students_among
from codistill.settings.config import RunConfig
from codistill.sweeps.naming import canonical, identity
from codistill.sweeps.spec import planned

HERE = Path(__file__).parent
LOST = "lost"
FUSING = ("ffl", "one", "mfef")
"""Methods with a fused classifier."""
# Settings that decide no result beside the places: the last epoch is always evaluated, and rounding is noise. Which
# precision it was stands in the ledger.
FREE = ("evaluate_every", "compile", "deterministic", "precision", "seed")
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Protocol:
    """How runs are trained.

    Attributes:
        name: As `--protocol` has it.
        about: What stands in each row of a table.
        settings: Of every run, by key.
        teacher: The network that teaches `kd`, trained alone by the same protocol and with the same seed.
        data: The data sets that it is for; empty: all.
        networks: The students that it is for; empty: all.
        subset: The part of its one data set that it takes; empty: all of it.
    """

    name: str
    about: str
    settings: Settings
    teacher: str
    data: Sequence[str] = ()
    networks: Sequence[str] = ()
    subset: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A number of a table: of which runs, which differ in the seed only, and of which predictor.

    Attributes:
        row: Its row in the table.
        column: Its column.
        settings: What `codistill train` takes, without seed and teacher; the method's settings are `method.*`.
        teacher: The settings of the run that teaches, likewise; None: nothing does.
        predictor: Whose error on the test set after the last epoch is the value.
        paper: What the paper prints, percent; `lost`; or None: nothing.
    """

    row: str
    column: str
    settings: Settings
    teacher: Settings | None = None
    predictor: str = "student0"
    paper: float | str | None = None

    @functools.cached_property
    def resolved(self) -> dict[str, Any]:
        """All settings that decide the result, defaults included; see `resolved`."""
        return completed({**self.settings, "teacher": self.teacher and completed(self.teacher)})

    @functools.cached_property
    def key(self) -> str:
        """The SHA-256 of `resolved`: runs that have it are runs of this cell."""
        return digest_of(self.resolved)

    @property
    def alike(self) -> bool:
        """Whether all students of a run are alike, so that the best of them is one of several draws."""
        return len(set(self.settings["networks"])) == 1 and self.predictor == "student0"

    def best(self, errors: Mapping[str, float]) -> float:
        """Return the error that the paper would print of one run: that of its best student, where they are alike."""
        return min(errors[each] for each in students_among(errors)) if self.alike else errors[self.predictor]


def resolved(config: RunConfig, data: str, teacher: Settings | None) -> dict[str, Any]:
    """Return the settings of a run that decide its result, without the seed.

    Args:
        config: The run.
        data: What its data set is, wherever it lies; see `data.data_name`.
        teacher: The same settings of the run that teaches it, in place of that run's folder.
    """
    found = {key: value for key, value in identity(config).items() if key not in FREE}
    found |= {"data": data, "teacher": teacher, "flip": config.train.flip is not False}
    if config.train.schedule == "step":
        found["milestones"] = list(config.train.learning_rate_steps)
    return found


def completed(settings: Settings) -> dict[str, Any]:
    """Return `resolved` settings of some, with the defaults of this version for what they lack.

    Raises:
        UsageError: This version has no such settings.
    """
    teacher = settings.get("teacher")
    given = dict(settings) | ({"teacher": "teacher"} if teacher else {"teacher": None})
    run = planned(given, "", "", lambda key: "settings")
    if run.config is None:
        raise UsageError(run.problem)
    return resolved(run.config, settings["data"], completed(teacher) if teacher else None)


def digest_of(settings: Settings) -> str:
    """Return the SHA-256 of resolved settings."""
    return hashlib.sha256(canonical(settings).encode()).hexdigest()


def differing(before: Settings, after: Settings) -> list[str]:
    """List the settings in which two runs differ, with both values."""
    old, new = _flat(before), _flat(after)
    return [f"{key} {old.get(key)}, not {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _flat(settings: Settings) -> dict[str, Any]:
    teacher = settings.get("teacher") or {}
    return {**settings, "teacher": bool(teacher)} | {f"teacher.{key}": each for key, each in teacher.items()}


@functools.cache
def rules() -> dict[str, Any]:
    """Return what protocols, cells and data sets are."""
    return tomllib.loads((HERE / "protocols.toml").read_text(encoding="utf-8"))


@functools.cache
def paper() -> dict[str, Any]:
    """Return the numbers of the paper, and what the tables are."""
    return tomllib.loads((HERE / "paper.toml").read_text(encoding="utf-8"))


def tables() -> list[str]:
    """Name the tables."""
    return [name for name, each in paper().items() if isinstance(each, dict)]


@functools.cache
def protocols() -> dict[str, Protocol]:
    """Return the protocols by name."""
    found: dict[str, Protocol] = {}
    for name, entry in rules()["protocols"].items():
        entry = dict(entry)
        like = found.get(entry.pop("like", ""))
        settings = {**(like.settings if like else {}), **entry.pop("settings")}
        found[name] = Protocol(name=name, settings=settings, **entry)
    return found


@dataclass(frozen=True)
class Contents:
    """What a table has by a protocol: its cells in order, those that are compared, and what is said below it."""

    cells: list[Cell]
    pairs: list[tuple[Cell, Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@functools.cache
def contents(table: str, protocol: Protocol, patterns: tuple[str, ...] = ()) -> Contents:
    """Return the contents of a table.

    Args:
        table: One of `tables()`.
        protocol: By which its runs are trained.
        patterns: Rows, as `resnet20/cifar100`, or cells, as `resnet20/cifar100/mfef-s`, with `*` for any letters;
            none: all rows.

    Raises:
        UsageError: A pattern fits nothing, or the table has nothing for this protocol.
    """
    printed, own = paper()[table], rules()["tables"][table]
    cells = []
    for row, values in (printed.get("rows") or {row: [] for row in own["rows"]}).items():
        network, _, data = row.partition("/") if "/" in row else (own["network"], "", own.get("data", "cifar100"))
        allowed = set(network.split("+")) <= {*(protocol.networks or network.split("+"))}
        if not allowed or data not in (protocol.data or (data,)):
            continue
        for position, column in enumerate(printed["columns"]):
            rule = rules()["columns"][column] if "/" in row else own["rows"][row]
            number = values[position] if position < len(values) else None
            rule = {"students": own.get("students", 2), **rule}
            cell = _cell((row, column), rule, network, protocol.subset or data, protocol)
            cells += [replace(cell, paper=number)] if cell else []
    if not cells:
        words = f"{' and '.join(protocol.networks)} on {' and '.join(protocol.data)} only"
        others = ", ".join(name for name in protocols() if name != protocol.name)
        raise UsageError(f"{table}: protocol {protocol.name} is for {words}: choose --protocol {others}")
    kept = cells
    for pattern in patterns:
        if not any(_fits(cell, pattern) for cell in cells):
            known = {cell.row for cell in cells}
            if (row := pattern.rpartition("/")[0]) in known:
                known = {f"{row}/{cell.column}" for cell in cells if cell.row == row}
            raise UsageError(f"{table} has no cell {pattern!r}: {near_matches(pattern, known)}")
    if patterns:
        kept = [cell for cell in cells if any(_fits(cell, pattern) for pattern in patterns)]
    notes = [text for row, text in own.get("notes", {}).items() if any(cell.row == row for cell in kept)]
    return Contents(kept, _pairs(kept, own), notes)


def _fits(cell: Cell, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (cell.row, f"{cell.row}/{cell.column}"))


def _cell(place: tuple[str, str], rule: Settings, networks: str, data: str, protocol: Protocol) -> Cell | None:
    """Return the cell of a row and a column without the paper's number; None where its runs have no such predictor."""
    row, column = place
    kept = {
        key: value for key, value in rule.items() if key not in ("method", "students", "longer", "taught", "predictor")
    }
    students, predictor, longer = rule["students"], rule.get("predictor", "student0"), rule.get("longer", 1)
    method = {"name": rule["method"]} if isinstance(rule["method"], str) else rule["method"]
    if column in ("ensemble", "fused"):
        fuses = method["name"] in FUSING and method.get("distillation", "fusion") == "fusion"
        if students == 1 or predictor != "student0" or (column == "fused" and not fuses):
            return None
        predictor = column
    alone = {**protocol.settings, "data": data, "networks": [protocol.teacher], "method.name": "independent"}
    names = networks.split("+") if "+" in networks else [networks] * students
    settings = {**protocol.settings, **kept, "data": data, "networks": names}
    settings |= {f"method.{key}": value for key, value in method.items()}
    if settings.get("schedule") == "cosine":  # which has no milestones
        del settings["milestones"]
    if longer != 1:
        settings["epochs"] = round(longer * settings["epochs"])
        settings["milestones"] = [round(longer * each) for each in settings["milestones"]]
    teacher = alone if rule.get("taught") else None
    return Cell(row=row, column=column, settings=settings, teacher=teacher, predictor=predictor)


def _pairs(cells: list[Cell], own: Mapping[str, Any]) -> list[tuple[Cell, Cell]]:
    """Return the cells that are compared: columns of a row where the columns are methods, else rows of a column."""
    by_place = {(cell.row, cell.column): cell for cell in cells}
    rows = list(dict.fromkeys(cell.row for cell in cells))
    columns = list(dict.fromkeys(cell.column for cell in cells))
    if "rows" not in own:
        wanted = [((row, first), (row, second)) for row in rows for first, second in own["pairs"]]
    else:
        against = own.get("against", ())  # each row against these, and those against each other once
        pairs = [(row, other) for index, other in enumerate(against) for row in rows if row not in against[: index + 1]]
        pairs = own.get("pairs") or pairs
        columns = columns if "pairs" in own else ["student"]
        wanted = [((first, column), (second, column)) for column in columns for first, second in pairs]
    return [(by_place[first], by_place[second]) for first, second in wanted if {first, second} <= by_place.keys()]
