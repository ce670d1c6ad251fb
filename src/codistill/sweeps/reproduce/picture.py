"""Pictures of tables as SVG: errors of methods with their seeds, and errors against the number of students."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from codistill.evaluation.seeds import summarise
from codistill.sweeps.reproduce.cells import Cell, Protocol, contents
from codistill.sweeps.reproduce.collect import Runs, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = ("methods", "figure3")
COLOURS = {"student": "#1b6ca8", "ensemble": "#8a8f98", "fused": "#c8553d"}


def draw(
    table: str, protocol: Protocol, runs: Runs, patterns: tuple[str, ...] = (), seeds: Sequence[int] = ()
) -> bytes | None:
    """Return the picture of a table as SVG, which is the same for the same runs; None: it would compare nothing.

    Each seed is a small circle, their mean a dot, and its 95 % interval a line.
    """
    found = contents(table, protocol, patterns).cells if table in DRAWN else []
    cells = [(cell, values) for cell in found if (values := list(values_of(cell, runs, seeds).values()))]
    cells = [each for each in cells if table == "figure3" or each[0].column == "student"]
    if len(cells) < 2:
        return None
    import matplotlib
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"), matplotlib.rc_context({"svg.hashsalt": "codistill"}):  # not the user's
        height = 1.2 + 0.32 * len(cells) if table == "methods" else 4.0
        figure = Figure(figsize=(7, height), layout="constrained")
        axes = figure.subplots()
        (_methods if table == "methods" else _numbers)(axes, cells)
        axes.set_title(f"CIFAR-100, protocol {protocol.about}", loc="left", fontsize=10)
        axes.grid(axis="x" if table == "methods" else "y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="white")
    return file.getvalue()


def _methods(axes: "Axes", cells: Sequence[tuple[Cell, list[float]]]) -> None:
    for place, (_, values) in enumerate(cells):
        _mark(axes, place, values, COLOURS["student"], upright=False)
    axes.set_yticks(range(len(cells)), [f"{cell.row} (n {len(values)})" for cell, values in cells])
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xlabel("top-1 error of a student on the test set, %: seeds, mean and its 95 % interval")


def _numbers(axes: "Axes", cells: Sequence[tuple[Cell, list[float]]]) -> None:
    for index, column in enumerate(dict.fromkeys(cell.column for cell, _ in cells)):
        points = [(len(cell.settings["networks"]), values) for cell, values in cells if cell.column == column]
        for count, values in points:
            _mark(axes, count + 0.04 * index, values, COLOURS[column], upright=True)
        means = [summarise(values).mean for _, values in points]
        axes.plot([count + 0.04 * index for count, _ in points], means, color=COLOURS[column], label=column)
    axes.set_xticks(sorted({len(cell.settings["networks"]) for cell, _ in cells}))
    axes.set_xlabel("number of students (seeds, mean and its 95 % interval)")
    axes.set_ylabel("top-1 error on the test set, %")
    axes.legend(frameon=False)


def _mark(axes: "Axes", place: float, values: list[float], colour: str, upright: bool) -> None:
    """Draw the seeds of a cell, their mean and its interval, at a place of the other axis."""
    summary = summarise(values)

    def draw(errors: Sequence[float], **style: Any) -> None:
        places = [place] * len(errors)
        axes.plot(*((places, errors) if upright else (errors, places)), color=colour, **style)

    if summary.low is not None and summary.high is not None:
        draw([summary.low, summary.high], linewidth=1.5)
    draw(values, linestyle="", marker="o", markersize=4, markerfacecolor="white")
    draw([summary.mean], linestyle="", marker="o", markersize=6)
