"""KDCL: collaborative learning from one soft target made of all students."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.methods.cohort import Outputs
from codistill.methods.losses import (
    Labels,
    Logits,
    Scalar,
    Terms,
    at_least_float32,
    label_shares,
    mixture_logits,
    students_kl,
)
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import KLSettings, cross_entropy_terms

StudentLogits = Float[Tensor, "student batch class"]
LINEAR_STEPS = 16
"""Rounds of `linear_weights`, each some 20 small kernels on a GPU."""
RIDGE = 1e-6
"""Added to the diagonal of the error correlation, in units of its mean: equal students would make it singular."""


@dataclass(frozen=True, kw_only=True)
class KDCLSettings(KLSettings):
    """Settings of KDCL."""

    shared_stages: int | None = 0
    """Low stages that the students share. 0: nothing, as in KDCL."""
    variant: Literal["naive", "linear", "minlogit", "general"] = "general"
    """Target: for each image the student with the smallest cross-entropy (naive); for each batch the convex combination
    of logits with the smallest one (linear); for each class the smallest margin to the true class (minlogit); or
    probabilities weighted by the correlation of the students' errors in the last epoch (general)."""
    temperature: float = 2.0
    """T of the distillation terms, > 0, with the factor T^2."""
    kl_weight: float = 1.0
    """Factor on the distillation terms, at least 0."""
    views_per_student: bool = True

    @property
    def needs_full_batch(self) -> str:
        """The weights of variants general and linear come from all images; see `MethodSettings.needs_full_batch`."""
        own = f"method.variant {self.variant}" if self.variant in ("general", "linear") else ""
        return own or super().needs_full_batch

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("temperature", 0 < self.temperature < math.inf, "a number above 0")
        self.check("kl_weight", 0 <= self.kl_weight < math.inf, "a number, at least 0")


def true_class_logit(values: StudentLogits, labels: Labels) -> Float[Tensor, "student batch 1"]:
    """Return the logit of the true class of each image; where its label has shares of several, their mean by share."""
    if labels.is_floating_point():
        return (values * label_shares(labels, values)).sum(dim=2, keepdim=True)
    return values.gather(2, labels[None, :, None].expand(len(values), -1, 1))


def naive_target(logits: StudentLogits, labels: Labels) -> Logits:
    """Return, for each image, the logits of the student with the smallest cross-entropy; the first of equal ones."""
    best = true_class_logit(F.log_softmax(logits, dim=2), labels).argmax(dim=0, keepdim=True)
    return logits.gather(0, best.expand(1, -1, logits.shape[2]))[0]


def minlogit_target(logits: StudentLogits, labels: Labels) -> Logits:
    """Compute min_i (z_i^c - z_i^y) for each class c of an image of class y: 0 for y."""
    return (logits - true_class_logit(logits, labels)).min(dim=0).values


def weighted_sum(weights: Float[Tensor, "*some student"], logits: StudentLogits) -> Float[Tensor, "*some batch class"]:
    """Compute sum_i w_i z_i. Not as a matrix product, which autocast would round to bfloat16."""
    products = [weights[..., index, None, None] * each for index, each in enumerate(logits)]
    return torch.stack(products).sum(dim=0)


def linear_weights(logits: StudentLogits, labels: Labels) -> Float[Tensor, " student"]:
    """Find weights, at least 0 and of sum 1, with which the combined logits have the smallest mean cross-entropy.

    Exponentiated gradient, w_i <- w_i exp(-s g_i) / sum, from equal weights. The problem is convex, so the only thing
    to choose is s: each step tries sixteen sizes, a factor 2 apart, all at once, and takes the best, or none. Always
    the same operations on the device, whatever the numbers are: nothing for the host to read.

    With 16 steps the cross-entropy of 60 random batches came within 1e-7 nats of the smallest for two students, within
    3e-4 for three and 2e-3 for four and six (half of the batches: within 1e-8); see test_kdcl.py. It is never above
    that of equal weights.
    """
    log_weights = torch.zeros_like(logits[:, 0, 0]).log_softmax(dim=0)
    correct = true_class_logit(logits, labels)
    # By how much a step shifts the log-weights of the best and the worst student apart.
    shifts = torch.cat([2.0 ** torch.arange(4, -12, -1, device=logits.device), log_weights.new_zeros(1)])
    shifts = shifts.to(log_weights.dtype)
    for _ in range(LINEAR_STEPS):
        predicted = weighted_sum(log_weights.exp(), logits).softmax(dim=1)
        gradient = ((logits * predicted).sum(dim=2) - correct[:, :, 0]).mean(dim=1)
        gradient = gradient - gradient.min()
        direction = gradient / gradient.max().clamp(min=torch.finfo(gradient.dtype).tiny)
        # The floor, 2e-9, lets a student come back into play.
        tried = (log_weights - shifts[:, None] * direction).log_softmax(dim=1).clamp(min=-20)
        combined = weighted_sum(tried.exp(), logits)
        own = weighted_sum(tried.exp(), correct)[..., 0]
        losses = (combined.logsumexp(dim=2) - own).mean(dim=1)
        log_weights = tried.index_select(0, losses.argmin().reshape(1))[0]
    return log_weights.softmax(dim=0)


