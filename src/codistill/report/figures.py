"""Figures of a run as SVG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any


def curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw test errors and loss terms over the epochs, from the lines of metrics.jsonl, as an SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    errors, losses = figure.subplots(1, 2)
    epochs = [row["epoch"] + 1 for row in rows]
    marker = "o" if len(rows) == 1 else None
    for name in rows[0]["test"]:
        errors.plot(epochs, [row["test"][name]["top1_error"] for row in rows], label=name, marker=marker)
    for name in rows[0]["train"]:
        losses.plot(epochs, [row["train"][name] for row in rows], label=name.replace("->", " → "), marker=marker)
    errors.set(xlabel="epoch", ylabel="top-1 error on the test set, %", ylim=(0, None))
    losses.set(xlabel="epoch", ylabel="training loss and its terms, nats", yscale="log")
    for axes in (errors, losses):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]
