"""What to try next: each rule on numbers that call for it, and none on those of a run that is in order."""

import re
import types
from pathlib import Path

import numpy as np
import pytest

from codistill.evaluation.analysis import analyse
from codistill.evaluation.predictions import Predictions, Ranked
from codistill.report import advice as advice_module
from codistill.report.advice import advice
from codistill.report.groups import Seen
from codistill.settings.config import SETTINGS

EPOCHS = 60


def seen(trained=0.4, tested=0.6, ece=2.0, differ=15.0, fused=19.5, held=True, path=None):
    """A run whose better student's error follows a path over its epochs, in order but for what is named."""
    rows = []
    for epoch, value in enumerate(path or [60.0 * 0.8**epoch + 20 for epoch in range(EPOCHS)]):
        errors = {"student0": value, "student1": value + 0.5, "fused": value + fused - 20}
        rest = {"top5_error": 1.0, "nll": tested, "ece": ece}
        scores = {name: {"top1_error": error, **rest} for name, error in errors.items()}
        row = {"epoch": epoch, "train": {"loss": 1.0, "ce/student0": trained}, "test": scores, "warnings": []}
        rows.append(row | {"diversity": {"disagreement": differ}} | ({"validation": scores} if held else {}))
    facts = {"class_names": ["cat", "dog", "cow"], "test_images": 10_000, "validation_images": 2000}
    run = types.SimpleNamespace(path="runs/a", class_names=facts["class_names"], metadata={"dataset": facts})
    return Seen(run, {"status": "finished"}, rows)


def told(run, analyses=None, measured=True):
    return [each.seen for each in advice(run, analyses or {}, measured)]


def test_a_run_in_order_gets_none():
    assert told(seen()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trained": 0.05, "tested": 1.2}, "student0 fits the training images far better"),
        ({"trained": 1.6, "tested": 1.7}, "student0 does not even fit the training images"),
        ({"differ": 2.0}, "The students are nearly copies: they disagree on 2.0 %"),
        ({"fused": 15.0}, "student0 is 5.0 points behind fused"),
        ({"ece": 9.0}, "The confidence of student0 does not match"),
        ({"held": False}, "Epoch and student were chosen on the test set"),
        (
            {"path": [30.0, *[20.0] * 20, *[26.0] * 39]},
            "The best epoch was 2 of 60; since then the validation error of",
        ),
        ({"path": [80.0 - epoch for epoch in range(60)]}, "The validation error was still falling"),
        ({"path": [20.0] * 10}, "10 epochs are few"),
    ],
)
def test_each_rule_says_what_it_saw(changes, words):
    (line,) = told(seen(**changes))
    assert line.startswith(words)


def test_a_run_that_has_not_ended_is_not_called_too_short():
    run = seen(path=[20.0 - 0.1 * epoch for epoch in range(20)])
    assert told(Seen(run.run, {"status": "interrupted"}, run.rows)) == []


def test_what_was_not_measured_is_named_with_its_command():
    (found,) = advice(seen(), {}, measured=False)
    assert found.do.startswith("`codistill report runs/a --latency`")


def test_flags_that_are_named_are_there():
    text = Path(advice_module.__file__).read_text(encoding="utf-8")
    flags = set(re.findall(r"`--([a-z0-9-]+)", text))
    assert len(flags) > 7 and {each.replace("-", "_") for each in flags} <= {*SETTINGS, "seeds"}


def test_a_weak_class_and_few_images_are_named():
    labels = np.repeat(np.arange(3), 20)
    named = labels.copy()
    named[:14] = 1  # of the first class
    classes = np.stack([named, (named + 1) % 3, (named + 2) % 3], axis=1).astype(np.int32)
    sure = np.log(np.tile(np.array([0.6, 0.3, 0.1], np.float32), (60, 1)))
    ranked = Ranked(classes, sure, np.log(np.where(named == labels, 0.6, 0.3)).astype(np.float32))
    found = analyse(Predictions(labels, np.arange(60), (), {"student0": ranked}), "student0", 3)
    lines = told(seen(), {"student0": found})
    assert lines[0] == (
        "cat is recognised in 30 % of its images, classes on average in 77 %; it is most often taken for dog."
    )
    assert any("test images leave the error of student0 between" in line for line in lines)
