"""Losses of the online distillation literature as pure functions of tensors.

All of them average over the batch, return nats and compute in float32 at least, also under autocast. Where logits may
have axes before the batch, these are the losses of several heads at once, which costs as many launches as one.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

EnsembleOf = Literal["logits", "probabilities"]
Labels = Int[Tensor, " batch"] | Float[Tensor, "batch class"]
"""Class indices; or, where labels are mixed, smoothed or weighted, the share of each class."""
Logits = Float[Tensor, "batch class"]
Scalar = Float[Tensor, ""]
Terms = dict[str, Scalar]
"""Scalars by name, such as `ce/student0` and `kl/fused->student0`."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Widen half precision to float32; leave float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def ramp_up(progress: Scalar, length: float) -> Scalar:
    """Compute a weight that grows from exp(-5) to 1 over the first part of the training and then stays 1.

    exp(-5 (1 - min(progress / length, 1))^2).

    Args:
        progress: Share of the epochs that are done, in [0, 1].
        length: Share of the training after which the weight is 1; 0: 1 throughout.

    Source: sigmoid ramp-up of Laine and Aila, arXiv 1610.02242; in ONE, OKDDip and FFL with length 80 of 300 epochs.
    """
    if length == 0:
        return torch.ones_like(progress)
    remaining = 1.0 - (progress / length).clamp(max=1.0)
    return torch.exp(-5.0 * remaining * remaining)


def cross_entropy(logits: Float[Tensor, "*head batch class"], labels: Labels) -> Float[Tensor, " *head"]:
    """Compute the cross-entropy: mean over the batch of -log softmax(logits)[label].

    With shares t of the classes it is the mean of -sum_c t_c log softmax(logits)_c, as in torch's `cross_entropy`.

    Returns:
        One loss per head, in nats.

    Source: MFEF (ICANN 2022), Eq. (2). The paper sums over the batch; like all published code we average.
    """
    log_probabilities = F.log_softmax(at_least_float32(logits), dim=-1)
    if labels.is_floating_point():
        return -(labels * log_probabilities).sum(dim=-1).mean(dim=-1)
    return -log_probabilities.gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1).mean(dim=-1)


def label_shares(labels: Labels, like: Float[Tensor, "*head batch class"]) -> Float[Tensor, "batch class"]:
    """Return the share of each class in each label, which add up to 1: of class indices the one-hot vectors."""
    if labels.is_floating_point():
        return (labels / labels.sum(dim=1, keepdim=True).clamp(min=torch.finfo(labels.dtype).tiny)).to(like.dtype)
    # Not one_hot, which looks at the labels from the host.
    return (labels[:, None] == torch.arange(like.shape[-1], device=labels.device)).to(like.dtype)


def soft_target_kl(
    logits: Float[Tensor, "*head batch class"],
    target_logits: Float[Tensor, "*head batch class"],
    temperature: float,
    detach: bool = True,
    epsilon: float = 0.0,
) -> Float[Tensor, " *head"]:
    """Compute the distillation loss T^2 KL(softmax(target / T) || softmax(logits / T)).

    Summed over classes, averaged over the batch.

    Args:
        logits: Student logits; gradients flow.
        target_logits: Teacher logits: of a teacher, a peer or an ensemble.
        temperature: T > 0. The factor T^2 keeps the size of gradients independent of T.
        detach: Whether the teacher logits get no gradient.
        epsilon: Added to the teacher's probabilities, as the code of ONE, FFL and OKDDip does with 1e-7.

    Returns:
        One loss per head, in nats.

    Source: Hinton et al., arXiv 1503.02531; MFEF (ICANN 2022), Eqs. (3) and (11).
    Differs: epsilon is 0 by default. It adds T^2 C epsilon (1 + the mean over the C classes of log(target / student)):
        1e-7 at T 3 adds 9e-5 for 100 classes where both agree, -2e-4 to 4e-4 on random logits; a tenth of it for 10.
    """
    target_logits = at_least_float32(target_logits.detach() if detach else target_logits)
    log_probabilities = F.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    log_targets = F.log_softmax(target_logits / temperature, dim=-1)
    targets = log_targets.exp()
    if epsilon:
        targets = targets + epsilon
        log_targets = targets.log()
    divergence = (targets * (log_targets - log_probabilities)).sum(dim=-1).mean(dim=-1)
    return temperature**2 * divergence


def students_kl(
    source: str,
    logits: Sequence[Logits],
    target_logits: Float[Tensor, "*student batch class"],
    temperature: float,
    weight: float,
) -> Terms:
    """Compute `kl/<source>->student<j>`, the weighted `soft_target_kl`, of each student; one target or one for each."""
    students = torch.stack(list(logits))
    divergences = weight * soft_target_kl(students, target_logits.expand_as(students), temperature)
    return {f"kl/{source}->student{index}": each for index, each in enumerate(divergences.unbind())}


