"""Tables of a sweep: a row for each run, and for each group of runs that differ in the seed only mean and deviation."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from codistill.core.files import write_atomically, write_json
from codistill.report.sources import TABLE
from codistill.report.tables import markdown

VALIDATION = " (validation)"  # ends the columns of errors on validation images
BALANCED = " (balanced)"  # ends those of balanced errors on the test set
UNLIKE = 0.5
"""Points between an error and the balanced error from which `table.md` has both: the classes are of unequal size."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a run of a sweep ended.

    Attributes:
        name: Of the run, and of its folder below that of the sweep.
        group: What the runs have in common that differ in the seed only.
        folder: The run folder, which may not exist.
        status: `unfinished` where the sweep was stopped before.
        top1_error: Of each predictor on the test set after the last epoch, percent.
        best_epoch_top1_error: Of each predictor on the test set after the best epoch, percent.
        balanced_error: Of each predictor on the test set after the last epoch, mean over classes, percent.
        top1_error_interval: The 95 % interval of each top-1 error on the test set after the last epoch, percent.
        validation_top1_error: Of each predictor on its validation images, if any, after the last epoch, percent.
        best_student: The student with the lowest error after the last epoch.
        chosen_by: On which images: `validation` or `test`.
        milliseconds: Of each predictor for one image, as ONNX with one CPU thread, where RUN/latency.json has it.
        reason: Why it failed.
    """

    name: str
    group: str
    folder: str
    status: Literal["finished", "FAILED", "unfinished"]
    top1_error: dict[str, float] = field(default_factory=dict)
    best_epoch_top1_error: dict[str, float] = field(default_factory=dict)
    balanced_error: dict[str, float] = field(default_factory=dict)
    top1_error_interval: dict[str, list[float]] = field(default_factory=dict)
    validation_top1_error: dict[str, float] = field(default_factory=dict)
    best_student: str = ""
    chosen_by: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def errors(self) -> dict[str, float]:
        """The errors after the last epoch by column of `table.md`, with names for balanced and validation errors."""
        balanced = {name + BALANCED: each for name, each in self.balanced_error.items()}
        validation = {name + VALIDATION: each for name, each in self.validation_top1_error.items()}
        return self.top1_error | balanced | validation


def grouped(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Summarise runs that differ in the seed only, as `table.json` has it.

    The mean top-1 error of each predictor after the last epoch, on the test set and on validation images if any, is
    empty unless all finished; the sample standard deviation (n - 1), percentage points, also for a single run.
    """
    groups = []
    for name in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == name]
        lost = {status.lower(): sum(row.status == status for row in members) for status in ("FAILED", "unfinished")}
        # Runs of an older version have no validation errors.
        predictors = set.intersection(*(set(row.errors) for row in members)) if not any(lost.values()) else set()
        errors = {each: [row.errors[each] for row in members] for each in members[0].errors if each in predictors}
        mean = {each: statistics.fmean(values) for each, values in errors.items()}
        deviation = {each: statistics.stdev(values) for each, values in errors.items() if len(values) > 1}
        groups.append({"name": name, "runs": len(members), **lost, "mean": mean, "deviation": deviation})
    return groups


def write_tables(folder: Path, spec: Path, rows: Sequence[Row]) -> None:
    """Write `table.json` and `table.md` of a sweep into its folder."""
    written = {"spec": str(spec), "runs": [asdict(row) for row in rows], "groups": grouped(rows)}
    write_json(folder / TABLE, written)
    if all(abs(row.top1_error[name] - each) < UNLIKE for row in rows for name, each in row.balanced_error.items()):
        rows = [replace(row, balanced_error={}) for row in rows]
    groups = grouped(rows)
    held_out = " or, where named, on validation images" if any(row.validation_top1_error for row in rows) else ""
    title = f"# Top-1 errors on the test set{held_out} after the last epoch, %: {spec.name}"
    lines = [title, "", *markdown(run_cells(rows))]
    lines += ["", "Over seeds: mean ± sample standard deviation (n runs) of these", "", *markdown(group_cells(groups))]
    if any(row.milliseconds for row in rows):
        lines += ["", "Milliseconds of one image, as ONNX with one CPU thread, where measured", ""]
        lines += markdown(latency_cells(rows))
    write_atomically(folder / "table.md", ("\n".join(lines) + "\n").encode())


def predictors_of(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """List predictors as columns: students by number, then others; then balanced errors, last those on validation."""
    names = dict.fromkeys(name for errors in members for name in errors)
    students = sorted((name for name in names if name.startswith("student")), key=lambda name: (len(name), name))
    ordered = students + [name for name in names if name not in students]
    return sorted(ordered, key=lambda name: (name.endswith(VALIDATION), name.endswith(BALANCED)))


def run_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table of runs, headings first."""
    predictors = predictors_of([row.errors for row in rows])
    cells = [["run (folder)", "status", *predictors, "reason"]]
    for row in rows:
        errors = [f"{row.errors[name]:.2f}" if name in row.errors else "" for name in predictors]
        cells.append([row.name, row.status, *errors, row.reason])
    return cells


def latency_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table of the runs whose latency was measured, headings first."""
    measured = [row for row in rows if row.milliseconds]
    predictors = predictors_of([row.milliseconds for row in measured])

    def shown(row: Row) -> list[str]:
        return [f"{row.milliseconds[name]:.3g}" if name in row.milliseconds else "" for name in predictors]

    return [["run (folder)", *predictors], *([row.name, *shown(row)] for row in measured)]


def group_cells(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of groups, headings first."""
    predictors = predictors_of([group["mean"] for group in groups])
    cells = [["runs", "n", *predictors, "note"]]
    for group in groups:
        mean, deviation, runs = group["mean"], group["deviation"], group["runs"]
        notes = [f"{group[lost]} of {runs} {lost}: no mean" for lost in ("failed", "unfinished") if group[lost]]
        errors = [f"{mean[name]:.2f}" if name in mean else "" for name in predictors]
        spreads = [f" ± {deviation[name]:.2f}" if name in deviation else "" for name in predictors]
        cells.append([group["name"], str(runs), *map("".join, zip(errors, spreads, strict=True)), "; ".join(notes)])
    return cells
