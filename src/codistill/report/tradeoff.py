"""Latency against error: which predictors no other one beats in both."""

from collections.abc import Mapping, Sequence
from typing import Any

from codistill.report.curves import Chart, colour_of
from codistill.report.groups import Group, Seen
from codistill.report.plots import Point, scatter_plot
from codistill.runs.choice import top1_errors
from codistill.runs.latency import Latency, pareto, read_latency, rows

Way = tuple[str, str, int, int | None]
"""Runtime, device, images in a call, threads."""


def ways(found: Latency) -> list[Way]:
    """Return what is drawn of the measurements: one image with one thread, 64 with all, and on a GPU both."""
    measured = {(each.runtime, each.device, each.batch, each.threads) for each in found.timings}
    runtime = "onnx" if any(each[:2] == ("onnx", "cpu") for each in measured) else "torch"
    most = max((threads or 1 for kind, device, _, threads in measured if (kind, device) == (runtime, "cpu")), default=1)
    wanted = [(runtime, "cpu", 1, 1), (runtime, "cpu", 64, most)]
    return [each for each in (*wanted, ("torch", "cuda", 1, None), ("torch", "cuda", 64, None)) if each in measured]


def way_in_words(way: Way) -> str:
    """Return a way of measuring as a title has it."""
    runtime, device, batch, threads = way
    where = "on the GPU" if device == "cuda" else "one thread" if threads == 1 else f"{threads} threads"
    kind = {"onnx": "ONNX Runtime", "onnx-int8": "ONNX Runtime, int8"}.get(runtime, runtime)
    return f"{'one image' if batch == 1 else f'{batch} images'}, {where}, {kind}"


def tradeoff_chart(way: Way, points: Sequence[tuple[str, str, float, float, tuple[float, float] | None]]) -> Chart:
    """Return a plot of latency against error.

    Args:
        way: How it was measured.
        points: Name, colour, milliseconds, test error and its interval (percent).
    """
    front = pareto({name: (time, error) for name, _, time, error, _ in points})
    drawn = [
        Point(
            name=name,
            x=time,
            y=error,
            colour=colour,
            best=name in front,
            low=interval[0] if interval else None,
            high=interval[1] if interval else None,
        )
        for name, colour, time, error, interval in points
    ]
    title = f"Test error, % against milliseconds: {way_in_words(way)}"
    said = f"On the Pareto front, from fast to good: {', '.join(front)}."
    table = [
        (name, f"{time:.3g}", f"{error:.2f}", "yes" if name in front else "no")
        for name, _, time, error, _ in sorted(points, key=lambda each: each[2])
    ]
    svg = scatter_plot(title, said, drawn, "milliseconds a call, logarithmic")
    return Chart(title, svg, [], said, ["predictor", "ms", "error %", "on the front"], table)


def run_tradeoff(
    seen: Seen, found: Latency | None, intervals: Mapping[str, tuple[float, float] | None]
) -> dict[str, Any] | None:
    """Return the section of a run; None: nothing was measured."""
    if found is None or seen.last is None:
        return None
    errors = top1_errors(seen.last, "test")
    drawn = []
    for way in ways(found):
        runtime, device, batch, threads = way
        times = found.milliseconds(runtime, batch, threads, device)
        points = [
            (name, colour_of(name), times[name], errors[name], intervals.get(name)) for name in errors if name in times
        ]
        if points:
            drawn.append(tradeoff_chart(way, points))
    headings, *cells = rows(found, errors)
    return {"lead": machine(found), "charts": drawn, "headings": headings, "rows": cells}


def comparison_tradeoff(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Return the section of a comparison, a point for each predictor of a group: its mean error over seeds.

    Times are those of the first run of a group that has some, and only of one machine; None: nothing was measured.
    """
    measured = [(group, found) for group in groups if (found := _first(group)) is not None]
    if not measured:
        return None
    here = measured[0][1].machine
    same = [(group, found) for group, found in measured if found.machine == here]
    drawn = []
    for way in ways(same[0][1])[:2]:
        runtime, device, batch, threads = way
        points = []
        for group, found in same:
            times = found.milliseconds(runtime, batch, threads, device)
            for name in times:
                if errors := group.errors(name):
                    words = f"{group.name}: {name}" if len(groups) > 1 else name
                    points.append((words, group.colour, times[name], sum(errors) / len(errors), None))
        if points:
            drawn.append(tradeoff_chart(way, points))
    left = len(groups) - len(same)
    more = f" {left} groups were not measured there." if left else ""
    return {"lead": machine(same[0][1]) + more, "charts": drawn}


def _first(group: Group) -> Latency | None:
    return next((found for each in group.runs if (found := read_latency(each.run)) is not None), None)


def machine(found: Latency) -> str:
    """Return in words where and how it was measured."""
    facts = found.machine
    cpu, cores, gpu = facts.get("cpu"), facts.get("cores"), facts.get("gpu")
    where = f"{cpu}, {cores} cores" + (f", and {gpu}" if gpu else "")
    return (
        f"Measured on {where}: medians of whole calls, from pixels to logits, predictors in turn. Filled points are "
        "on the Pareto front: no other one is both faster and better."
    )
