"""Pages and tables made from run folders; knows nothing but their files."""

import io
import json
from collections.abc import Mapping
from typing import Any

import jinja2
from matplotlib.figure import Figure

from codistill.core.console import duration
from codistill.core.files import write_atomically
from codistill.runs.folder import RunFolder


def write_report(run: RunFolder, summary: Mapping[str, Any]) -> None:
    """Write `report.html` of a run: scores, curves and settings in one file that loads nothing else.

    Args:
        run: Where metrics.jsonl and config.json are, and the page will be.
        summary: What summary.json of a finished run says.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("codistill.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=f"{summary['method']} on {summary['data']}, {summary['epochs']} epochs, seed {summary['seed']}",
        summary=summary,
        duration=duration(summary["wall_seconds"]),
        curves=curves(run.metrics()),
        settings=json.dumps({key: value for key, value in run.metadata.items() if key != "dataset"}, indent=2),
    )
    write_atomically(run.path / "report.html", page.encode())


def curves(rows: list[dict[str, Any]]) -> str:
    """Draw test errors and loss terms over the epochs.

    Args:
        rows: The lines of metrics.jsonl.

    Returns:
        An SVG element.
    """
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
