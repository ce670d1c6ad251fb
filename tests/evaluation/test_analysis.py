"""Errors of predictors: numbers by hand, scikit-learn as a reference, and what holds for all predictions."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from codistill.evaluation.analysis import (
    analyse,
    balanced_error,
    class_scores,
    confident_mistakes,
    confusion_matrix,
    disagreement,
    disagreements,
    largest_confusions,
    reliability,
    wilson_interval,
)
from codistill.evaluation.predictions import Predictions, Ranked


def ranked(named, confidence, labels, classes: int = 3) -> Ranked:
    """A predictor of the class that is named with a confidence; the rest is equally probable."""
    probabilities = np.repeat((1 - np.array(confidence))[:, None] / (classes - 1), classes, axis=1)
    rows = np.arange(len(named))
    probabilities[rows, named] = confidence
    order = np.argsort(-probabilities, axis=1, kind="stable").astype(np.int32)
    logs = np.log(probabilities)
    top = np.take_along_axis(logs, order, axis=1).astype(np.float32)[:, :5]
    return Ranked(order[:, :5], top, logs[rows, labels].astype(np.float32))


LABELS = np.array([0, 0, 0, 1, 1, 2])
NAMED = {"student0": [0, 0, 1, 1, 2, 1], "student1": [0, 1, 1, 1, 1, 0], "ensemble": [0, 0, 1, 1, 1, 1]}
SURE = {
    "student0": [0.9, 0.8, 0.7, 0.6, 0.95, 0.5],
    "student1": [0.9, 0.8, 0.5, 0.6, 0.7, 0.99],
    "ensemble": [0.9] * 6,
}


@pytest.fixture
def six() -> Predictions:
    """Six images of three classes."""
    predictors = {name: ranked(NAMED[name], SURE[name], LABELS) for name in NAMED}
    return Predictions(LABELS, np.arange(6), tuple("abcdef"), predictors)


@pytest.mark.parametrize(
    "count, images, low, high",
    [  # from the formula in fractions of 1.959964 ** 2 = 3.841459
        (0, 10, 0, 27.7533),
        (10, 10, 72.2467, 100),
        (5, 10, 23.6593, 76.3407),
        (1, 1, 20.6543, 100),
        (3000, 10000, 29.1097, 30.9056),
    ],
)
def test_wilson_by_hand(count, images, low, high):
    assert wilson_interval(count, images) == pytest.approx((low, high), abs=1e-3)


@hypothesis_settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 10**6).flatmap(lambda images: st.tuples(st.integers(0, images), st.just(images))))
def test_an_interval_holds_its_share_and_mirrors(drawn):
    count, images = drawn
    low, high = wilson_interval(count, images)
    assert 0 <= low <= 100 * count / images <= high <= 100 and low < high
    mirrored = wilson_interval(images - count, images)
    assert mirrored == pytest.approx((100 - high, 100 - low), abs=1e-9)
    narrower = wilson_interval(count * 4, images * 4)
    assert narrower[1] - narrower[0] < high - low
    # Its ends are the shares from which the count is z standard deviations away.
    for end in (low / 100, high / 100):
        if 0 < end < 1:
            assert abs(count / images - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / images), rel=1e-4)


def test_numbers_by_hand(six):
    found = analyse(six, "student0", 3)
    assert found.images == 6 and found.top1_error == pytest.approx(50) and found.top1_accuracy == pytest.approx(50)
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 1, 0]]
    assert found.balanced_error == pytest.approx(100 * (1 / 3 + 1 / 2 + 1) / 3)
    assert found.classes.images.tolist() == [3, 2, 1] and found.classes.named.tolist() == [2, 3, 1]
    assert found.classes.recall == pytest.approx([200 / 3, 50, 0])
    assert found.classes.precision == pytest.approx([100, 100 / 3, 0])
    assert found.top1_error_interval == pytest.approx(wilson_interval(3, 6))
    low, high = found.top1_error_interval
    assert found.top1_accuracy_interval == (100 - high, 100 - low)
    assert [(each.image, each.label, each.named) for each in found.mistakes] == [(4, 1, 2), (2, 0, 1), (5, 2, 1)]
    first = found.mistakes[0]
    assert (first.confidence, first.label_probability) == pytest.approx((0.95, 0.025))


def test_confusions_by_hand():
    matrix = np.array([[5, 2, 3], [3, 7, 0], [0, 0, 0]])
    found = [(each.label, each.named, each.images, each.share) for each in largest_confusions(matrix)]
    assert found == [(0, 2, 3, pytest.approx(30)), (1, 0, 3, pytest.approx(30)), (0, 1, 2, pytest.approx(20))]
    assert len(largest_confusions(matrix, 2)) == 2 and largest_confusions(np.diag([3, 4])) == []


def test_a_class_without_images_has_no_recall_and_does_not_count():
    matrix = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 2]])
    scores = class_scores(matrix)
    assert math.isnan(scores.recall[1]) and scores.precision.tolist() == [100, 0, 100]
    assert balanced_error(matrix) == pytest.approx((25 + 50) / 2)
    assert math.isnan(class_scores(np.diag([3, 0])).precision[1])


def test_calibration_by_hand():
    # The bins of 0.5 to 0.6 and of 0.8 to 0.9, of ten; an upper edge belongs to its bin.
    found = reliability(np.array([0.55, 0.6, 0.85, 1.0]), np.array([True, False, True, True]), bins=10)
    assert found.images.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 1, 1]
    assert found.confidence[[5, 8, 9]] == pytest.approx([0.575, 0.85, 1])
    assert found.accuracy[[5, 8, 9]].tolist() == [0.5, 1, 1] and math.isnan(found.accuracy[0])
    assert found.ece == pytest.approx(100 * (2 * 0.075 + 0.15) / 4)


def test_disagreement_by_hand(six):
    found = disagreement(six, "student0", "student1", 3)
    # Images 1, 4 and 5 get two names: 0 and 1 of class 0, 2 and 1 of class 1, 1 and 0 of class 2.
    assert (found.images, found.share) == (3, 50)
    assert (found.only_first_right, found.only_second_right, found.both_wrong) == (1, 1, 1)
    assert found.by_class.tolist() == [1, 1, 1]
    assert found.confident == (1, 4, 5)  # lower confidences 0.8, 0.7, 0.5
    assert [each.predictors for each in disagreements(six, 3)] == [("student0", "student1")]


def test_one_student_disagrees_with_nobody(six):
    alone = Predictions(six.labels, six.positions, six.files, {"student0": six.predictors["student0"]})
    assert disagreements(alone, 3) == []


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    images, classes = draw(st.integers(1, 80)), draw(st.integers(2, 8))
    source = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels, named = source.integers(classes, size=(2, images))
    return labels, named, source.uniform(1 / classes, 1, images), classes


@hypothesis_settings(deadline=None, max_examples=25, derandomize=True)
@given(answers())
def test_scores_are_those_of_scikit_learn(drawn):
    labels, named, _, classes = drawn
    matrix, places = confusion_matrix(labels, named, classes), range(classes)
    assert (matrix == reference.confusion_matrix(labels, named, labels=places)).all()
    scores = class_scores(matrix)
    precision, recall, _, images = reference.precision_recall_fscore_support(
        labels, named, labels=places, zero_division=np.nan
    )
    np.testing.assert_allclose(scores.recall, 100 * recall)
    np.testing.assert_allclose(scores.precision, 100 * precision)
    assert (scores.images == images).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of classes that are named and have no images
        expected = reference.balanced_accuracy_score(labels, named)
    assert balanced_error(matrix) == pytest.approx(100 * (1 - expected))


@hypothesis_settings(deadline=None, max_examples=25, derandomize=True)
@given(answers(), st.integers(1, 10))
def test_what_holds_for_all_predictions(drawn, count):
    labels, named, sure, classes = drawn
    predictors = {"student0": ranked(named, sure, labels, classes), "student1": ranked(labels, sure, labels, classes)}
    predictions = Predictions(labels, np.arange(len(labels)), (), predictors)
    found = analyse(predictions, "student0", classes, count)
    wrong = int((predictors["student0"].named != labels).sum())
    assert found.confusion.sum() == len(labels) and found.confusion.trace() == len(labels) - wrong
    assert found.top1_error == pytest.approx(100 * wrong / len(labels))
    assert len(found.mistakes) == min(count, wrong)
    assert all(each.label != each.named and each.label_probability <= each.confidence for each in found.mistakes)
    confidences = [each.confidence for each in confident_mistakes(predictions, "student0", wrong)]
    assert confidences == sorted(confidences, reverse=True)
    bins = found.reliability
    assert bins.images.sum() == len(labels) and 0 <= bins.ece <= 100
    filled = bins.images > 0
    assert (
        (bins.edges[:-1][filled] - 1e-6 <= bins.confidence[filled])
        & (bins.confidence[filled] <= bins.edges[1:][filled] + 1e-6)
    ).all()
    assert sum(each.images for each in largest_confusions(found.confusion, classes**2)) == wrong
    # The other student is always right: they differ where the first is wrong.
    one, other = (disagreement(predictions, *pair, classes) for pair in (predictors, reversed(predictors)))
    assert (one.images, one.only_second_right, one.only_first_right, one.both_wrong) == (wrong, wrong, 0, 0)
    assert (other.images, other.only_first_right, other.confident) == (wrong, wrong, one.confident)
    assert one.by_class.sum() == wrong
