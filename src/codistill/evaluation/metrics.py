"""Sums that live on the device and are read by the host once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Scores:
    """How good one predictor is on one split.

    Attributes:
        top1_error: Images whose highest logit is not the label's, percent.
        top5_error: Images whose label is not among the five highest logits, percent (0 with five classes or fewer).
        nll: Negative log-likelihood, mean over images, nats.
        ece: Expected calibration error with 15 bins of equal width, percent (Guo et al., arXiv 1706.04599).
    """

    top1_error: float
    top5_error: float
    nll: float
    ece: float


class ClassificationSums:
    """Accumulate what `Scores` needs, without a host read.

    Args:
        device: Where the sums lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(3, dtype=torch.float64, device=device)
        self._nll = torch.zeros((), dtype=torch.float64, device=device)
        self._bins = torch.zeros(2, CALIBRATION_BINS, dtype=torch.float64, device=device)

    def update(self, logits: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"]) -> None:
        """Add a batch."""
        log_probabilities = torch.log_softmax(logits.float(), dim=1)
        ranked = log_probabilities.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == labels[:, None]
        correct = hits[:, 0]
        self._counts += torch.stack([torch.ones_like(correct).sum(), correct.sum(), hits.any(dim=1).sum()])
        self._nll -= log_probabilities.gather(1, labels[:, None]).sum(dtype=torch.float64)
        confidence = log_probabilities.amax(dim=1).exp()
        bins = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
        self._bins[0].index_add_(0, bins, confidence.double())
        self._bins[1].index_add_(0, bins, correct.double())

    def reset(self) -> None:
        """Start anew."""
        for sums in (self._counts, self._nll, self._bins):
            sums.zero_()

    def packed(self) -> Float[Tensor, " numbers"]:
        """Give all sums as one vector, so that many predictors are read at once; see `scores`."""
        return torch.cat([self._counts, self._nll[None], self._bins.flatten()])


def scores(packed: Sequence[float]) -> Scores:
    """Turn the numbers of `ClassificationSums.packed` into scores."""
    count, top1, top5, nll = packed[:4]
    confidence, accuracy = packed[4 : 4 + CALIBRATION_BINS], packed[4 + CALIBRATION_BINS :]
    gap = sum(abs(a - b) for a, b in zip(confidence, accuracy, strict=True))
    return Scores(100 * (count - top1) / count, 100 * (count - top5) / count, nll / count, 100 * gap / count)


class TermSums:
    """Accumulate the named terms of a loss over an epoch, weighted by the number of images.

    Args:
        device: Where the sums lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)

    def update(self, terms: dict[str, Float[Tensor, ""]], images: int) -> None:
        """Add the terms of a step; all steps of a method have the same names."""
        if not self.names:
            self.names = tuple(terms)
            self.sums = torch.zeros(len(terms) + 1, dtype=torch.float64, device=self._device)
        # In float64, although the terms are not: what is added in place is widened to what it is added to.
        self.sums[:-1].add_(torch.stack([term.detach() for term in terms.values()]), alpha=images)
        self.sums[-1:].add_(images)

    def packed(self) -> Float[Tensor, " numbers"]:
        """Give the sums as one vector; see `means`."""
        return self.sums

    def means(self, packed: Sequence[float] | None = None) -> dict[str, float]:
        """Give the means over the images so far, with their total first, under `loss`.

        Args:
            packed: The numbers of `packed`, where the host has them; None: read them.
        """
        *sums, images = self.sums.tolist() if packed is None else packed
        means = {name: value / images for name, value in zip(self.names, sums, strict=True)}
        return {"loss": sum(means.values()), **means}

    def reset(self) -> None:
        """Start anew."""
        self.sums.zero_()

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint inside an epoch holds."""
        return {"names": list(self.names), "sums": self.sums}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.names = tuple(state["names"])
        self.sums = state["sums"].to(self._device)


def read_together(vectors: Sequence[Float[Tensor, " numbers"]]) -> list[list[float]]:
    """Bring vectors of one device to the host in one read: it waits for the device's work once."""
    numbers = torch.cat([each.double() for each in vectors]).tolist()
    lists, start = [], 0
    for each in vectors:
        lists.append(numbers[start : start + len(each)])
        start += len(each)
    return lists