def linear_target(logits: StudentLogits, labels: Labels) -> Logits:
    """Compute the convex combination of logits with the smallest mean cross-entropy; see `linear_weights`."""
    return weighted_sum(linear_weights(logits, labels), logits)


class ErrorWeights(nn.Module):
    """Weights of an ensemble of probabilities from the correlation of its members' errors.

    w_k = sum_j C^-1_kj / sum_ij C^-1_ij,   C_ij = mean over images of sum_c (p_i^c - t^c)(p_j^c - t^c),

    t the one-hot label, or its shares of the classes. Of all weights of sum 1 these give sum_k w_k p_k the smallest
    squared error.

    Source: KDCL (CVPR 2020), the variant General.
    Differs: a small ridge keeps C invertible, and negative weights, which would make no distribution, become 0 before
        the others are scaled to sum 1 (for two students this is the best of the convex combinations).
    """

    weights: Tensor
    products: Tensor
    images: Tensor

    def __init__(self, students: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((students,), 1 / students))
        self.register_buffer("products", torch.zeros(students, students))
        self.register_buffer("images", torch.zeros(()))  # float32 counts to 2^24 exactly

    def gather(self, probabilities: StudentLogits, labels: Labels) -> None:
        """Add the errors of a batch, in place."""
        errors = probabilities - label_shares(labels, probabilities)
        # Not as a matrix product, which autocast would round to bfloat16.
        products = torch.stack([(each * errors).sum(dim=(1, 2)) for each in errors])
        self.products += products.to(self.products.dtype)
        self.images += len(labels)

    def renew(self) -> None:
        """Compute the weights from the gathered errors, if there are any, and reset them."""
        correlation = (self.products / self.images.clamp(min=1)).double()
        scale = correlation.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        ones = torch.ones_like(correlation[0])
        solution, _ = torch.linalg.solve_ex(correlation + torch.diag(RIDGE * scale * ones), ones)
        weights = (solution / solution.sum()).clamp(min=0)
        weights = (weights / weights.sum()).to(self.weights.dtype)
        self.weights.copy_(torch.where(self.images > 0, weights, self.weights))
        self.products.zero_()
        self.images.zero_()


@METHODS.register("kdcl")
class KDCL(Method):
    """Each student has its own view of the images, and learns from the labels and from one target made of all students.

        sum_i [ CE(z_i) + weight T^2 KL(p~_t || p~_i) ],   p~_i = softmax(z_i / T), p~_t without gradient

    The target p~_t is softmax(z_t / T) with, for an image of class y,
    naive: z_t = z_i of the student i with the smallest CE(z_i);
    linear: z_t = sum_i a_i z_i with the a on the simplex that minimises the batch's CE(z_t);
    minlogit: z_t^c = min_i (z_i^c - z_i^y);
    or, general: p~_t = sum_i w_i p~_i with the w of `ErrorWeights`: equal in the first epoch, then from the last one.

    Args:
        students: At least two networks, of any kind.

    Source: Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020. Its authors published no
        code; T = 2 and weight 1 come from a third party's port. The default is general because the paper's CIFAR-100
        figures that are known to us (ResNet-32 with WRN-16-2) are that variant's.
    Differs: general's error correlation is a mean over a validation set there; here, where a method sees training
        batches only, over those of the epoch: augmented images, each with the weights of its step. Linear's weights
        are found to the accuracy that `linear_weights` states.
    """

    settings: KDCLSettings
    family = "online"
    year = 2020
    exchanges = "logits"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Make the weights of variant general."""
        self.ensemble = ErrorWeights(len(self.cohort)) if self.settings.variant == "general" else None

    @torch.no_grad()
    def target_logits(self, logits: Sequence[Logits], labels: Labels) -> Logits:
        """Compute logits whose softmax at the temperature is the target; each student may have its own view."""
        stacked = torch.stack([at_least_float32(each) for each in logits])
        if self.ensemble is not None:
            log_weights = self.ensemble.weights.to(stacked.dtype).log().expand(len(labels), -1)
            return mixture_logits(list(stacked), self.settings.temperature, log_weights)
        targets = {"naive": naive_target, "linear": linear_target, "minlogit": minlogit_target}
        return targets[self.settings.variant](stacked, labels)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<i>` and `kl/target->student<i>`; in training, variant general also gathers errors."""
        logits, chosen, temperature = outputs.logits, self.settings, self.settings.temperature
        target = self.target_logits(logits, labels)
        distillation = students_kl("target", logits, target, labels, temperature, chosen.kl_weight, *chosen.form)
        if self.ensemble is not None and self.training:
            with torch.no_grad():
                softened = at_least_float32(torch.stack(list(logits))) / temperature
                self.ensemble.gather(softened.softmax(dim=2), labels)
        return cross_entropy_terms(logits, labels) | distillation

    def after_epoch(self) -> None:
        """Renew the weights of variant general; see `Method.after_epoch`."""
        if self.ensemble is not None:
            self.ensemble.renew()
