"""What predictors answered, and its analysis, as JSON and on a terminal."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from codistill.core.errors import printable
from codistill.evaluation.analysis import (
    Analysis,
    Disagreement,
    analyse,
    disagreements,
    largest_confusions,
    wilson_interval,
)
from codistill.evaluation.metrics import Scores
from codistill.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

SHOWN = 10
"""Lines of each list on a terminal."""
ALL_CLASSES = 20
"""The most classes of which each has a line there."""


def as_json(scores: Mapping[str, Scores], predictions: Predictions, class_names: Sequence[str]) -> str:
    """Write what `plain` returns as JSON, a line for each key of each predictor."""
    tables = []
    for name, each in plain(scores, predictions, class_names).items():
        lines = ",\n".join(
            f"    {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in each.items()
        )
        tables.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(tables) + "\n}"


def plain(
    scores: Mapping[str, Scores], predictions: Predictions, class_names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return scores and analysis of each predictor in plain types: `codistill evaluate --json` (docs/evaluate.md)."""
    found, classes = {}, len(class_names)
    compared = disagreements(predictions, classes)
    for name, each in scores.items():
        analysis = analyse(predictions, name, classes)
        bins, by_class = analysis.reliability, analysis.classes
        found[name] = {
            **asdict(each),
            "images": analysis.images,
            "top1_accuracy": analysis.top1_accuracy,
            "top1_error_interval": list(analysis.top1_error_interval),
            "top1_accuracy_interval": list(analysis.top1_accuracy_interval),
            "classes": [
                {"name": label, "images": images, "named": named, "recall": recall, "precision": precision}
                for label, images, named, recall, precision in zip(
                    class_names,
                    by_class.images.tolist(),
                    by_class.named.tolist(),
                    map(_number, by_class.recall.tolist()),
                    map(_number, by_class.precision.tolist()),
                    strict=True,
                )
            ],
            "confusion_matrix": analysis.confusion.tolist(),
            "calibration": [
                {"above": low, "up_to": high, "images": images, "confidence": sure, "accuracy": right}
                for low, high, images, sure, right in zip(
                    bins.edges.tolist(),
                    bins.edges.tolist()[1:],
                    bins.images.tolist(),
                    map(_number, bins.confidence.tolist()),
                    map(_number, bins.accuracy.tolist()),
                    strict=False,
                )
            ],
            "mistakes": [
                {
                    "image": predictions.place(mistake.image),
                    "label": class_names[mistake.label],
                    "named": class_names[mistake.named],
                    "confidence": mistake.confidence,
                    "label_probability": mistake.label_probability,
                }
                for mistake in analysis.mistakes
            ],
            "disagreement": {
                peer: _as_seen_by(name, pair, predictions, class_names)
                for pair in compared
                if name in pair.predictors
                for peer in pair.predictors
                if peer != name
            },
        }
    return found


def _number(value: float) -> float | None:
    """Return a number, or None in place of NaN, which JSON has not."""
    return None if math.isnan(value) else value


def _as_seen_by(name: str, pair: Disagreement, predictions: Predictions, class_names: Sequence[str]) -> dict[str, Any]:
    right = (pair.only_first_right, pair.only_second_right)
    own, peers = right if name == pair.predictors[0] else right[::-1]
    return {
        "images": pair.images,
        "share": pair.share,
        "only_this_right": own,
        "only_peer_right": peers,
        "both_wrong": pair.both_wrong,
        "by_class": pair.by_class.tolist(),
        "confident": [
            {
                "image": predictions.place(image),
                "label": class_names[predictions.labels[image]],
                **{each: class_names[predictions.predictors[each].named[image]] for each in pair.predictors},
            }
            for image in pair.confident
        ],
    }


def scores_table(scores: Mapping[str, Scores], predictions: Predictions) -> "Table":
    """Make the table of all predictors."""
    table = _list(None, {"predictor": "left"})
    for heading in (
        "accuracy\n%",
        "error\n%",
        "its 95 %\ninterval",
        "balanced\nerror %",
        "top-5\nerror %",
        "NLL",
        "ECE\n%",
    ):
        table.add_column(heading, justify="right")
    for name, each in scores.items():
        low, high = wilson_interval(int((~predictions.correct(name)).sum()), len(predictions))
        numbers = [f"{100 - each.top1_error:.2f}", f"{each.top1_error:.2f}", f"{low:.2f}-{high:.2f}"]
        numbers += [f"{value:.2f}" for value in (each.balanced_error, each.top5_error)]
        table.add_row(name, *numbers, f"{each.nll:.4f}", f"{each.ece:.2f}")
    return table


