"""What to try next: a few rules on the numbers of a finished run, each with what it saw."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from codistill.evaluation.analysis import Analysis, largest_confusions
from codistill.report.groups import Seen
from codistill.runs.choice import chosen_by, lowest_student, top1_errors

OVERFITTED = 0.5
"""Nats between test and training loss of a student, from which augmentation is the first thing to try."""
EARLY = 0.7
"""Share of the epochs before which a best epoch is early."""
FALLING = 0.98
"""Error of the last tenth of the epochs, relative to the tenth before, below which it is still falling."""
ALIKE = 0.25
"""Disagreement of the students relative to their error, below which they learn nearly the same."""
UNCALIBRATED = 5.0
"""Expected calibration error, percent."""
FEW_IMAGES = 1.5
"""Half of the 95 % interval of the error, percentage points, above which small differences are noise."""
WEAK_CLASS = 15.0
"""Recall of the weakest class below the mean, percentage points."""
MOST = 6


@dataclass(frozen=True)
class Advice:
    """A thing to try: what was seen in the numbers, and what may help."""

    seen: str
    do: str


def advice(seen: Seen, analyses: Mapping[str, Analysis], measured: bool) -> list[Advice]:
    """Return at most `MOST` things to try after a run, the most telling first.

    Args:
        seen: The run, with at least one evaluation.
        analyses: Of predictors on the test set, where predictions.npz is there.
        measured: Whether latencies were.
    """
    return list(_rules(seen, analyses, measured))[:MOST]


def _rules(seen: Seen, analyses: Mapping[str, Analysis], measured: bool) -> Iterator[Advice]:
    last = seen.last
    assert last is not None
    student, _ = lowest_student(last)
    if any("collapsed" in each or "diverging" in each for row in seen.rows[-3:] for each in row.get("warnings", ())):
        yield Advice(
            "A student collapsed or fell behind (see the warnings).", "Halve `--learning-rate`, or swap that network."
        )
    yield from _length(seen)
    yield from _fit(seen, student)
    yield from _cohort(seen, student)
    if student in analyses:
        yield from _classes(seen, analyses[student])
    yield from _trust(seen, student, analyses)
    if seen.finished and not measured:
        folder = seen.run.path
        yield Advice(
            "Latencies are not measured.", f"`codistill report {folder} --latency` shows error against milliseconds."
        )


def _length(seen: Seen) -> Iterator[Advice]:
    if not seen.finished:  # nobody knows how it would go on
        return
    scored = seen.scored
    last, best = scored[-1], seen.best
    assert best is not None
    epochs, split = last["epoch"] + 1, chosen_by(last)
    tenth = max(1, len(scored) // 10)
    now, before = (
        statistics.fmean(lowest_student(row)[1] for row in part)
        for part in (scored[-tenth:], scored[-2 * tenth : -tenth] or scored[:1])
    )
    images = seen.images(split)
    name, error = lowest_student(best)
    rise = top1_errors(last, split)[name] - error
    noise = 100 * (max(error, 1) / 100 * (1 - error / 100) / images) ** 0.5 if images else 1.0
    if (best["epoch"] + 1) < EARLY * epochs and rise > 2 * noise:
        yield Advice(
            f"The best epoch was {best['epoch'] + 1} of {epochs}; since then the {split} error of {name} rose by "
            f"{rise:.1f} points.",
            "Train shorter or regularise more: `--patience 10` or `--weight-decay 5e-4`.",
        )
    elif len(scored) > 3 and now < FALLING * before:
        yield Advice(
            f"The {split} error was still falling when training ended, from {before:.1f} to {now:.1f} % at the end.",
            f"Train longer, for example `--epochs {2 * epochs}`.",
        )
    elif epochs < 30:
        yield Advice(f"{epochs} epochs are few.", f"Try `--epochs {max(60, 4 * epochs)}`; the papers train 200 to 300.")


def _fit(seen: Seen, student: str) -> Iterator[Advice]:
    last = seen.scored[-1]
    trained = last["train"].get(f"ce/{student}")
    if trained is None:
        return
    tested = last["test"][student]["nll"]
    if tested - trained > OVERFITTED:
        yield Advice(
            f"{student} fits the training images far better than the test images: cross-entropy {trained:.2f} against "
            f"{tested:.2f} nats.",
            "More images, or more regularisation: `--auto-augment trivialaugment` or `--mixup 0.2` or "
            "`--random-erasing 0.25` or `--label-smoothing 0.1` or `--weight-decay 5e-4`.",
        )
    elif trained > 1.0 and trained > 0.8 * tested:
        yield Advice(
            f"{student} does not even fit the training images: cross-entropy {trained:.2f} nats, {tested:.2f} on the "
            "test images.",
            "Train longer, or take a larger network.",
        )


def _cohort(seen: Seen, student: str) -> Iterator[Advice]:
    last = seen.scored[-1]
    errors = top1_errors(last, "test")
    students = [errors[name] for name in seen.students]
    differ = last.get("diversity", {}).get("disagreement")
    if len(students) > 1 and differ is not None and differ < ALIKE * statistics.fmean(students):
        yield Advice(
            f"The students are nearly copies: they disagree on {differ:.1f} % of the test images, with errors of "
            f"{min(students):.1f} to {max(students):.1f} %.",
            "Unlike networks have more to teach each other: name two families in `--networks`, or share fewer stages.",
        )
    for name in ("fused", "ensemble"):
        if name in errors and errors[student] - errors[name] > max(1.0, 0.1 * errors[student]):
            yield Advice(
                f"{student} is {errors[student] - errors[name]:.1f} points behind {name}.",
                f"Longer training may close the gap; if {name} is fast enough, deploy it: "
                f"`codistill export {seen.run.path} --predictor {name}`.",
            )
            return


def _classes(seen: Seen, found: Analysis) -> Iterator[Advice]:
    names, recall = seen.run.class_names, found.classes.recall
    there = [index for index in range(len(names)) if found.classes.images[index] >= 10]
    if len(there) > 1:
        weakest = min(there, key=lambda index: recall[index])
        mean = statistics.fmean(float(recall[index]) for index in there)
        pairs = [each for each in largest_confusions(found.confusion, len(names) ** 2) if each.label == weakest]
        if recall[weakest] < mean - WEAK_CLASS and pairs:
            taken = names[pairs[0].named]
            yield Advice(
                f"{names[weakest]} is recognised in {recall[weakest]:.0f} % of its images, classes on average in "
                f"{mean:.0f} %; it is most often taken for {taken}.",
                f"Look at the labels of {names[weakest]} and {taken} below; more images of {names[weakest]} help most.",
            )
    if found.balanced_error > found.top1_error + 3:
        yield Advice(
            f"Rare classes fare worse: the balanced error is {found.balanced_error:.1f} %, the plain one "
            f"{found.top1_error:.1f} %.",
            "Weigh or sample classes evenly: `--class-weights balanced` or `--sampling balanced`, and add images of "
            "rare ones.",
        )


def _trust(seen: Seen, student: str, analyses: Mapping[str, Analysis]) -> Iterator[Advice]:
    last = seen.scored[-1]
    scores = last["test"][student]
    if scores["ece"] > UNCALIBRATED:
        bins = analyses[student].reliability if student in analyses else None
        words = "does not match how often it is right"
        over = False
        if bins is not None:
            gap = sum(
                float(n * (c - a)) for n, c, a in zip(bins.images, bins.confidence, bins.accuracy, strict=True) if n
            )
            over = gap > 0
            words = "is too high" if over else "is too low"
        help = "`--label-smoothing 0.1`, mixup or a weight average" if over else "Longer training"
        yield Advice(
            f"The confidence of {student} {words} (calibration error {scores['ece']:.1f} %).",
            f"{help} may help; do not read its probabilities as certainty.",
        )
    if student in analyses:
        low, high = analyses[student].top1_error_interval
        if (high - low) / 2 > FEW_IMAGES:
            yield Advice(
                f"{seen.images('test'):,} test images leave the error of {student} between {low:.1f} and {high:.1f} %.",
                "On other images like these it may be as low or as high: test on more, and train a few `--seeds`.",
            )
    if chosen_by(last) == "test":
        yield Advice(
            "Epoch and student were chosen on the test set, which flatters them.",
            "Hold training images out: `--validation 10%`.",
        )
