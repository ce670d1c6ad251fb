"""Tables of a sweep: a row for each run, and for each group of runs that differ in the seed only mean and deviation."""

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from codistill.core.files import write_atomically, write_json

# Characters of a reason that a terminal shows; table.md has the whole.
SHOWN_REASON = 60


Status = Literal["finished", "FAILED", "unfinished"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a run of a sweep ended.

    Attributes:
        name: Of the run, and of its folder below that of the sweep.
        group: What the runs have in common that differ in the seed only.
        folder: The run folder, which may not exist.
        status: `unfinished` where the sweep was stopped before.
        top1_error: Of each predictor after the last epoch, percent.
        best_epoch_top1_error: Of each predictor after the best epoch, percent.
        reason: Why it failed.
    """

    name: str
    group: str
    folder: str
    status: Status
    top1_error: dict[str, float] = field(default_factory=dict)
    best_epoch_top1_error: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in the seed only.

    Attributes:
        name: Of the group.
        runs: How many belong to it.
        failed: How many of them failed.
        unfinished: How many of them are not at their end.
        mean: Of the top-1 error of each predictor after the last epoch, percent; empty unless all runs finished.
        deviation: Sample standard deviation (n - 1), percentage points; empty for a single run.
    """

    name: str
    runs: int
    failed: int
    unfinished: int
    mean: dict[str, float]
    deviation: dict[str, float]


def grouped(rows: Sequence[Row]) -> list[Group]:
    """Put rows that differ in the seed only together, in the order of the first of each."""
    groups = []
    for name in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == name]
        count = {status: sum(row.status == status for row in members) for status in ("FAILED", "unfinished")}
        errors: dict[str, list[float]] = {}
        if not any(count.values()):
            errors = {each: [row.top1_error[each] for row in members] for each in members[0].top1_error}
        groups.append(
            Group(
                name=name,
                runs=len(members),
                failed=count["FAILED"],
                unfinished=count["unfinished"],
                mean={each: statistics.fmean(values) for each, values in errors.items()},
                deviation={each: statistics.stdev(values) for each, values in errors.items() if len(values) > 1},
            )
        )
    return groups


def write_tables(folder: Path, spec: Path, rows: Sequence[Row]) -> None:
    """Write `table.json` and `table.md` of a sweep.

    Args:
        folder: Of the sweep.
        spec: Its spec.
        rows: One for each run.
    """
    groups = grouped(rows)
    tables = {"spec": str(spec), "runs": [asdict(row) for row in rows], "groups": [asdict(each) for each in groups]}
    write_json(folder / "table.json", tables)
    lines = [f"# Top-1 errors on the test set after the last epoch, %: {spec.name}", ""]
    lines += markdown(*run_cells(rows))
    lines += ["", "Over seeds: mean ± sample standard deviation (n runs)", ""]
    lines += markdown(*group_cells(groups))
    write_atomically(folder / "table.md", ("\n".join(lines) + "\n").encode())


def shown_tables(folder: Path, rows: Sequence[Row]) -> list[Table]:
    """Make the tables for a terminal; that of the groups only where one has several runs."""
    groups = grouped(rows)
    tables = [rich_table(f"{folder}: top-1 errors on the test set after the last epoch, %", *run_cells(rows))]
    if any(group.runs > 1 for group in groups):
        tables.append(rich_table("over seeds: mean ± sample standard deviation (n runs)", *group_cells(groups)))
    return tables


def predictors_of(members: Sequence[dict[str, Any]]) -> list[str]:
    """List predictors as columns: students by number, then the others."""
    names = dict.fromkeys(name for errors in members for name in errors)
    students = sorted((name for name in names if name.startswith("student")), key=lambda name: (len(name), name))
    return students + [name for name in names if name not in students]


def run_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Give the headings and the cells of the table of runs."""
    predictors = predictors_of([row.top1_error for row in rows])
    cells = []
    for row in rows:
        errors = [f"{row.top1_error[name]:.2f}" if name in row.top1_error else "" for name in predictors]
        cells.append([row.name, row.status, *errors, row.reason])
    return ["run (folder)", "status", *predictors, "reason"], cells


def group_cells(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Give the headings and the cells of the table of groups."""
    predictors = predictors_of([group.mean for group in groups])
    cells = []
    for group in groups:
        lost = {"failed": group.failed, "unfinished": group.unfinished}
        notes = [f"{count} of {group.runs} {what}: no mean" for what, count in lost.items() if count]
        values = []
        for name in predictors:
            mean = f"{group.mean[name]:.2f}" if name in group.mean else ""
            values.append(mean + (f" ± {group.deviation[name]:.2f}" if name in group.deviation else ""))
        cells.append([group.name, str(group.runs), *values, "; ".join(notes)])
    return ["runs", "n", *predictors, "note"], cells


def markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Write a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *cells]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def rich_table(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """Make a table for a terminal; a last column without contents is left out, and what is too long there is cut."""
    width = len(headings) - (not any(line[-1] for line in cells))
    table = Table(title=escape(title))
    for heading in headings[:width]:
        number = heading not in (headings[0], "status", "reason", "note")
        table.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for line in cells:
        shown = [*line[:-1], textwrap.shorten(line[-1], SHOWN_REASON, placeholder=" ..")]
        table.add_row(*map(escape, shown[:width]))
    return table
