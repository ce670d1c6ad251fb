"""The page of a run, made from the files of its folder alone."""

import html
import json
from collections.abc import Mapping
from typing import Any

from codistill.core.console import duration, warn
from codistill.core.extras import missing_package
from codistill.core.files import write_atomically
from codistill.report.figures import curves
from codistill.runs.choice import ERRORS, choice
from codistill.runs.folder import RunFolder


def write_report(run: RunFolder, summary: Mapping[str, Any]) -> None:
    """Write `report.html` of a finished run: scores, curves and settings in one file that loads nothing else.

    Curves that cannot be drawn cost a warning, and the page says so.
    """
    import jinja2

    try:
        drawing = curves(run.metrics())
    except Exception as error:
        # A run is worth more than its picture.
        failed = missing_package(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        warn(f"{run.path / 'report.html'} has no curves, for drawing them failed ({failed}); metrics.jsonl holds them")
        drawing = f"<p>The drawing failed ({html.escape(failed)}); metrics.jsonl holds the numbers.</p>"

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("codistill.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=f"{summary['method']} on {summary['data']}, {summary['epochs']} epochs, seed {summary['seed']}",
        summary=summary,
        keys={split: key for split, key in ERRORS.items() if split in summary},
        choice=choice(summary),
        duration=duration(summary["wall_seconds"]),
        curves=drawing,
        settings=json.dumps({key: value for key, value in run.metadata.items() if key != "dataset"}, indent=2),
    )
    write_atomically(run.path / "report.html", page.encode(errors="backslashreplace"))
