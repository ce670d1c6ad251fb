"""Sections of a page on single images: confusions, calibration, mistakes, disagreement, attention."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from codistill.evaluation.analysis import Analysis, disagreements, largest_confusions, row_shares
from codistill.evaluation.predictions import Predictions
from codistill.report.curves import Chart, colour_of
from codistill.report.pictures import DISPUTED, MISTAKES, Pictures, png, veil
from codistill.report.plots import Line, reliability_plot

MOST_CLASSES = 20
"""In a confusion matrix with names; one of more classes is a picture."""
NUMBERED = 14
"""Most classes of a matrix whose cells have numbers."""
FLAT = 0.05
"""Difference of the weights of an image's places, below which attention does next to nothing."""
PIXELATED = 64
"""Longest side of images that are shown as squares, in place of a blur, pixels."""


def wrong_section(
    predictions: Predictions,
    analyses: Mapping[str, Analysis],
    student: str,
    classes: Sequence[str],
    pictures: Pictures | None,
) -> dict[str, Any]:
    """Return what the page says of the mistakes of a student."""
    found = analyses[student]
    wrong = found.images - int(found.confusion.diagonal().sum())
    low, high = found.top1_error_interval
    lead = (
        f"{wrong:,} of {found.images:,} test images are wrong: {found.top1_error:.2f} %, with 95 % confidence from "
        f"{low:.1f} to {high:.1f} % for images of the same kind. The mean over classes is {found.balanced_error:.2f} %."
    )
    scores = found.classes
    order = np.argsort(np.where(scores.images > 0, scores.recall, np.inf), kind="stable")
    rows = [(classes[i], f"{scores.images[i]:,}", _share(scores.recall[i]), _share(scores.precision[i])) for i in order]
    pairs = [
        (classes[each.label], classes[each.named], str(each.images), f"{each.share:.1f} %")
        for each in largest_confusions(found.confusion, 10)
    ]
    small = len(classes) <= MOST_CLASSES
    return {
        "student": student,
        "lead": lead,
        "matrix": _matrix(found, classes) if small else None,
        "heat": None if small else _heat(found.confusion),
        "confusions": pairs,
        "classes": rows,
        "mistakes": [
            card(
                predictions,
                each.image,
                classes[each.label],
                [f"taken for {classes[each.named]}, {100 * each.confidence:.0f} %"],
                pictures,
            )
            for each in found.mistakes[:MISTAKES]
        ],
    }


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.1f}"


def card(
    predictions: Predictions, image: int, label: str, words: Sequence[str], pictures: Pictures | None
) -> dict[str, Any]:
    """Return an image of a gallery: its label, and what is said of it, a line each."""
    place = predictions.place(image)
    return {
        "image": pictures.of(int(predictions.positions[image])) if pictures else None,
        "pixels": pictures is not None and max(pictures.images.shape[1:3]) <= PIXELATED,
        "label": label,
        "words": words,
        "file": place if predictions.files else f"test image {place}",
    }


def _matrix(found: Analysis, classes: Sequence[str]) -> dict[str, Any]:
    """Return the confusion matrix, each cell as strong as its share of the row."""
    rows = []
    for label, counts in enumerate(found.confusion):
        images = max(1, int(counts.sum()))
        cells = []
        for named, count in enumerate(counts):
            kind = "none" if count == 0 else "right" if named == label else "wrong"
            strength = (
                round(100 * (0.08 + 0.5 * count / images))
                if named == label
                else round(100 * (0.12 + 0.88 * min(1.0, 2.5 * count / images)) * 0.6)
            )
            what = f"{count} of {images} {classes[label]}: {classes[named]}"
            cells.append((kind, strength, str(count) if count and len(classes) <= NUMBERED else "", what))
        rows.append((classes[label], cells))
    caption = "Rows: the label; columns: the class that was named; test images"
    return {"names": list(classes), "rows": rows, "caption": caption}


def _heat(confusion: npt.NDArray[np.int64]) -> str:
    """Return a confusion matrix as a picture: blue for right, orange for wrong, opaque for the whole row."""
    share = row_shares(confusion)
    pixels = np.empty((*share.shape, 4))
    pixels[..., :3] = (200, 96, 10)
    pixels[..., 3] = 255 * np.minimum(1, 3 * share)
    diagonal = np.arange(len(share))
    pixels[diagonal, diagonal, :3] = (10, 110, 189)
    pixels[diagonal, diagonal, 3] = 255 * share.diagonal()
    return png(pixels.round().astype(np.uint8))


def reliability_section(analyses: Mapping[str, Analysis]) -> dict[str, Any]:
    """Return the reliability diagram of all predictors, without bins of less than five images, and their means."""
    lines, legend, rows, said = [], [], [], []
    for name, each in analyses.items():
        bins = each.reliability
        kept = np.flatnonzero(bins.images >= min(5, bins.images.max()))
        lines.append(
            Line(name=name, x=bins.confidence[kept].tolist(), y=bins.accuracy[kept].tolist(), colour=colour_of(name))
        )
        legend.append((name, colour_of(name), ""))
        said.append(f"{name} has an expected calibration error of {bins.ece:.1f} %")
        rows += [
            (
                name,
                f"{bins.edges[i]:.2f} to {bins.edges[i + 1]:.2f}",
                str(bins.images[i]),
                f"{bins.confidence[i]:.3f}",
                f"{bins.accuracy[i]:.3f}",
            )
            for i in np.flatnonzero(bins.images)
        ]
    title = "Share of right answers against confidence"
    svg = reliability_plot(title, "; ".join(said) + ".", lines)
    note = "15 bins of equal width; points of fewer than five images are left out."
    means = []
    for name, each in analyses.items():
        bins = each.reliability
        sure = float(np.nansum(bins.images * bins.confidence) / bins.images.sum())
        means.append((name, f"{100 * sure:.1f} %", f"{each.top1_accuracy:.1f} %", f"{bins.ece:.1f} %"))
    headings = ["predictor", "confidence", "images", "mean confidence", "right"]
    return {"chart": Chart(title, svg, legend, note, headings, rows), "rows": means}


