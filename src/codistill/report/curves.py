"""Curves over the epochs: errors, terms of the loss and learning rate, with bands over seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codistill.evaluation.metrics import AVERAGED, own_student
from codistill.evaluation.predictions import students_among
from codistill.report.groups import Group
from codistill.report.plots import Line, line_plot

TABLE_ROWS = 40
"""Of the table beside a plot; longer ones are thinned, with their last row kept."""

Row = Mapping[str, Any]
Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class Chart:
    """A plot with what stands around it.

    Attributes:
        title: Above it.
        svg: The plot.
        legend: Name, colour and dash of each entry.
        note: Below it; may be empty.
        headings: Of the table that says the same.
        rows: Of this table.
        wide: Whether it takes two columns.
    """

    title: str
    svg: str
    legend: Sequence[tuple[str, str, str]]
    note: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: bool = False


def colour_of(predictor: str) -> str:
    """Return the colour class of a predictor, the same in all plots of a run.

    An average has that of its weights, an exit that of its student.
    """
    name = predictor.removesuffix(AVERAGED).partition("/")[0]
    if students_among([name]):
        return f"c{int(name.removeprefix('student')) % 6}"
    return name if name in ("ensemble", "fused") else "ink"


def over_seeds(group: Group, value: Value) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return epochs (from 1) and, over the drawn runs that have a value there, the mean, the lowest and the highest."""
    found: dict[int, list[float]] = {}
    for seen in group.drawn:
        for row in seen.rows:
            if (each := value(row)) is not None and math.isfinite(each):
                found.setdefault(row["epoch"] + 1, []).append(each)
    epochs = sorted(found)
    kept = [found[epoch] for epoch in epochs]
    return epochs, [statistics.fmean(each) for each in kept], [min(each) for each in kept], [max(each) for each in kept]


def line(group: Group, name: str, value: Value, colour: str, dash: str = "", thin: bool = False) -> Line | None:
    """Return the line of a value over the epochs, with a band where the group has several runs; None: no values."""
    epochs, mean, low, high = over_seeds(group, value)
    if not epochs:
        return None
    edges = {"low": low, "high": high} if len(group.drawn) > 1 else {}
    return Line(name=name, x=epochs, y=mean, colour=colour, dash=dash, thin=thin, **edges)


def error_on(split: str, predictor: str) -> Value:
    """Return the function that reads the error of a predictor from a line of metrics.jsonl."""
    return lambda row: row.get(split, {}).get(predictor, {}).get("top1_error")


def students_mean(row: Row) -> float | None:
    """Return the mean test error of all students, percent."""
    errors = [each["top1_error"] for name, each in row.get("test", {}).items() if own_student(name)]
    return statistics.fmean(errors) if errors else None


def charts(groups: Sequence[Group]) -> list[Chart]:
    """Return the curves of one group, a line for each predictor and term; of several a plot for each, by group."""
    return _of_one(groups[0]) if len(groups) == 1 else _of_several(groups)


def _chart(title: str, lines: Sequence[Line | None], note: str = "", **options: Any) -> Chart | None:
    drawn = [each for each in lines if each is not None]
    if not drawn:
        return None
    wide = options.pop("wide", False)
    epochs = sorted({int(each) for line in drawn for each in line.x})
    chosen = (
        epochs
        if len(epochs) <= TABLE_ROWS
        else [epochs[round(i * (len(epochs) - 1) / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)]
    )
    values = [dict(zip(line.x, line.y, strict=True)) for line in drawn]
    rows = [[str(epoch), *(f"{each[epoch]:.4g}" if epoch in each else "" for each in values)] for epoch in chosen]
    ends = "; ".join(f"{line.name} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in drawn)
    svg = line_plot(title, f"Over {len(epochs)} epochs: {ends}.", drawn, "epoch", **options)
    legend = [(each.name, each.colour, each.dash) for each in drawn]
    return Chart(title, svg, legend, note, ["epoch", *(each.name for each in drawn)], rows, wide)


def _band(groups: Sequence[Group]) -> str:
    most = max(len(group.drawn) for group in groups)
    words = f"Lines are means over up to {most} seeds, bands go from the lowest to the highest." if most > 1 else ""
    if any(group.lost for group in groups):
        words += " Runs that have not come to their end are drawn only where no run of their group has."
    return words.strip()


def _of_one(group: Group) -> list[Chart]:
    seen = group.drawn[0]
    errors: list[Line | None] = []
    for name in seen.predictors:
        errors.append(line(group, name, error_on("test", name), colour_of(name)))
    held = "validation" in seen.splits
    for name in seen.predictors if held else ():
        errors.append(line(group, f"{name}, validation", error_on("validation", name), colour_of(name), "dashed", True))
    terms = [line(group, "sum", lambda row: row["train"].get("loss"), "ink")]
    for name in dict.fromkeys(name for row in seen.rows for name in row["train"]):  # stages have terms of their own
        if name != "loss":
            terms.append(_term(group, name))
    rate = line(group, "learning rate", lambda row: row.get("learning_rate"), "ink")
    note = _band([group])
    differ = line(group, "disagreement", lambda row: row.get("diversity", {}).get("disagreement"), "ink")
    found = [
        _chart("Top-1 error, %", errors, note, wide=True, height=340),
        _chart(
            "Training loss and its terms, nats",
            terms,
            "Logarithmic. A term has the colour of the predictor that learns by it.",
            log=True,
            height=340,
        ),
        _chart("Learning rate", [rate], "Logarithmic.", log=True, height=220),
        _chart(
            "Disagreement of the students, % of test images", [differ] if len(seen.students) > 1 else [], height=220
        ),
    ]
    return [each for each in found if each is not None]


def _term(group: Group, name: str) -> Line | None:
    """Return the line of a term such as `kl/fused->student0`: the colour says who learns, the dash from what."""
    kind, _, between = name.partition("/")
    learner = between.rpartition("->")[2]
    dash = "" if kind == "ce" else "dashed" if kind == "kl" else "dotted"
    return line(group, name.replace("->", " → "), lambda row: row["train"].get(name), colour_of(learner), dash, True)


def _of_several(groups: Sequence[Group]) -> list[Chart]:
    def by_group(value: Value, among: Sequence[Group] = groups) -> list[Line | None]:
        return [line(group, group.name, value, group.colour, group.dash) for group in among]

    note = _band(groups)
    found = [
        _chart(
            "Top-1 error on the test set, %: mean of the students", by_group(students_mean), note, wide=True, height=340
        )
    ]
    others = dict.fromkeys(
        name for group in groups for seen in group.drawn for name in seen.predictors if not own_student(name)
    )
    for name in others:
        found.append(
            _chart(f"Top-1 error on the test set, %: {name}", by_group(error_on("test", name)), note, height=340)
        )
    found.append(
        _chart(
            "Training loss, nats",
            by_group(lambda row: row["train"].get("loss")),
            "Logarithmic. Sums of unlike terms do not compare.",
            log=True,
        )
    )
    rate = by_group(lambda row: row.get("learning_rate"))
    found.append(_chart("Learning rate", rate, "Logarithmic.", log=True))
    found.append(
        _chart(
            "Disagreement of the students, % of test images",
            by_group(
                lambda row: row.get("diversity", {}).get("disagreement"),
                [group for group in groups if any(sum(map(own_student, seen.predictors)) > 1 for seen in group.drawn)],
            ),
        )
    )
    return [each for each in found if each is not None]
