"""What a few seeds allow one to conclude: the interval of a mean, and differences that are paired by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Errors of runs that differ in the seed only, percent.

    Attributes:
        count: How many.
        mean: Their mean.
        deviation: Their sample standard deviation (n - 1), percentage points; None for one.
        low: Lower end of the 95 % interval of the mean, by Student's t; None for one.
        high: Its upper end; None for one.
        best: The lowest.
    """

    count: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    best: float


@dataclass(frozen=True)
class Paired:
    """Differences of two groups of runs, first - second, paired by the seeds that both have; percentage points.

    Attributes:
        count: How many pairs.
        mean: The mean difference.
        low: Lower end of its 95 % interval, by Student's t; None for one pair.
        high: Its upper end; None for one pair.
        t_p: The two-sided p of the paired t-test; None for one pair, and where all differences are equal.
        sign_p: The two-sided p of the sign test, which leaves out differences of zero.
    """

    count: int
    mean: float
    low: float | None
    high: float | None
    t_p: float | None
    sign_p: float


def summarise(errors: Sequence[float]) -> Summary:
    """Return the summary of at least one error, percent."""
    mean = statistics.fmean(errors)
    deviation = statistics.stdev(errors) if len(errors) > 1 else None
    low, high = _interval(mean, deviation, len(errors))
    return Summary(len(errors), mean, deviation, low, high, min(errors))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
    """Compare two groups of runs by the seeds that both have.

    Args:
        first: The error of each seed, percent.
        second: The same of the other group.

    Returns:
        The differences; None where no seed is in both.
    """
    from scipy import stats  # takes half a second

    # Without the rounding of floating point, by which equal differences would vary.
    differences = [round(first[seed] - second[seed], 9) for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return None
    summary = summarise(differences)
    varies = summary.deviation is not None and summary.deviation > 0
    t_p = float(stats.ttest_1samp(differences, 0).pvalue) if varies else None
    positive, negative = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    unequal = positive + negative
    sign_p = float(stats.binomtest(positive, unequal).pvalue) if unequal else 1.0
    return Paired(len(differences), summary.mean, summary.low, summary.high, t_p, sign_p)


def _interval(mean: float, deviation: float | None, count: int) -> tuple[float | None, float | None]:
    if deviation is None:
        return None, None
    from scipy import stats

    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return mean - half, mean + half
