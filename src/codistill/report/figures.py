"""Figures of a run as SVG."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codistill.runs.choice import evaluated


def curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw errors of each split and loss terms over the epochs, from the lines of metrics.jsonl, as an SVG element."""
    with _default_matplotlib():
        return _draw(rows)


@contextlib.contextmanager
def _default_matplotlib() -> Iterator[None]:
    """Draw with matplotlib's own settings, whatever its user's are (usetex, fonts), and without any backend."""
    # Its import fails where the variable names a backend that is not installed, as a notebook's may be.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.style
    finally:
        os.environ.update({"MPLBACKEND": backend} if backend is not None else {})
    with matplotlib.style.context("default"):
        yield


def _draw(rows: Sequence[Mapping[str, Any]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    errors, losses = figure.subplots(1, 2)
    epochs, scored = [row["epoch"] + 1 for row in rows], evaluated(rows)
    evaluations = [row["epoch"] + 1 for row in scored]
    marker = "o" if len(scored) == 1 else None
    held_out = "validation" in scored[0]
    for index, name in enumerate(scored[0]["test"]):
        found = [row["test"][name]["top1_error"] for row in scored]
        errors.plot(evaluations, found, f"C{index}", label=name, marker=marker)
        if held_out:
            held = [row["validation"][name]["top1_error"] for row in scored]
            errors.plot(evaluations, held, f"C{index}--", label=f"{name} (validation)", marker=marker and "x")
    for name in rows[0]["train"]:
        losses.plot(epochs, [row["train"][name] for row in rows], label=name.replace("->", " → "), marker=marker)
    what = "top-1 error, %: test solid, validation dashed" if held_out else "top-1 error on the test set, %"
    errors.set(xlabel="epoch", ylabel=what, ylim=(0, None))
    losses.set(xlabel="epoch", ylabel="training loss and its terms, nats", yscale="log")
    for axes in (errors, losses):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]
