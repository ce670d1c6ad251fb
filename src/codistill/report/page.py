"""The page of a run, made from the files of its folder alone."""

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from codistill.core.console import duration, warn
from codistill.core.errors import CheckpointError, UsageError, typed_reason
from codistill.core.extras import missing_package
from codistill.core.files import write_atomically
from codistill.core.imports import trained_with
from codistill.evaluation.analysis import Analysis, analyse, wilson_interval
from codistill.evaluation.predictions import Predictions
from codistill.methods import METHODS
from codistill.report.advice import advice
from codistill.report.curves import charts, colour_of
from codistill.report.failures import (
    attention_section,
    disagreement_section,
    reliability_section,
    wrong_section,
)
from codistill.report.groups import Group, Seen, seen_in, settings_of, text_of
from codistill.report.pictures import read_pictures
from codistill.report.tradeoff import run_tradeoff
from codistill.runs.choice import choice, chosen_by, lowest_student, top1_errors
from codistill.runs.folder import RunFolder
from codistill.runs.latency import FILE as LATENCY
from codistill.runs.latency import read_latency
from codistill.runs.predictions import read_predictions
from codistill.settings.config import default_config

if TYPE_CHECKING:
    from markupsafe import Markup

T = TypeVar("T")

REPORT = "report.html"


def write_report(run: RunFolder, summary: Mapping[str, Any]) -> None:
    """Write `report.html` of a run: what its files hold, in one page that loads nothing else.

    What predictions.npz, report-images.npz and latency.json would add is left out where they are absent or damaged, and
    the page says so.

    Raises:
        CheckpointError: No epoch has been finished.
    """
    page = run_page(run, summary)
    write_atomically(run.path / REPORT, page.encode(errors="backslashreplace"))


@contextmanager
def page_if_possible(run: RunFolder) -> Iterator[None]:
    """Warn where making the page of a run fails: a run is worth more than its page."""
    try:
        yield
    except Exception as error:
        reason = missing_package(error) or typed_reason(error)
        warn(f"{run.path / REPORT} is not written: {reason}; the other files of the run hold it all")


def render(template: str, **content: Any) -> str:
    """Return a page made from a template of this package."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("codistill.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["code"] = with_code
    page = environment.get_template(template).render(version=importlib.metadata.version("codistill"), **content)
    return page.replace(" %", "\N{NO-BREAK SPACE}%")


def with_code(text: str) -> "Markup":
    """Return a text, escaped, with what is between backticks, and flags, as code."""
    from markupsafe import Markup, escape

    def code(found: re.Match[str]) -> str:
        words = found[1] or found[2]
        return f'<code class="short">{words}</code>' if len(words) < 28 else f"<code>{words}</code>"

    return Markup(re.sub(r"`([^`]+)`|(?<!\S)(--[a-z][\w-]*)", code, str(escape(text))))


def seen_run(run: RunFolder, summary: Mapping[str, Any] | None = None) -> Seen:
    """Return what a folder tells; `summary`: that of a run whose file is not written yet."""
    seen = seen_in(run, summary)
    if not seen.rows:
        why = f" ({seen.summary['error']})" if seen.summary.get("error") else ""
        raise CheckpointError(f"{run.path}: no epoch has been finished{why}: there is nothing to report yet")
    return seen


def run_page(run: RunFolder, summary: Mapping[str, Any] | None = None) -> str:
    """Return the page of a run as HTML; see `write_report`."""
    seen = seen_run(run, summary)
    missing: list[str] = []

    def section(name: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except Exception as error:  # a run is worth more than a part of its page
            words = typed_reason(error)
            missing.append(f"{name}: making it failed ({words}); the other files of the run hold the numbers.")
            warn(f"{run.path / REPORT} lacks a part: {missing[-1]}")
        return None

    classes = run.class_names
    found = _predictions(run, missing) if seen.last else None
    analyses = {name: analyse(found, name, len(classes)) for name in found.predictors} if found else {}
    pictures = read_pictures(run.path) if found else None
    if found and pictures is None:
        missing.append(f"Pictures: `codistill report {run.path}` makes them where the data set is there.")
    latency = section("Latency against error", lambda: _latency(seen))
    if latency is None and not (run.path / LATENCY).exists():
        missing.append(f"Latency against error: `codistill report {run.path} --latency` measures it on this machine.")
    content: dict[str, Any] = {
        "title": page_title(seen),
        "folder": run.path.name,
        "facts": _facts(seen),
        "alert": _alert(seen),
        "charts": section("Curves", lambda: charts([Group("", "c0", [seen])])),
        "latency": latency,
        "choice": choice(seen.summary) if seen.finished else "",
        "warnings": [f"epoch {row['epoch'] + 1}: {each}" for row in seen.rows for each in row.get("warnings", ())],
        **dict.fromkeys(("tiles", "advice", "predictors", "wrong", "reliability", "disagreement", "attention")),
        **_settings(run),
    }
    if seen.last:
        content["tiles"] = section("Key numbers", lambda: _tiles(seen))
        content["advice"] = section("What to try next", lambda: advice(seen, analyses, latency is not None))
        content["predictors"] = section("Predictors", lambda: _predictors(seen, analyses))
    if seen.last and found:
        student = lowest_student(seen.last)[0]
        content["wrong"] = section("Mistakes", lambda: wrong_section(found, analyses, student, classes, pictures))
        content["reliability"] = section("Calibration", lambda: reliability_section(analyses))
        if len(found.students) > 1:
            content["disagreement"] = section("Disagreement", lambda: disagreement_section(found, classes, pictures))
        if pictures:
            content["attention"] = section("Attention", lambda: attention_section(found, pictures, classes))
    content["missing"] = missing
    anchors = {
        "next": ("advice", "What to try next"),
        "predictors": ("predictors", "Predictors"),
        "curves": ("charts", "Curves"),
        "wrong": ("wrong", "Where it is wrong"),
        "calibration": ("reliability", "Calibration"),
        "disagreement": ("disagreement", "Disagreement"),
        "attention": ("attention", "Attention"),
        "latency": ("latency", "Latency"),
        "settings": ("settings", "Settings"),
    }
    sections = [(anchor, name) for anchor, (key, name) in anchors.items() if content[key]]
    return render("report.html", sections=sections, **content)


def _predictions(run: RunFolder, missing: list[str]) -> Predictions | None:
    """Return what was answered on the test set, of the last checkpoint; None: why is added to what is missing."""
    try:
        return read_predictions(run)["test"]
    except CheckpointError as error:
        missing.append(f"Confusions, calibration, mistakes and disagreement: {error}.")
    return None


def _latency(seen: Seen) -> dict[str, Any] | None:
    errors = top1_errors(seen.last, "test") if seen.last else {}
    intervals = {name: interval_of(seen, error) for name, error in errors.items()}
    return run_tradeoff(seen, read_latency(seen.run), intervals)


def page_title(seen: Seen) -> str:
    """Return what a run is, in a few words: its method, and the data set or, of one's own, its folder or file."""
    metadata = seen.run.metadata
    method, data = str(metadata["method"]["name"]), str(metadata["dataset"]["name"])
    if data in ("folder", "huggingface", "packed", "table") and metadata.get("data_dir"):
        data = Path(metadata["data_dir"]).name or data
    known = METHODS.get(method)
    return f"{known.title or known.__name__ if known else method} on {data}"


