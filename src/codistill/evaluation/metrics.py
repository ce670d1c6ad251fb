"""Sums that live on the device and are read by the host once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from codistill.evaluation.predictions import Ranking, ranking

CALIBRATION_BINS = 15
AVERAGED = "-ema"
"""End of the names of predictors whose weights are moving averages: `student0-ema`."""


@dataclass(frozen=True)
class Scores:
    """How good one predictor is on one split.

    Attributes:
        top1_error: Images whose highest logit is not the label's, percent.
        top5_error: Images whose label is not among the five highest logits, percent (0 with five classes or fewer).
        nll: Negative log-likelihood, mean over images, nats.
        ece: Expected calibration error with 15 bins of equal width, percent (Guo et al., arXiv 1706.04599).
        balanced_error: Top-1 error of each class, mean over the classes that have images, percent.
    """

    top1_error: float
    top5_error: float
    nll: float
    ece: float
    balanced_error: float


def own_student(predictor: str) -> bool:
    """Whether a predictor is a student (or an exit of it) with its own weights, not with their moving averages."""
    return predictor.startswith("student") and not predictor.endswith(AVERAGED)


class ClassificationSums:
    """Sums from which `scores` are computed, on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(4, dtype=torch.float64, device=device)
        self._bins = torch.zeros(2, CALIBRATION_BINS, dtype=torch.float64, device=device)
        self._classes = torch.zeros(2, num_classes, dtype=torch.float64, device=device)

    def update(self, logits: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"]) -> Ranking:
        """Add a batch, and return its ranking."""
        ranked = ranking(logits, labels)
        hits = ranked.classes == labels[:, None]
        correct = hits[:, 0]
        nll = -ranked.label.sum(dtype=torch.float64)
        self._counts += torch.stack([torch.ones_like(correct).sum(), correct.sum(), hits.any(dim=1).sum(), nll])
        confidence = ranked.log_probabilities[:, 0].exp()
        bins = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
        self._bins[0].index_add_(0, bins, confidence.double())
        self._bins[1].index_add_(0, bins, correct.double())
        self._classes[0].index_add_(0, labels, torch.ones_like(correct, dtype=torch.float64))
        self._classes[1].index_add_(0, labels, correct.double())
        return ranked

    def reset(self) -> None:
        """Set all sums to 0."""
        self._counts.zero_()
        self._bins.zero_()
        self._classes.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, for `read_together`."""
        counts = dict(zip(("images", "top1", "top5", "nll"), self._counts, strict=True))
        images, correct = self._classes
        counts |= {"recall": (correct / images.clamp(min=1)).sum(), "classes": (images > 0).sum()}
        return counts | {"confidence": self._bins[0], "accuracy": self._bins[1]}


def scores(sums: Mapping[str, Any]) -> Scores:
    """Return the scores that the numbers of `ClassificationSums.tensors` amount to."""
    images = sums["images"]
    gap = sum(abs(a - b) for a, b in zip(sums["confidence"], sums["accuracy"], strict=True))
    top1_error, top5_error = (100 * (images - sums[hits]) / images for hits in ("top1", "top5"))
    balanced_error = 100 * (1 - sums["recall"] / sums["classes"])
    return Scores(top1_error, top5_error, sums["nll"] / images, 100 * gap / images, balanced_error)


class TermSums:
    """Sums of the named terms of a loss over an epoch, weighted by the number of images, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)

    def update(self, terms: dict[str, Float[Tensor, ""]], images: int) -> None:
        """Add the terms of a step; all steps of a method have the same names."""
        if not self.names:
            self.names = tuple(terms)
            self.sums = torch.zeros(len(terms) + 1, dtype=torch.float64, device=self._device)
        # In float64, although the terms are not: the summand of an addition in place is widened.
        self.sums[:-1].add_(torch.stack([term.detach() for term in terms.values()]), alpha=images)
        self.sums[-1:].add_(images)

    def tensors(self) -> dict[str, Any]:
        """Return the number of images, and the sum of each term by name, for `read_together`."""
        *sums, images = self.sums.unbind()
        return {"images": images, "terms": dict(zip(self.names, sums, strict=True))}

    def means(self, sums: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Return the mean of each term over the images so far, with their total first, under `loss`.

        The numbers are those of `tensors` where the host has them; None: read them.
        """
        sums = read_together(self.tensors()) if sums is None else sums
        means = {name: value / sums["images"] for name, value in sums["terms"].items()}
        return {"loss": sum(means.values()), **means}

    def reset(self) -> None:
        """Set all sums to 0."""
        self.sums.zero_()

    def rename(self) -> None:
        """Begin with terms of other names."""
        self.names = ()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint inside an epoch holds."""
        return {"names": list(self.names), "sums": self.sums}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.names = tuple(state["names"])
        self.sums = state["sums"].to(self._device)


def read_together(tree: dict[Any, Any]) -> dict[Any, Any]:
    """Bring nested dicts of scalars and vectors of one device to the host in one read, which waits for it once.

    The dicts have the same keys again, with a number for each scalar and a list for each vector.
    """
    leaves, structure = tree_flatten(tree)
    numbers = iter(torch.cat([each.flatten().double() for each in leaves]).tolist() if leaves else [])
    read = [next(numbers) if each.ndim == 0 else [next(numbers) for _ in each] for each in leaves]
    filled: dict[Any, Any] = tree_unflatten(read, structure)
    return filled