def where_wrong(predictions: Predictions, predictor: str, class_names: Sequence[str]) -> Iterator["RenderableType"]:
    """Yield what a terminal shows of where one predictor is wrong, and where the students disagree."""
    analysis = analyse(predictions, predictor, len(class_names))
    class_names = [printable(name) for name in class_names]
    if not analysis.mistakes:
        yield f"{predictor} names the label of every image"
        return
    yield _confusions(analysis, predictor, class_names)
    yield _classes(analysis, predictor, class_names)
    yield _calibration(analysis, predictor)
    yield _mistakes(analysis, predictions, predictor, class_names)
    if len(predictions.students) > 1:
        yield _disagreements(predictions, class_names)


def _list(title: str | None, headings: Mapping[str, str]) -> "Table":
    """Make an empty table without lines, of headings and how they are justified."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, justify in headings.items():
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def _confusions(analysis: Analysis, predictor: str, class_names: Sequence[str]) -> "Table":
    found = largest_confusions(analysis.confusion, SHOWN)
    headings = {"label": "left", "taken for": "left", "images": "right", "of that label": "right"}
    table = _list(f"{predictor}: most frequent confusions", headings)
    for each in found:
        table.add_row(class_names[each.label], class_names[each.named], str(each.images), f"{each.share:.1f} %")
    return table


def _classes(analysis: Analysis, predictor: str, class_names: Sequence[str]) -> "Table":
    scores, count = analysis.classes, len(class_names)
    order: Sequence[int] = range(count)
    title = f"{predictor}: classes"
    if count > ALL_CLASSES:
        # Classes without images have a recall of NaN.
        order = sorted((i for i in order if scores.images[i]), key=lambda i: (scores.recall[i], i))[:SHOWN]
        title = f"{predictor}: the {len(order)} classes of lowest recall of {count} (--json has all)"
    table = _list(title, {"class": "left", "images": "right", "recall %": "right", "precision %": "right"})
    for index in order:
        shares = (each[index] for each in (scores.recall, scores.precision))
        cells = ("-" if math.isnan(share) else f"{share:.1f}" for share in shares)
        table.add_row(class_names[index], str(scores.images[index]), *cells)
    return table


def _calibration(analysis: Analysis, predictor: str) -> "Table":
    bins = analysis.reliability
    sure = np.nansum(bins.confidence * bins.images) / analysis.images
    means = f"{100 * sure:.1f} % confident on average, right for {analysis.top1_accuracy:.1f} %"
    table = _list(
        f"{predictor}: calibration ({means})",
        {"confidence %": "right", "images": "right", "mean confidence %": "right", "accuracy %": "right"},
    )
    for index, images in enumerate(bins.images):
        if images:
            low, high = (f"{100 * bins.edges[place]:.0f}" for place in (index, index + 1))
            shares = (f"{100 * each[index]:.1f}" for each in (bins.confidence, bins.accuracy))
            table.add_row(f"{low}-{high}", str(images), *shares)
    return table


def _mistakes(analysis: Analysis, predictions: Predictions, predictor: str, class_names: Sequence[str]) -> "Table":
    headings = {"image": "left", "label": "left", "named": "left", "confidence %": "right"}
    table = _list(f"{predictor}: most confident mistakes", headings)
    for each in analysis.mistakes[:SHOWN]:
        names = class_names[each.label], class_names[each.named]
        table.add_row(printable(predictions.place(each.image)), *names, f"{100 * each.confidence:.1f}")
    return table


def _disagreements(predictions: Predictions, class_names: Sequence[str]) -> "Table":
    headings = {"one": "left", "other": "left", "images": "right", "%": "right"}
    headings |= {"only one\nright": "right", "only other\nright": "right", "none\nright": "right", "most in": "left"}
    table = _list("students that name different classes", headings)
    for pair in disagreements(predictions, len(class_names)):
        most = [index for index in (-pair.by_class).argsort(kind="stable")[:3] if pair.by_class[index]]
        where = ", ".join(f"{class_names[index]} ({pair.by_class[index]})" for index in most)
        counts = map(str, (pair.only_first_right, pair.only_second_right, pair.both_wrong))
        table.add_row(*pair.predictors, str(pair.images), f"{pair.share:.1f}", *counts, where)
    return table
