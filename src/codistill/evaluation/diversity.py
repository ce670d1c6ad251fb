"""How different the students of a cohort are, and whether one of them is in trouble."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from codistill.evaluation.metrics import own_student

COLLAPSED_SHARE = 0.9
BEHIND_POINTS = 20.0


@dataclass(frozen=True)
class Diversity:
    """How the students of a cohort differ on one split."""

    disagreement: float  # images for which two students name different classes, percent, mean over all pairs
    kl: float  # KL(p_i || p_j) at temperature 1, nats, mean over images and ordered pairs
    largest_class_share: dict[str, float]  # by student, of images for which it names its favourite class, 0 to 1


class DiversitySums:
    """Sums from which `diversity` is computed, on the device."""

    def __init__(self, students: int, num_classes: int, device: torch.device) -> None:
        self._pairs = torch.zeros(3, dtype=torch.float64, device=device)
        self._classes = torch.zeros(students, num_classes, dtype=torch.float64, device=device)

    def update(self, logits: Sequence[Float[Tensor, "batch class"]]) -> None:
        """Add the logits of all students for a batch."""
        log_probabilities = [torch.log_softmax(each.float(), dim=1) for each in logits]
        named = [each.argmax(dim=1) for each in log_probabilities]
        for (log_p, first), (log_q, second) in combinations(zip(log_probabilities, named, strict=True), 2):
            self._pairs[0].add_((first != second).sum())
            # KL(p || q) + KL(q || p) = sum (p - q) (log p - log q)
            self._pairs[1].add_(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dtype=torch.float64))
        self._pairs[2].add_(len(named[0]))
        for index, each in enumerate(named):
            self._classes[index].index_add_(0, each, torch.ones_like(each, dtype=torch.float64))

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, for `metrics.read_together`."""
        differ, kl, images = self._pairs
        return {"differ": differ, "kl": kl, "images": images, "favourite": self._classes.max(dim=1).values}

    def reset(self) -> None:
        """Set all sums to 0."""
        self._pairs.zero_()
        self._classes.zero_()


def diversity(sums: Mapping[str, Any]) -> Diversity:
    """Return the diversity that the numbers of `DiversitySums.tensors` amount to."""
    students, images = len(sums["favourite"]), sums["images"]
    pairs = max(1, students * (students - 1) // 2)
    return Diversity(
        100 * sums["differ"] / pairs / images,
        sums["kl"] / (2 * pairs) / images,
        {f"student{index}": count / images for index, count in enumerate(sums["favourite"])},
    )


def health_warnings(row: Mapping[str, Any], history: Sequence[Mapping[str, Any]], epochs: int) -> list[str]:
    """Name the students that have collapsed or fall behind, as soon as it shows.

    Collapsed: one class is named for more than 90 % of the test images, once a twentieth of the training (and the first
    epoch) is over. Behind: the test error is more than 20 points above both the student's own best and the best of
    another student. `row` is the epoch's line of metrics.jsonl, `history` has those before, of `epochs` in all.
    """
    found = []
    errors = {name: each["top1_error"] for name, each in row["test"].items() if own_student(name)}
    early = row["epoch"] + 1 < max(2, epochs / 20)
    for name, error in errors.items():
        share = row["diversity"]["largest_class_share"].get(name, 0.0)
        if share > COLLAPSED_SHARE and not early:
            found.append(f"{name} has collapsed: it names one class for {100 * share:.0f} % of the test images")
            continue
        before = [each["test"][name]["top1_error"] for each in history]
        others = [other for peer, other in errors.items() if peer != name]
        if before and others and error > min(before) + BEHIND_POINTS and error > min(others) + BEHIND_POINTS:
            bests = f"after {min(before):.1f} % before and {min(others):.1f} % of the best peer"
            found.append(f"{name} is diverging: test error {error:.1f} %, {bests}")
    return found