def soft_cross_entropy(logits: Logits, target_logits: Logits, temperature: float) -> Scalar:
    """Compute the cross-entropy with softened targets, without T^2.

    -sum_c softmax(target / T)_c log softmax(logits / T)_c, summed over classes, averaged over the batch; the target
    gets no gradient. It is KL(target || logits) at T plus the entropy of the target.

    Args:
        logits: Student logits; gradients flow.
        target_logits: Teacher logits.
        temperature: T > 0.

    Source: authors' code ArchipLab-LinfengZhang/pytorch-self-distillation-final at eda2f2b, train.py.
    """
    targets = F.softmax(at_least_float32(target_logits.detach()) / temperature, dim=1)
    log_probabilities = F.log_softmax(at_least_float32(logits) / temperature, dim=1)
    return -(targets * log_probabilities).sum(dim=1).mean()


def squared_distance(
    values: Float[Tensor, "batch *axes"], target: Float[Tensor, "batch *axes"], detach: bool = True
) -> Scalar:
    """Compute ||values - target||^2, summed over all axes but the batch, averaged over the batch.

    Args:
        values: Student logits, probabilities or features; gradients flow.
        target: The teacher's, of the same shape.
        detach: Whether the target gets no gradient.

    Source: the hint of Zhou et al., "Rocket Launching", arXiv 1708.04106; authors' code zhougr1993/Rocket-Launching at
        aa6b8f5, rocket_interval.py.
    """
    difference = at_least_float32(values) - at_least_float32(target.detach() if detach else target)
    return difference.square().flatten(1).sum(dim=1).mean()


def supervised_contrast(similarities: Float[Tensor, "*pair batch batch"], labels: Labels) -> Float[Tensor, " *pair"]:
    """Compute the supervised contrast: mean over images p and their positives q of -log(e^S_pq / sum_{k != p} e^S_pk).

    Positives of p are the other images of its class. Images without any are left out of the mean, which is 0 where no
    image has one.

    Args:
        similarities: S, of each image of a batch (row) to each (column); of several pairs of embeddings at once.
        labels: Class indices; or the share of each class, the class of an image then being that with its largest share.

    Returns:
        One loss per pair, in nats.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362, Eq. (2); as VCL and ICL of
        mutual contrastive learning: winycg/MCL at 61f20d1, losses/cifar_sup_mcl_loss.py.
    Differs: in that code an image without a positive makes the loss NaN.
    """
    similarities = at_least_float32(similarities)
    classes = labels.argmax(dim=1) if labels.is_floating_point() else labels
    itself = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    positive = (classes[:, None] == classes) & ~itself
    number = positive.sum(dim=1)
    log_shares = similarities - similarities.masked_fill(itself, -math.inf).logsumexp(dim=-1, keepdim=True)
    means = (log_shares * positive).sum(dim=-1) / number.clamp(min=1)
    return -means.sum(dim=-1) / (number > 0).sum().clamp(min=1)


def mean_logits(logits: Sequence[Logits]) -> Logits:
    """Compute the mean of the logits of several students, z_a = 1/n sum_j z_j.

    Source: MFEF (ICANN 2022), section 3.3; authors' code Jangho-Kim/FFL-pytorch at 546d478, train_FFL.py.
    """
    return at_least_float32(torch.stack(list(logits))).mean(dim=0)


def mixture_logits(
    logits: Sequence[Logits], temperature: float, log_weights: Float[Tensor, "batch member"] | None = None
) -> Logits:
    """Compute logits whose softmax at T is the mean, weighted or not, of the students' softened probabilities."""
    log_members = F.log_softmax(at_least_float32(torch.stack(list(logits), dim=1)) / temperature, dim=-1)
    if log_weights is None:
        return temperature * (torch.logsumexp(log_members, dim=1) - math.log(len(logits)))
    return temperature * torch.logsumexp(at_least_float32(log_weights).unsqueeze(2) + log_members, dim=1)


def weighted_logits(logits: Sequence[Logits], weights: Float[Tensor, "batch member"]) -> Logits:
    """Compute the weighted sum of the logits of several students, z = sum_j w_j z_j, with weights for each image.

    Source: the gated ensemble of ONE, arXiv 1806.04606; the targets of OKDDip, arXiv 1912.00350.
    """
    members = at_least_float32(torch.stack(list(logits), dim=1))
    return (at_least_float32(weights).unsqueeze(2) * members).sum(dim=1)


def ensemble(
    logits: Sequence[Logits],
    of: EnsembleOf,
    temperature: float,
    log_weights: Float[Tensor, "batch member"] | None = None,
) -> Logits:
    """Compute the logits of an ensemble that teaches at a temperature.

    Args:
        logits: Logits of its members.
        of: Whether it averages the members' logits, or their probabilities softened by the temperature.
        temperature: T > 0.
        log_weights: Logarithms of weights that add up to 1 for each image; None: equal weights.
    """
    if of == "probabilities":
        return mixture_logits(logits, temperature, log_weights)
    return mean_logits(logits) if log_weights is None else weighted_logits(logits, log_weights.exp())
