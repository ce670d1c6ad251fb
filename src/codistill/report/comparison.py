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
from codistill.report.groups import Group, Seen, differing, grouped, settings_of, text_of
from codistill.report.page import REPORT, page_title, render, run_page, seen_run
from codistill.report.tradeoff import comparison_tradeoff
from codistill.runs.folder import RunFolder

MARK = b'<meta name="generator" content="codistill">'


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """Return run folders: of each path itself, or where it is no run, those directly in it; each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        inner = (
            sorted(each.parent for each in path.glob("*/config.json")) if not (path / "config.json").exists() else []
        )
        for each in inner or [path]:
            found.setdefault(each.resolve(), each)
    return list(found.values())


def write_pages(runs: Sequence[RunFolder], file: Path | None = None) -> Path:
    """Write the page of one run, or one that compares several, and return its file.

    Args:
        runs: At least one.
        file: Where to write; one that is no page of codistill is refused. None: report.html in the folder of the one
            run, comparison.html in the current folder for several.

    Raises:
        UsageError: The file cannot be written, or is not such a page.
        CheckpointError: A run has not finished an epoch, or its files are damaged.
    """
    path = file or (runs[0].path / REPORT if len(runs) == 1 else Path("comparison.html"))
    try:
        if path.is_dir() or (path.exists() and path.stat().st_size and not _own(path.read_bytes())):
            raise UsageError(f"{path}: is there, and no page of codistill: choose another --out")
        page = run_page(runs[0]) if len(runs) == 1 else comparison_page(list(map(seen_run, runs)), path.parent)
        write_atomically(path, page.encode(errors="backslashreplace"))
    except OSError as error:
        raise system_error(error, path, fix="choose another --out") from None
    return path


def _own(content: bytes) -> bool:
    """Whether a file is a page of this version, or of one before pages named their maker."""
    return MARK in content[:2000] or b"<h2>Curves</h2>" in content


def comparison_page(seen: Sequence[Seen], folder: Path) -> str:
    """Return the page as HTML; links to the pages of the runs are relative to a folder."""
    groups = grouped(seen)
    titles = list(dict.fromkeys(page_title(each) for each in seen))
    data = list(dict.fromkeys(str(each.run.metadata["dataset"]["name"]) for each in seen))
    seeds = max(len(group.runs) for group in groups)
    facts = [
        f"{len(seen)} runs",
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
        alerts=_alerts(seen, groups),
        errors=_errors(groups),
        charts=charts(groups),
        latency=comparison_tradeoff(groups),
        runs=_runs(groups, folder),
        differ=_differ(groups),
        shared=_shared(groups),
    )


def _alerts(seen: Sequence[Seen], groups: Sequence[Group]) -> list[str]:
    alerts = []
    digests = {
        repr(
            sorted(
                (key, value)
                for key, value in each.run.metadata["dataset"].get("sha256", {}).items()
                if key.startswith("test")
            )
        )
        for each in seen
    }
    if len(digests) > 1:
        alerts.append("The runs have unlike test sets: their errors do not compare.")
    lost = [each.run.path.name for each in seen if not each.finished]
    if lost:
        alerts.append(f"Not finished, and shown as far as they came: {', '.join(lost)}.")
    if len(groups) > 1 and any(len(group.runs) < 3 for group in groups):
        alerts.append("Some groups have fewer than three seeds: small differences may be chance.")
    return alerts


def _errors(groups: Sequence[Group]) -> dict[str, Any]:
    predictors = list(dict.fromkeys(name for group in groups for each in group.runs for name in each.predictors))
    predictors.sort(key=lambda name: not name.startswith("student"))
    headings = ["runs", "seeds", *(f"{name} %" for name in predictors), "parameters of student0", "images/s"]
    rows = []
    for group in groups:
        cells = [str(len(group.runs))]
        for name in predictors:
            errors = [
                each.last["test"][name]["top1_error"] for each in group.runs if each.last and name in each.last["test"]
            ]
            cells.append(_spread(errors))
        parameters = {each.summary.get("parameters", {}).get("student0") for each in group.runs} - {None}
        cells.append(f"{max(parameters):,}" if parameters else "")
        speeds = [each.summary["images_per_second"] for each in group.runs if each.finished]
        cells.append(f"{statistics.fmean(speeds):,.0f}" if speeds else "")
        rows.append({"name": group.name, "colour": group.colour, "cells": list(zip(headings[1:], cells, strict=True))})
    return {
        "headings": headings,
        "rows": rows,
        "caption": "After the last epoch; mean ± sample standard deviation over seeds",
        "note": "The deviation is that of other seeds on the same test images; other test images would add to it.",
    }


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _runs(groups: Sequence[Group], folder: Path) -> dict[str, Any]:
    headings = ["run", "seed", "status", "epochs", "device", "folder"]
    rows = []
    for group in groups:
        for each in group.runs:
            link = os.path.relpath(each.run.path / REPORT, folder)
            status = str(each.summary.get("status", "not finished"))
            device = str(each.run.metadata["environment"].get("device", ""))
            cells = [str(each.run.metadata.get("seed")), status, str(len(each.rows)), device, str(each.run.path)]
            row = {"name": each.run.path.name, "colour": group.colour, "link": quote(link)}
            rows.append({**row, "cells": list(zip(headings[1:], cells, strict=True))})
    return {"headings": headings, "rows": rows}


def _differ(groups: Sequence[Group]) -> dict[str, Any]:
    keys = differing([group.runs[0].run for group in groups])
    settings = [settings_of(group.runs[0].run) for group in groups]
    rows = [[key, *(text_of(each[key]) if key in each else "" for each in settings)] for key in keys]
    return {"headings": ["setting", *(group.name for group in groups)], "rows": rows}


def _shared(groups: Sequence[Group]) -> list[tuple[str, str]]:
    differ = set(differing([group.runs[0].run for group in groups])) | {"seed"}
    return [(key, text_of(value)) for key, value in settings_of(groups[0].runs[0].run).items() if key not in differ]
