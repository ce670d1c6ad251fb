"""OKDPH: online knowledge distillation by a parameter hub, the average of all students' weights."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from codistill.methods.cohort import Images, Outputs
from codistill.methods.losses import (
    Labels,
    Logits,
    Scalar,
    Terms,
    at_least_float32,
    cross_entropy,
    mean_logits,
    students_kl,
)
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import KLSettings, cross_entropy_terms, weighted
from codistill.networks.origin import DRAWN, mark, origin_of
from codistill.networks.probe import copied


@dataclass(frozen=True, kw_only=True)
class OKDPHSettings(KLSettings):
    """Settings of the parameter hub."""

    shared_stages: int | None = 0
    """Low stages that the students share. 0: nothing, as in OKDPH."""
    views_per_student: bool = True
    """Whether each student, and the hub, is trained on crops and flips of its own instead of the same ones for all."""
    temperature: float = 4.0
    """T of the distillation terms, > 0, with the factor T^2."""
    ce_weight: float = 0.8
    """omega, from 0 to 1: weight of a student's cross-entropy; the hub's has 1 - omega."""
    kl_weight: float = 0.8
    """beta, factor on the distillation terms, at least 0."""
    pull: float = 0.5
    """gamma, from 0 to 1: how far each student moves towards the hub between two epochs."""
    mixing: Literal["mean", "dirichlet"] = "mean"
    """Weights of the students in the hub of a step: equal, or drawn anew uniformly from all that add up to 1. The
    hub that is evaluated and deployed is the mean."""
    hub_gradient: bool = True
    """Whether the hub's cross-entropy trains the students, as the paper has it; in the authors' code it does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("temperature", 0 < self.temperature < math.inf, "a number above 0")
        self.check("ce_weight", 0 <= self.ce_weight <= 1, "between 0 and 1")
        self.check("kl_weight", 0 <= self.kl_weight < math.inf, "at least 0")
        self.check("pull", 0 <= self.pull <= 1, "between 0 and 1")


@METHODS.register("okdph")
class OKDPH(Method):
    """Students learn from the labels, from the loss of a hub with their average weights, and from their mean logits.

        sum_i [ omega CE(z_i) + beta T^2 KL(m -> z_i) ] + (1 - omega) CE(z_h),   m = 1/(n+1) (z_h + sum_j z_j)

    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)) with a detached. The hub h is a network of the students' form with
    the weights w_h = sum_j r_j w_j, r_j = 1/n, so that its loss trains all of them, each with r_j times the gradient.
    Every student and the hub see an augmentation of their own. Between two epochs each student's weights and
    batch statistics move to (1 - gamma) w_i + gamma w_h.

    The hub has no weights of its own: it is the predictor `hub`, the mean of the students' weights and running
    statistics, a plain network. In training it normalises by its batch, and keeps no statistics.

    Args:
        students: At least two equal networks. What was drawn starts as the first student; weights of your own stay.

    Source: Zhang et al., "Generalization Matters: Loss Minima Flattening via Parameter Hybridization for Efficient
        Online Knowledge Distillation", CVPR 2023; authors' code tianlizhang/OKDPH at f65b661, src/OKDPH.py.
    Differs: in their code CE(z_h) has no gradient (setting hub_gradient), and the Dirichlet draw fails. There each
        student has a loss of its own with (1 - omega) CE(z_h) in it, whose gradient for that student's weights is that
        of the sum above. Their hub is that of the last step, with the statistics of one more batch; their students and
        hub have augmentations of different kinds.
    """

    settings: OKDPHSettings
    family = "online"
    year = 2023
    exchanges = "logits, weights"
    min_students = 2
    like_students = True

    def build(self) -> None:
        """Have all drawn weights start as those of the first student."""
        first = self.cohort[0].state_dict(keep_vars=True)
        for student in self.cohort:
            for name, tensor in student.state_dict(keep_vars=True).items():
                source = first[name]
                if tensor is not source and str(origin_of(tensor)).startswith(DRAWN):
                    with torch.no_grad():
                        tensor.copy_(source)
                    if (origin := origin_of(source)) is not None:
                        mark(tensor, origin)

    def hub_state(self, shares: Sequence[float | Tensor]) -> dict[str, Tensor]:
        """Average the students' weights and buffers, those of whole numbers aside, by shares that add up to 1."""
        states = [student.state_dict(keep_vars=True) for student in self.cohort]
        mixed: dict[str, Tensor] = {}
        for name, first in states[0].items():
            parts = [at_least_float32(state[name]) * share for state, share in zip(states, shares, strict=True)]
            mixed[name] = functools.reduce(torch.add, parts) if first.is_floating_point() else first.clone()
        return mixed

    @property
    def equal_shares(self) -> list[float]:
        """1/n for each student."""
        return [1 / len(self.cohort)] * len(self.cohort)

    @property
    def views(self) -> int:
        """Views of an image in a pass: in training, if `views_per_student`, one per student and the hub's; else 1."""
        return super().views + 1 if super().views > 1 else 1

    def forward(self, images: Images) -> Outputs:
        """Run all students and the hub on normalised images; of several views the hub takes the last."""
        views, last = (images[: len(self.cohort)], images[-1]) if images.ndim == 5 else (images, images)
        outputs = super().forward(views)
        shares: Sequence[float | Tensor] = self.equal_shares
        if self.training and self.settings.mixing == "dirichlet":
            drawn = torch.empty(len(self.cohort), device=images.device).exponential_()
            shares = (drawn / drawn.sum()).unbind()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.hub_gradient):
            state = self.hub_state(shares)
            # Not with tied weights: each name has its own mean, equal for those that are one tensor.
            hub = functional_call(self.cohort[0], state, (last,), tie_weights=False)
        return replace(outputs, extras={"hub": hub})

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<i>`, `ce/hub` and `kl/target->student<i>`."""
        chosen, hub = self.settings, outputs.extras["hub"]
        terms = weighted(chosen.ce_weight, cross_entropy_terms(outputs.logits, labels))
        terms["ce/hub"] = (1 - chosen.ce_weight) * cross_entropy(hub, labels)
        target = mean_logits([*outputs.logits, hub])
        how = chosen.temperature, chosen.kl_weight, *chosen.form
        return terms | students_kl("target", outputs.logits, target, labels, *how)

    @torch.no_grad()
    def between_epochs(self) -> None:
        """Move each student towards the hub; see `Method.between_epochs`."""
        hub = self.hub_state(self.equal_shares)
        for student in self.cohort:
            for name, own in student.state_dict().items():
                if own.is_floating_point():
                    own.lerp_(hub[name], self.settings.pull)

    def predictions(self, outputs: Outputs) -> dict[str, Logits]:
        """Name the logits of students, ensemble and hub; see `Method.predictions`."""
        return {**super().predictions(outputs), **outputs.extras}

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble and the hub, a plain network."""
        hub = copied(self.cohort[0])
        hub.load_state_dict(self.hub_state(self.equal_shares))
        return {**super().predictors(), "hub": hub}
