"""Terms that several methods have in common, and the settings of distillation by softened logits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codistill.methods.losses import (
    EnsembleOf,
    KLForm,
    Labels,
    Logits,
    Scalar,
    Terms,
    cross_entropy,
    distillation,
    ramp_up,
    weights_fit,
)
from codistill.methods.method import MethodSettings

Pairs = Mapping[str, tuple[Logits, Logits]]
"""Student logits and teacher logits by the name of a distillation term."""


@dataclass(frozen=True, kw_only=True)
class KLSettings(MethodSettings):
    """The form of a method's distillation terms (docs/kl.md)."""

    kl: KLForm = "kl"
    """Form of the distillation terms: KL; KL of standardised logits; decoupled into target class and others (dkd); or
    correlation in place of KL (dist)."""
    kl_weights: tuple[float, ...] = ()
    """Factors on the two parts of dkd (target class, other classes) or dist (images, classes). Empty: 1 8 or 1 1."""

    @property
    def form(self) -> tuple[KLForm, tuple[float, ...]]:
        """The form and its weights, as `losses.distillation` takes them."""
        return self.kl, self.kl_weights

    @property
    def needs_full_batch(self) -> str:
        """Correlations within classes come from all images; see `MethodSettings.needs_full_batch`."""
        return "method.kl dist" if self.kl == "dist" else ""

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = "two numbers, at least 0, beside kl dkd or dist"
        self.check("kl_weights", weights_fit(self.kl, self.kl_weights), bounds)


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(KLSettings):
    """Settings of the distillation terms."""

    temperature: float = 3.0
    """T of all distillation terms, > 0; cross-entropy and prediction use 1."""
    ramp_up: float = 80 / 300
    """Share of the training over which the distillation terms grow to full weight (80 of 300 epochs); 0: at once."""
    detach_teachers: bool = True
    """Whether the teaching side of a distillation term gets no gradient."""
    target_epsilon: float = 0.0
    """Added to the teaching probabilities; the code of FFL, ONE and OKDDip adds 1e-7."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("temperature", 0 < self.temperature < math.inf, "a number above 0")
        self.check("ramp_up", 0 <= self.ramp_up <= 1, "between 0 and 1, a share of the training")
        self.check("target_epsilon", 0 <= self.target_epsilon < 1, "at least 0 and below 1")
        without = self.kl in ("dkd", "dist")
        self.check("target_epsilon", not (without and self.target_epsilon), f"0 with kl {self.kl}")


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings(DistillationSettings):
    """Settings of the methods whose students learn from an ensemble of students."""

    ensemble_of: EnsembleOf = "logits"
    """Whether a teaching ensemble averages the students' logits or their softened probabilities."""


def kl_pairs(
    source: str, logits: Sequence[Logits], targets: Sequence[Logits] | Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pair `kl/<source>->student<j>` of each student with its target, or with the one of all."""
    each = [targets] * len(logits) if isinstance(targets, Tensor) else targets
    return {f"kl/{source}->student{index}": pair for index, pair in enumerate(zip(logits, each, strict=True))}


def ramped_kl(pairs: Pairs, labels: Labels, progress: Scalar, settings: DistillationSettings, detach: bool) -> Terms:
    """Compute r(t) T^2 KL(softmax(target / T) || softmax(logits / T)) of each pair, all at once.

    Args:
        pairs: As from `kl_pairs`.
        labels: Those of the batch.
        progress: Share of the epochs that are done.
        settings: T, ramp-up r and epsilon, and another form than KL.
        detach: Whether the teacher logits get no gradient.
    """
    logits, targets = (torch.stack(side) for side in zip(*pairs.values(), strict=True))
    chosen = settings.temperature, *settings.form, detach, settings.target_epsilon
    divergences = distillation(logits, targets, labels, *chosen)
    ramped = ramp_up(progress, settings.ramp_up).to(divergences.dtype) * divergences
    return dict(zip(pairs, ramped.unbind(), strict=True))


def cross_entropy_terms(logits: Sequence[Logits], labels: Labels, **others: Logits) -> Terms:
    """Compute the term `ce/student<j>` of each student and `ce/<name>` of each other head, all at once."""
    names = [*(f"student{index}" for index in range(len(logits))), *others]
    losses = cross_entropy(torch.stack([*logits, *others.values()]), labels)
    return {f"ce/{name}": loss for name, loss in zip(names, losses.unbind(), strict=True)}


def weighted(weight: float, terms: Terms) -> Terms:
    """Multiply all terms by a factor."""
    return {name: weight * value for name, value in terms.items()}