def _facts(seen: Seen) -> list[str]:
    metadata, summary = seen.run.metadata, seen.summary
    facts = metadata["dataset"]
    height, width = seen.run.image_size
    words = [
        " + ".join(seen.networks),
        f"{len(seen.rows)} epochs" if seen.finished else f"{len(seen.rows)} of {metadata.get('epochs')} epochs",
    ]
    words.append(f"seed {metadata.get('seed')}")
    limit = metadata.get("train_limit")
    limited = f"{limit:,} of " if limit and limit < facts.get("train_images", 0) else ""
    images = [
        f"{some}{facts[key]:,} {split}"
        for key, split, some in (("train_images", "training", limited), ("test_images", "test", ""))
        if key in facts
    ]
    words.append(f"{' and '.join(images)} images of {height} x {width}, {len(seen.run.class_names)} classes")
    environment = summary.get("environment") or metadata["environment"]
    words.append(f"{environment.get('device')}, torch {environment.get('torch')}")
    return words


def _alert(seen: Seen) -> str:
    if seen.finished:
        return ""
    status = seen.summary.get("status", "not finished")
    error = seen.summary.get("error")
    words = f"This run is {status}{': ' + str(error) if error else ''}."
    flags = f" {trained_with(seen.run.metadata)}" if seen.run.metadata.get("imports") else ""
    return words if status == "diverged" else f"{words} `codistill resume {seen.run.path}{flags}` continues it."


def interval_of(seen: Seen, error: float) -> tuple[float, float] | None:
    """Return the 95 % interval of an error on the test set, percent; None: the number of its images is unknown."""
    images = seen.images("test")
    return wilson_interval(round(error / 100 * images), images) if images else None