def disagreement_section(predictions: Predictions, classes: Sequence[str], pictures: Pictures | None) -> dict[str, Any]:
    """Return what the page says of images for which students name different classes."""
    students = predictions.students
    right = np.stack([predictions.correct(name) for name in students])
    named = np.stack([predictions.predictors[name].named for name in students])
    disputed = (named != named[0]).any(axis=0)
    images = len(predictions)
    none, every = int((~right.any(axis=0)).sum()), int(right.all(axis=0).sum())
    some = 100 * (images - every - none) / images
    lead = (
        f"The {len(students)} students name different classes for {100 * disputed.mean():.1f} % of test images. "
        f"All are right in {100 * every / images:.1f} %, none in {100 * none / images:.1f} %; of the "
        f"other {some:.1f} % some know what others do not."
    )
    of_class = np.bincount(predictions.labels, minlength=len(classes))
    counts = np.bincount(predictions.labels[disputed], minlength=len(classes))
    share = counts / np.maximum(1, of_class)
    worst = [int(i) for i in np.argsort(-share, kind="stable")[:8] if counts[i]]
    cards: list[dict[str, Any]] = []
    shown: set[int] = set()
    pairs = disagreements(predictions, len(classes), DISPUTED)
    for pair in pairs:
        for image in pair.confident:
            if image in shown or len(cards) >= DISPUTED:
                continue
            shown.add(image)
            says = [
                f"{each}: {classes[ranked.named[image]]} {100 * ranked.confidence[image]:.0f} %"
                for each, ranked in ((name, predictions.predictors[name]) for name in pair.predictors)
            ]
            cards.append(card(predictions, image, classes[predictions.labels[image]], says, pictures))
    return {
        "lead": lead,
        "matrix": _pairs(predictions),
        "classes": [(classes[i], f"{counts[i]} of {of_class[i]}", f"{100 * share[i]:.1f} %") for i in worst],
        "cards": cards,
    }


def _pairs(predictions: Predictions) -> dict[str, Any]:
    """Return the matrix of how often two predictors name different classes."""
    names = list(predictions.predictors)
    share = {name: {name: 0.0} for name in names}
    for one, other in combinations(names, 2):
        differ = 100 * float((predictions.predictors[one].named != predictions.predictors[other].named).mean())
        share[one][other] = share[other][one] = differ
    most = max(max(row.values()) for row in share.values()) or 1.0
    rows = [
        (
            one,
            [
                (
                    "none" if one == other else "plain",
                    round(8 + 45 * share[one][other] / most),
                    "" if one == other else f"{share[one][other]:.1f}",
                    f"{one} and {other}",
                )
                for other in names
            ],
        )
        for one in names
    ]
    return {"names": names, "rows": rows, "caption": "Test images for which two predictors name different classes, %"}


def attention_section(predictions: Predictions, pictures: Pictures, classes: Sequence[str]) -> dict[str, Any] | None:
    """Return the attention laid over images; None: the method has none."""
    names = list({**pictures.channels, **pictures.places})
    if not names:
        return None
    where = {int(position): image for image, position in enumerate(predictions.positions)}
    images = []
    for index, position in enumerate(pictures.attended):
        image, found = where.get(int(position)), pictures.of(int(position))
        if image is None or found is None:
            continue
        maps, says = [], []
        for name in names:
            kinds = pictures.places.get(name), pictures.channels.get(name)
            weights = [None if each is None else np.atleast_2d(each[index]) for each in kinds]
            first = next(each for each in weights if each is not None)
            words = f"{first.min():.3f} to {first.max():.3f}"
            maps.append((name, *(None if each is None else veil(each) for each in weights), words))
            if name in predictions.predictors:
                answer = predictions.predictors[name].named[image]
                says.append(f"{name} {'right' if answer == predictions.labels[image] else f'says {classes[answer]}'}")
        label = classes[predictions.labels[image]]
        images.append(
            {
                "image": found,
                "alt": f"Test image of {label}",
                "pixels": max(pictures.images.shape[1:3]) <= PIXELATED,
                "maps": maps,
                "text": f"{label}: {', '.join(says)}",
            }
        )
    if not images:
        return None
    fused = "The fused classifier sees the maps of all students: the mean of their weights, and all their channels."
    height, width = pictures.images.shape[1:3]
    spans = [float((each.max(axis=(1, 2)) - each.min(axis=(1, 2))).max()) for each in pictures.places.values()]
    span = max(spans, default=1.0)
    flat = (
        f"Within each of these images the weights of places differ by at most {span:.3f}: the attention hardly "
        "chooses between places, for its sigmoid is saturated. The pictures show the order of places, which has next "
        "to no effect here; `--method.attention_norm true` starts at 1/2."
    )
    return {
        "flat": flat if span < FLAT else "",
        "images": images,
        "columns": 1 + len(names),
        "ratio": f"{width} / {height}",
        "fused": fused if "fused" in names else "",
        "places": bool(pictures.places),
        "channels": bool(pictures.channels),
    }
