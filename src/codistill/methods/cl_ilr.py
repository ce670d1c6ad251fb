"""CL-ILR: collaborative learning with shared intermediate-level representations."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from codistill.methods.cohort import Images, Outputs
from codistill.methods.losses import Labels, Scalar, Terms, ensemble
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import EnsembleSettings, cross_entropy_terms, kl_pairs, ramped_kl, weighted


@dataclass(frozen=True, kw_only=True)
class CLILRSettings(EnsembleSettings):
    """Settings of CL-ILR."""

    temperature: float = 2.0
    """T of all distillation terms, > 0; cross-entropy and prediction use 1."""
    ramp_up: float = 0.0
    """Share of the training over which the distillation terms grow to full weight; 0: at once."""
    ce_weight: float = 0.5
    """beta, the weight of the cross-entropy with the labels, from 0 to 1; the distillation terms have 1 - beta."""
    rescale_gradients: bool = True
    """Whether the gradient that reaches the shared stages is divided by the number of students."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("ce_weight", 0 <= self.ce_weight <= 1, "between 0 and 1")


class _ScaledGradient(torch.autograd.Function):
    # Not x * s + x.detach() * (1 - s): that rounds the values themselves.
    @staticmethod
    def forward(context: Any, values: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * context.factor, None


def scale_gradient(values: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """Return the values; the gradient that comes back through them is multiplied by the factor."""
    scaled: Tensor = _ScaledGradient.apply(values, factor)
    return scaled


@METHODS.register("cl-ilr")
class CLILR(Method):
    """Each student learns from the labels and from the mean of the other students.

        sum_j [ beta CE(z_j) + (1 - beta) T^2 KL(m_j -> z_j) ],  m_j = 1 / (n - 1) sum_{i != j} z_i

    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)) with a detached. The gradient that the n branches send into the
    shared stages is divided by n, so that its size does not grow with n; that of the branches is untouched.

    Args:
        students: At least two networks; equal ones share all stages but the last.

    Source: Song, Chai, "Collaborative Learning for Deep Neural Networks", NeurIPS 2018, arXiv 1805.11761, which we
        could not read beyond its abstract; its authors published no code that we know of. Formula, T = 2, beta = 1/2
        and rescaling after three implementations by others, which docs/cl-ilr.md compares.
    Differs: one fork for all students, where two of the three share as a tree.
    """

    settings: CLILRSettings
    title = "CL-ILR"
    family = "online"
    year = 2018
    exchanges = "logits"
    teacher = "allowed"
    min_students = 2

    def forward(self, images: Images) -> Outputs:
        """Run all students on normalised images."""
        low = self.cohort.trunk(images)
        if self.settings.rescale_gradients and self.cohort.shared_stages:
            low = scale_gradient(low, 1 / len(self.cohort))
        return self.branches(low, images.ndim == 5)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<j>` and `kl/peers->student<j>` of each student."""
        chosen, logits, weight = self.settings, outputs.logits, self.settings.ce_weight
        terms = weighted(weight, cross_entropy_terms(logits, labels))
        others = [[*logits[:index], *logits[index + 1 :]] for index in range(len(logits))]
        targets = [ensemble(each, chosen.ensemble_of, chosen.temperature) for each in others]
        divergences = ramped_kl(kl_pairs("peers", logits, targets), labels, progress, chosen, chosen.detach_teachers)
        return terms | weighted(1 - weight, divergences)