def _tiles(seen: Seen) -> list[tuple[str, str, str, str]]:
    last = seen.last
    assert last is not None
    student, _ = lowest_student(last)
    errors = top1_errors(last, "test")
    tiles = []
    for name in (student, *(each for each in ("fused", "ensemble") if each in errors)):
        interval = interval_of(seen, errors[name])
        words = f"95 %: {interval[0]:.1f} to {interval[1]:.1f}" if interval else "after the last epoch"
        best = name == student and len(seen.students) > 1
        title = "Error of the best student" if best else f"Error of {name}"
        tiles.append((title, f"{errors[name]:.2f}", "%", f"{name}, {words}" if best else words))
    differ = last.get("diversity", {}).get("disagreement")
    if len(seen.students) > 1 and differ is not None:
        tiles.append(("Students disagree on", f"{differ:.1f}", "%", "of the test images"))
    if (seconds := seen.summary.get("wall_seconds")) is not None:
        tiles.append(
            ("Time in all", duration(seconds), "", f"{seen.summary['images_per_second']:,.0f} images/s in training")
        )
    return tiles


def _predictors(seen: Seen, analyses: Mapping[str, Analysis]) -> dict[str, Any]:
    """Return the table of predictors: a row each, on the test set; validation errors beside them if there are any."""
    last, best = seen.last, seen.best
    assert last is not None and best is not None
    errors, at_best = top1_errors(last, "test"), top1_errors(best, "test")
    held = top1_errors(last, "validation") if "validation" in last else {}
    bounds = {name: interval_of(seen, error) for name, error in errors.items()}
    known = [each for each in bounds.values() if each]
    scale = (min((each[0] for each in known), default=0.0), max((each[1] for each in known), default=100.0))
    rows = []
    for name, error in errors.items():
        scores, interval = last["test"][name], bounds[name]
        parameters = seen.summary.get("parameters", {}).get(name)
        cells = {
            "top-1 error %": f"{error:.2f}",
            "95 % interval": f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "",
            "": _range(interval, error, scale, colour_of(name)),
            **({"validation %": f"{held[name]:.2f}"} if held else {}),
            f"best epoch ({best['epoch'] + 1}) %": f"{at_best[name]:.2f}",
            **({"balanced %": f"{analyses[name].balanced_error:.2f}" if name in analyses else ""} if analyses else {}),
            "top-5 %": f"{scores['top5_error']:.2f}",
            "NLL": f"{scores['nll']:.4f}",
            "ECE %": f"{scores['ece']:.2f}",
            "parameters": f"{parameters:,}" if parameters is not None else "",
        }
        rows.append({"name": name, "colour": colour_of(name), "cells": list(cells.items())})
    held_out = f"; validation: {_held_out(seen, 'images')}" if held else ""
    return {
        "headings": ["predictor", *(heading for heading, _ in rows[0]["cells"])],
        "rows": rows,
        "caption": f"On the test set after the last epoch{held_out}",
        "note": _chosen_on(seen),
    }


def _range(interval: tuple[float, float] | None, error: float, scale: tuple[float, float], colour: str) -> "Markup":
    """Draw an interval as a bar with a point on a scale, which all predictors have in common; empty without one."""
    from markupsafe import Markup

    if interval is None:
        return Markup("")
    low, high, at = (f"{100 * (each - scale[0]) / (scale[1] - scale[0]):.1f}%" for each in (*interval, error))
    return Markup(
        f'<svg class="range {colour}" aria-hidden="true"><line class="axis" x1="0" x2="100%" y1="50%" y2="50%"/>'
        f'<line x1="{low}" x2="{high}" y1="50%" y2="50%"/><circle cx="{at}" cy="50%" r="4"/></svg>'
    )


def _chosen_on(seen: Seen) -> str:
    assert seen.last is not None
    if chosen_by(seen.last) == "test":
        return (
            "The best epoch is the one with the lowest student error on this test set, which flatters it; quote the "
            "last epoch, or choose on held-out training images with --validation."
        )
    return f"The best epoch was chosen on {_held_out(seen, 'validation images')}."


def _held_out(seen: Seen, what: str) -> str:
    count = seen.images("validation")  # not known before the end of a run
    return f"{f'{count:,} ' if count else ''}{what} held out of the training set"


def _settings(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run beside their defaults, and the rest of its config.json, flat."""
    settings = settings_of(run)
    try:
        plain = default_config(str(run.metadata["method"]["name"])).as_mapping()
        defaults = {**plain, **{f"method.{key}": value for key, value in plain["method"].items()}}
    except UsageError:  # a method of the user's own, which is not registered here
        defaults = {}
    rows, changed = [], []
    for key, value in settings.items():
        differs = key in defaults and defaults[key] != value
        rows.append((key, text_of(value), text_of(defaults[key]) if differs else ""))
        if differs and key not in ("networks", "data", "method.name", "seed"):
            changed.append(f"{key} {text_of(value)} ({text_of(defaults[key])})")
    words = (
        f"Other than by default, which stands in brackets: {', '.join(changed)}."
        if changed
        else "All settings are the defaults."
    )
    among = {each.partition(".")[0] for each in settings}
    others = {key: value for key, value in run.metadata.items() if key not in among}
    return {"settings": rows, "changed": words if defaults else "", "environment": list(_flat("", others))}


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), each)
    else:
        yield prefix, text_of(value)
