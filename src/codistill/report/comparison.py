"""The page that compares several runs; those that differ in the seed only are one group."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from codistill.core.errors import UsageError
from codistill.core.files import system_error, write_atomically
from codistill.report.curves import charts
from codistill.report.groups import Group, differing, placed, settings_of, text_of, told
from codistill.report.page import REPORT, page_title, render, run_page
from codistill.report.results import COLUMNS, count, error_table, numbers, predictors_of, spread, tables, unlike_tests
from codistill.report.sources import groups_of
from codistill.report.tradeoff import comparison_tradeoff
from codistill.runs.folder import RunFolder

LATEX = "% Written by codistill report for \\usepackage{booktabs}\n\n"
"""Begins the file of tables."""


def write_page(run: RunFolder, file: Path | None = None) -> Path:
    """Write the page of a run, and return its file.

    Args:
        run: One that has finished an epoch.
        file: Where to write; one that is no page of codistill is refused. None: report.html in the run's folder.

    Raises:
        UsageError: The file cannot be written, or is not such a page.
        CheckpointError: The run has not finished an epoch, or its files are damaged.
    """
    path = file or run.path / REPORT
    _refuse_foreign(path)
    _write(path, run_page(run))
    return path


def write_comparison(paths: Sequence[Path], file: Path | None = None) -> Path:
    """Write the page that compares runs, and beside it its tables as LaTeX and its numbers as CSV; return the page.

    Args:
        paths: Run folders, folders of them, or that of a sweep.
        file: Where to write; files that codistill did not write are refused. None: comparison.html, in the folder of
            the runs where that is the only path, else here.

    Raises:
        UsageError: A file cannot be written, or is there and not codistill's.
        CheckpointError: No run has finished an epoch, or the files of one are damaged.
    """
    alone = len(paths) == 1 and not (paths[0] / "config.json").exists()
    path = file or (paths[0] if alone else Path()) / "comparison.html"
    if path.suffix in (".tex", ".csv"):
        raise UsageError(f"{path}: the tables are written beside the page: end --out in .html")
    beside = {kind: path.with_suffix(f".{kind}") for kind in ("tex", "csv")}
    for each in (path, *beside.values()):
        _refuse_foreign(each)
    groups = groups_of(paths)
    latex = LATEX + "\n".join(each.latex() for each in tables(groups))
    page = comparison_page(groups, path.parent, latex, [each.name for each in beside.values()])
    for each, text in ((path, page), (beside["tex"], latex), (beside["csv"], numbers(groups).csv())):
        _write(each, text)
    return path


def _refuse_foreign(path: Path) -> None:
    """Raise `UsageError` where a file is there that codistill did not write."""
    try:
        content = b"" if path.is_dir() or not path.exists() else path.read_bytes()
    except OSError as error:
        raise system_error(error, path, fix="choose another --out") from None
    page = b'<meta name="generator" content="codistill">' in content[:2000]
    own = page or content.startswith((LATEX.encode(), ",".join(COLUMNS).encode()))
    if path.is_dir() or (content and not own):
        raise UsageError(f"{path}: is there, and not of codistill report: choose another --out")


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise system_error(error, path, fix="choose another --out") from None


def comparison_page(groups: Sequence[Group], folder: Path, latex: str, beside: Sequence[str]) -> str:
    """Return the page as HTML.

    Args:
        groups: At least one, with a run at least that has finished an epoch.
        folder: Where it will lie: links to the pages of the runs are relative to it.
        latex: Its tables, to be copied.
        beside: Names of the files beside it.
    """
    seen = [each for group in groups for each in group.runs]
    begun = [group for group in groups if group.runs]
    titles = list(dict.fromkeys(page_title(each) for each in seen if each.rows))
    data = list(dict.fromkeys(str(each.run.metadata["dataset"]["name"]) for each in seen))
    seeds = max(len(group.finished) for group in groups)
    lost = [[each.name, each.reason] for group in groups for each in group.lost if each.reason]
    waiting = [each.name for group in groups for each in group.lost if not each.reason]
    facts = [
        f"{sum(len(group.finished) for group in groups) + len(lost) + len(waiting)} runs",
        f"{len(groups)} {'group' if len(groups) == 1 else 'groups'} that differ in more than the seed",
    ]
    return render(
        "comparison.html",
        title=titles[0]
        if len(titles) == 1
        else f"{len(groups)} ways to train on {data[0]}"
        if len(data) == 1
        else f"{len(groups)} groups of runs",
        facts=[*facts, f"up to {seeds} seeds each" if seeds > 1 else "one seed each"],
        alerts=_alerts(groups),
        errors=_errors(groups),
        lost=lost,
        waiting=waiting,
        compared=tables(groups)[1:],
        charts=charts(begun),
        latency=comparison_tradeoff(begun),
        latex=latex,
        beside=beside,
        runs=_runs(groups, folder),
        differ=_differ(begun),
        shared=_shared(begun),
    )


def _alerts(groups: Sequence[Group]) -> list[str]:
    alerts = []
    if unlike_tests(groups):
        alerts.append("The runs have unlike test sets: their errors do not compare.")
    if len(groups) > 1 and any(len(group.finished) < 3 for group in groups if not group.lost):
        alerts.append("Some groups have fewer than three seeds: small differences may be chance.")
    return alerts


def _errors(groups: Sequence[Group]) -> dict[str, Any]:
    predictors = predictors_of(groups)
    headings = ["runs", "n", *(f"{name} %" for name in predictors), "parameters of student0", "images/s"]
    rows = []
    for group in groups:
        cells = [[count(group)], *(spread(group, name) for name in predictors)]
        parameters = {each.summary.get("parameters", {}).get("student0") for each in group.runs} - {None}
        cells.append([f"{max(parameters):,}"] if parameters else [])
        speeds = [each.summary["images_per_second"] for each in group.finished]
        cells.append([f"{statistics.fmean(speeds):,.0f}"] if speeds else [])
        rows.append({"name": group.name, "colour": group.colour, "cells": list(zip(headings[1:], cells, strict=True))})
    return {
        "headings": headings,
        "rows": rows,
        "caption": " ".join(error_table(groups).notes),
        "note": "The deviation is that of other seeds on the same test images; other test images would add to it.",
    }


def _runs(groups: Sequence[Group], folder: Path) -> dict[str, Any]:
    headings = ["run", "seed", "status", "epochs", "device", "folder"]
    rows = []
    for group in groups:
        for each in group.runs:
            page = each.run.path / REPORT
            link = quote(os.fsencode(os.path.relpath(page, folder))) if page.exists() else ""
            status = str(each.summary.get("status", "not finished"))
            device = str(each.run.metadata["environment"].get("device", ""))
            cells = [str(each.seed), status, str(len(each.rows)), device, str(each.run.path)]
            row = {"name": each.run.path.name, "colour": group.colour, "link": link}
            rows.append({**row, "cells": list(zip(headings[1:], cells, strict=True))})
    return {"headings": headings, "rows": rows}


def _differ(groups: Sequence[Group]) -> dict[str, Any]:
    keys = differing([group.runs[0].run for group in groups])
    settings = [placed(group.runs[0].run) for group in groups]
    rows = [[key, *(text_of(each[key]) if key in each else "" for each in settings)] for key in told(keys)]
    return {"headings": ["setting", *(group.name for group in groups)], "rows": rows}


def _shared(groups: Sequence[Group]) -> list[tuple[str, str]]:
    differ = set(differing([group.runs[0].run for group in groups])) | {"seed"}
    return [(key, text_of(value)) for key, value in settings_of(groups[0].runs[0].run).items() if key not in differ]
