"""Which student of a run is the best: by validation errors where training images are held out, else by test errors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

ERRORS = {"validation": "validation_top1_error", "test": "top1_error"}
"""Split to the key of its errors in summary.json; those of the best epoch have the prefix `best_epoch_`."""


def evaluated(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of metrics.jsonl of epochs that ended with an evaluation, as the last one does."""
    return [row for row in rows if "test" in row]


def epochs_done(summary: Mapping[str, Any]) -> int:
    """Return how many epochs a finished run trained: fewer than it was to where its patience ended."""
    return int(summary.get("stopped_early", summary["epochs"]))


def chosen_by(row: Mapping[str, Any]) -> str:
    """Return the split whose errors choose epoch and student: validation, or test in a run that holds no images out."""
    return "validation" if "validation" in row else "test"


def top1_errors(row: Mapping[str, Any], split: str) -> dict[str, float]:
    """Return the top-1 error of each predictor on a split, percent, from a line of metrics.jsonl."""
    return {name: float(scores["top1_error"]) for name, scores in row[split].items()}


def lowest_student(row: Mapping[str, Any]) -> tuple[str, float]:
    """Return the student with the lowest error of an epoch, and that error, percent; of equal ones the first student.

    Ensemble and fused classifier are no candidates: they need all students. NaN is above every error.
    """
    errors = top1_errors(row, chosen_by(row))
    students = [name for name in errors if name.startswith("student")]
    name = min(students, key=lambda name: (math.isnan(errors[name]), errors[name], len(name), name))
    return name, errors[name]


def prefix_of(which: str) -> str:
    """Return what keys of summary.json begin with for the `last` or the `best` checkpoint."""
    return "best_epoch_" if which == "best" else ""


def choice(summary: Mapping[str, Any], which: str = "last") -> str:
    """Return in a line which student is the best of a finished run's checkpoint, and how it was chosen.

    Empty where nothing was chosen: of a single student the last checkpoint, and of runs that did not finish.
    """
    prefix = prefix_of(which)
    name, split = summary.get(f"{prefix}best_student"), summary.get("chosen_by")
    if name is None or (not prefix and sum(each.startswith("student") for each in summary["top1_error"]) == 1):
        return ""
    test = f"{summary[f'{prefix}top1_error'][name]:.2f} %"
    what = f"best student: {name}, chosen {'with its epoch ' if prefix else ''}by"
    if split == "test":
        return f"{what} test error, so its {test} is too optimistic: --validation N chooses on held-out training images"
    error = summary[f"{prefix}{ERRORS['validation']}"][name]
    return f"{what} validation error ({error:.2f} % of {summary['validation_images']} images); its test error: {test}"
