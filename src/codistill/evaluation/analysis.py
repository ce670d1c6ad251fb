"""How good predictors are and where they are wrong: pure functions of `Predictions`, in NumPy.

Classes are indices in the order of the run's class names, images are indices into the arrays of `Predictions`.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from codistill.evaluation.metrics import CALIBRATION_BINS
from codistill.evaluation.predictions import Predictions

LISTED = 20

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def row_shares(confusion: Counts) -> Floats:
    """Return each count of a confusion matrix [labels, predictions] as a share of its row; a row of no images is 0."""
    return np.asarray(confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True)))


def wilson_interval(count: int, images: int) -> tuple[float, float]:
    """Compute the 95 % Wilson score interval of a share, percent.

    With z the normal quantile of 0.975, k = count and n = images:
    (k + z^2 / 2 +- z sqrt(k (n - k) / n + z^2 / 4)) / (n + z^2). Unlike the interval of a normal distribution around
    k / n it stays within 0 to 100 and has a width where k is 0 or n. It covers the true share for about 95 % of all
    test sets: it is about the choice of the test images, drawn independently; what other seeds of the training would
    change is not in it.

    Args:
        count: Images that something is true of, 0 to `images`.
        images: Number of images, at least 1.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927);
        recommended for proportions by Brown, Cai and DasGupta, Statistical Science 16 (2001).
    """
    z = NormalDist().inv_cdf(0.975)
    half = z * math.sqrt(count * (images - count) / images + z * z / 4)
    low, high = ((count + z * z / 2 + sign * half) / (images + z * z) for sign in (-1, 1))
    # Exactly so at the ends, where rounding may miss them.
    return 100 * low if count else 0.0, 100 * high if count < images else 100.0


def confusion_matrix(labels: npt.NDArray[np.integer], named: npt.NDArray[np.integer], num_classes: int) -> Counts:
    """Count images by their label (row) and the class that was named (column): int64 [class, class]."""
    pairs = labels.astype(np.int64) * num_classes + named
    return np.bincount(pairs, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def balanced_error(matrix: Counts) -> float:
    """Return the mean top-1 error of the classes that have images, percent, from a confusion matrix.

    100 - 100 * `balanced_accuracy_score` of scikit-learn.
    """
    images = matrix.sum(axis=1)
    there = images > 0
    return float(100 * (1 - (matrix.diagonal()[there] / images[there]).mean()))


@dataclass(frozen=True, eq=False)
class ClassScores:
    """How each class fares, from a confusion matrix; arrays of one number a class.

    Attributes:
        images: Images with that label.
        named: Images for which the class was named.
        recall: Of the images with that label, those for which it was named, percent; NaN without images.
        precision: Of the images for which it was named, those with that label, percent; NaN if it was never named.
    """

    images: Counts
    named: Counts
    recall: Floats
    precision: Floats


def class_scores(matrix: Counts) -> ClassScores:
    """Compute recall and precision of each class."""
    images, named, right = matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal()
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return ClassScores(images, named, 100 * right / images, 100 * right / named)


@dataclass(frozen=True)
class Confusion:
    """How often images of one class were taken for another one."""

    label: int
    named: int
    images: int
    share: float  # of the images with that label, percent


def largest_confusions(matrix: Counts, count: int = LISTED) -> list[Confusion]:
    """Return the pairs of classes with the most wrong images, the most frequent first, of equal ones by class."""
    off = matrix - np.diag(matrix.diagonal())
    images = matrix.sum(axis=1)
    cells = np.argsort(-off, axis=None, kind="stable")[:count]
    places = (divmod(int(cell), len(matrix)) for cell in cells)
    found = [(label, named, int(off[label, named])) for label, named in places if off[label, named] > 0]
    return [Confusion(label, named, wrong, float(100 * wrong / images[label])) for label, named, wrong in found]


@dataclass(frozen=True, eq=False)
class Reliability:
    """How well confidence foretells accuracy: images in bins of equal width by the probability of the named class.

    Attributes:
        edges: float64 [bin + 1], 0 to 1; a bin holds its upper edge.
        images: int64 [bin].
        confidence: float64 [bin], mean, 0 to 1; NaN in an empty bin.
        accuracy: float64 [bin], share of images that are right, 0 to 1; NaN in an empty bin.
        ece: Expected calibration error: mean over images of |accuracy - confidence| of their bin, percent (Guo et al.,
            arXiv 1706.04599).
    """

    edges: Floats
    images: Counts
    confidence: Floats
    accuracy: Floats
    ece: float


def reliability(confidence: Floats, correct: npt.NDArray[np.bool_], bins: int = CALIBRATION_BINS) -> Reliability:
    """Compute the numbers of a reliability diagram."""
    places = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    images = np.bincount(places, minlength=bins)
    sure, right = (np.bincount(places, weights=each, minlength=bins) for each in (confidence, correct.astype(float)))
    with np.errstate(invalid="ignore"):
        mean, accuracy = sure / images, right / images
    return Reliability(
        np.arange(bins + 1) / bins, images, mean, accuracy, float(100 * abs(sure - right).sum() / len(places))
    )


@dataclass(frozen=True)
class Mistake:
    """An image for which a predictor names another class than the label."""

    image: int
    label: int
    named: int
    confidence: float  # probability of the class that is named, 0 to 1
    label_probability: float  # 0 to 1


def confident_mistakes(predictions: Predictions, predictor: str, count: int = LISTED) -> list[Mistake]:
    """Return the wrong images of which a predictor is most confident, best first, of equal ones in order.

    Wrong labels are found there first.
    """
    ranked, labels = predictions.predictors[predictor], predictions.labels
    wrong = np.flatnonzero(~predictions.correct(predictor))
    confidence = ranked.confidence[wrong]
    chosen = wrong[np.argsort(-confidence, kind="stable")[:count]]
    sure, of_label = ranked.confidence[chosen], np.exp(ranked.label_log_probability[chosen].astype(np.float64))
    return [
        Mistake(int(image), int(labels[image]), int(ranked.named[image]), float(high), float(low))
        for image, high, low in zip(chosen, sure, of_label, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Disagreement:
    """Where two predictors name different classes.

    Attributes:
        predictors: The two.
        images: Number of images for which they do.
        share: Of all images, percent.
        only_first_right: Of these, images for which the first one names the label.
        only_second_right: Likewise.
        both_wrong: Likewise, where neither does.
        by_class: int64 [class], of these, images with that label.
        confident: Some of these images, first those where both are confident: by the lower confidence of the two.
    """

    predictors: tuple[str, str]
    images: int
    share: float
    only_first_right: int
    only_second_right: int
    both_wrong: int
    by_class: Counts
    confident: tuple[int, ...]


def disagreement(
    predictions: Predictions, first: str, second: str, num_classes: int, count: int = LISTED
) -> Disagreement:
    """Compare what two predictors name; `count` is how many images are listed."""
    one, other = predictions.predictors[first], predictions.predictors[second]
    differ = one.named != other.named
    right = [int((differ & predictions.correct(each)).sum()) for each in (first, second)]
    places = np.flatnonzero(differ)
    lower = np.minimum(one.confidence, other.confidence)[places]
    confident = places[np.argsort(-lower, kind="stable")[:count]]
    by_class = np.bincount(predictions.labels[places], minlength=num_classes)
    images = len(places)
    share, wrong = 100 * images / len(predictions), images - sum(right)
    listed = tuple(int(each) for each in confident)
    return Disagreement((first, second), images, share, right[0], right[1], wrong, by_class, listed)


def disagreements(predictions: Predictions, num_classes: int, count: int = LISTED) -> list[Disagreement]:
    """Compare all pairs of students."""
    pairs = combinations(predictions.students, 2)
    return [disagreement(predictions, first, second, num_classes, count) for first, second in pairs]


@dataclass(frozen=True, eq=False)
class Analysis:
    """How good one predictor is on one split, and where it is wrong.

    Attributes:
        images: Number of images.
        top1_error: Images for which another class than the label is named, percent.
        top1_error_interval: Its 95 % interval, see `wilson_interval`, percent.
        balanced_error: See `balanced_error`, percent.
        confusion: See `confusion_matrix`.
        classes: Recall and precision of each class.
        reliability: Calibration.
        mistakes: The most confident ones.
    """

    images: int
    top1_error: float
    top1_error_interval: tuple[float, float]
    balanced_error: float
    confusion: Counts
    classes: ClassScores
    reliability: Reliability
    mistakes: tuple[Mistake, ...]

    @property
    def top1_accuracy(self) -> float:
        """100 - error, percent."""
        return 100 - self.top1_error

    @property
    def top1_accuracy_interval(self) -> tuple[float, float]:
        """Its 95 % interval, percent."""
        low, high = self.top1_error_interval
        return 100 - high, 100 - low


def analyse(predictions: Predictions, predictor: str, num_classes: int, count: int = LISTED) -> Analysis:
    """Analyse one predictor; `count` is how many mistakes are listed. Memory: 8 bytes for each pair of classes."""
    correct, ranked = predictions.correct(predictor), predictions.predictors[predictor]
    matrix = confusion_matrix(predictions.labels, ranked.named, num_classes)
    images, wrong = len(correct), int((~correct).sum())
    return Analysis(
        images,
        100 * wrong / images,
        wilson_interval(wrong, images),
        balanced_error(matrix),
        matrix,
        class_scores(matrix),
        reliability(ranked.confidence, correct),
        tuple(confident_mistakes(predictions, predictor, count)),
    )
