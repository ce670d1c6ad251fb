"""Losses of the online distillation literature as pure functions of tensors.

All of them average over the batch, return nats and compute in float32 at least, also under autocast. Where logits may
have axes before the batch, these are the losses of several heads at once, which costs as many launches as one.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from codistill.core.errors import UsageError

EnsembleOf = Literal["logits", "probabilities"]
KLForm = Literal["kl", "standardised", "dkd", "dist"]
KL_WEIGHTS: dict[str, tuple[float, ...]] = {"dkd": (1.0, 8.0), "dist": (1.0, 1.0)}
"""Factors on the two parts of the forms that have parts: target class and other classes; images and classes."""
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


def standardised(logits: Float[Tensor, "*head batch class"]) -> Float[Tensor, "*head batch class"]:
    """Compute (z - mean) / (1e-7 + std) of each image's logits, with the unbiased standard deviation over the classes.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024; authors' code
        sunshangquan/logit-standardization-KD at f6e5aa5.
    """
    logits = at_least_float32(logits)
    return (logits - logits.mean(dim=-1, keepdim=True)) / (1e-7 + logits.std(dim=-1, keepdim=True))


def true_classes(labels: Labels) -> Tensor:
    """Return the class of each image [images]: of shares of the classes the largest one, the first of equal ones."""
    return labels.argmax(dim=1) if labels.is_floating_point() else labels


def decoupled_kl(
    logits: Float[Tensor, "*head batch class"],
    target_logits: Float[Tensor, "*head batch class"],
    labels: Labels,
    temperature: float,
    weights: Sequence[float] = KL_WEIGHTS["dkd"],
) -> Float[Tensor, " *head"]:
    """Compute T^2 [ a KL(b_t || b_s) + b KL(q_t || q_s) ], the decoupled distillation loss, averaged over the batch.

    b = (p_y, 1 - p_y) are the softened probabilities of the label's class y and of all the others, q those of the
    others among themselves. KL(p_t || p_s) is KL(b_t || b_s) + (1 - p_y of the teacher) KL(q_t || q_s).

    Args:
        logits: Student logits.
        target_logits: Teacher logits; detached by the caller.
        labels: Where they are shares of the classes, y is the class with the largest one, the first of equal ones.
        temperature: T > 0.
        weights: a and b.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, Eq. (7); authors' code
        megvii-research/mdistiller at e8c5bb3, mdistiller/distillers/DKD.py.
    Differs: there -1000 on a logit takes the class out of the others; here minus infinity.
    """
    classes = true_classes(labels)
    of_label = classes[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    sides = []
    for each in (logits, target_logits):
        scaled = at_least_float32(each) / temperature
        others, total = scaled.masked_fill(of_label, -math.inf), scaled.logsumexp(dim=-1)
        rest = others.logsumexp(dim=-1)
        label = scaled.masked_fill(~of_label, 0).sum(dim=-1)
        binary = torch.stack([label - total, rest - total], dim=-1)
        sides.append((binary, (others - rest.unsqueeze(-1)).masked_fill(of_label, 0)))
    (binary, among), (target_binary, target_among) = sides
    of_target = (target_binary.exp() * (target_binary - binary)).sum(dim=-1)
    shares = target_among.exp().masked_fill(of_label, 0)
    of_others = (shares * (target_among - among)).sum(dim=-1)
    return temperature**2 * (weights[0] * of_target + weights[1] * of_others).mean(dim=-1)


def correlation_loss(
    logits: Float[Tensor, "*head batch class"],
    target_logits: Float[Tensor, "*head batch class"],
    temperature: float,
    weights: Sequence[float] = KL_WEIGHTS["dist"],
) -> Float[Tensor, " *head"]:
    """Compute T^2 [ b (1 - mean_i r(row i)) + g (1 - mean_c r(column c)) ] of the softened probabilities.

    r is Pearson's correlation between student and teacher: of the probabilities of an image over the classes, and of
    those of a class over the images. It is 1 where one side is a rising straight line of the other.

    Args:
        logits: Student logits.
        target_logits: Teacher logits; detached by the caller.
        temperature: T > 0.
        weights: b, between the classes, and g, within them.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (DIST), NeurIPS 2022, arXiv 2205.10536;
        authors' code hunto/DIST_KD at 6d93ca0, segmentation/losses/dist_kd.py, which adds 1e-8 to the product of norms.
    Differs: that code has T = 1 only; T^2 is as in third parties' ports for classification.
    """
    values, targets = (F.softmax(at_least_float32(each) / temperature, dim=-1) for each in (logits, target_logits))

    def distance(axis: int) -> Tensor:
        own, other = (each - each.mean(dim=axis, keepdim=True) for each in (values, targets))
        lengths = torch.linalg.vector_norm(own, dim=axis) * torch.linalg.vector_norm(other, dim=axis)
        distances: Tensor = 1 - (own * other).sum(dim=axis) / (lengths + 1e-8)
        return distances.mean(dim=-1)

    return temperature**2 * (weights[0] * distance(-1) + weights[1] * distance(-2))


def distillation(
    logits: Float[Tensor, "*head batch class"],
    target_logits: Float[Tensor, "*head batch class"],
    labels: Labels,
    temperature: float,
    form: KLForm = "kl",
    weights: Sequence[float] = (),
    detach: bool = True,
    epsilon: float = 0.0,
) -> Float[Tensor, " *head"]:
    """Compute a distillation loss of softened logits, in the form that a setting names.

    Args:
        logits: Student logits; gradients flow.
        target_logits: Teacher logits.
        labels: Those of the batch; only dkd looks at them.
        temperature: T > 0.
        form: `soft_target_kl`, the same of `standardised` logits, `decoupled_kl` or `correlation_loss`.
        weights: Factors on the two parts of dkd or dist; empty: those of `KL_WEIGHTS`.
        detach: Whether the teacher logits get no gradient.
        epsilon: As in `soft_target_kl`; the forms dkd and dist have none.
    """
    target_logits = target_logits.detach() if detach else target_logits
    weights = weights or KL_WEIGHTS.get(form, ())
    if form == "dkd":
        return decoupled_kl(logits, target_logits, labels, temperature, weights)
    if form == "dist":
        return correlation_loss(logits, target_logits, temperature, weights)
    if form == "standardised":
        logits, target_logits = standardised(logits), standardised(target_logits)
    return soft_target_kl(logits, target_logits, temperature, detach, epsilon)


def weights_fit(form: KLForm, weights: Sequence[float]) -> bool:
    """Whether a form of the distillation loss can have these weights; see `distillation`."""
    return not weights or (form in KL_WEIGHTS and len(weights) == 2 and all(0 <= each < math.inf for each in weights))


def check_teaching(
    temperature: float, weight: float, kl: KLForm, kl_weights: Sequence[float], prefix: str = ""
) -> None:
    """Refuse a teacher's temperature, weight and form out of their ranges; `prefix` stands before their names.

    Raises:
        UsageError: One of them is.
    """
    forms, bounds = get_args(KLForm), f"two numbers, at least 0, beside {prefix}kl dkd or dist"
    for name, value, valid, allowed in (
        ("temperature", temperature, 0 < temperature < math.inf, "a number above 0"),
        ("weight", weight, 0 <= weight < math.inf, "a number, at least 0"),
        ("kl", kl, kl in forms, f"one of {', '.join(forms)}"),
        ("kl_weights", kl_weights, weights_fit(kl, kl_weights), bounds),
    ):
        if not valid:
            raise UsageError(f"{prefix}{name} is {value}; it must be {allowed}")


def students_kl(
    source: str,
    logits: Sequence[Logits],
    target_logits: Float[Tensor, "*student batch class"],
    labels: Labels,
    temperature: float,
    weight: float,
    form: KLForm = "kl",
    weights: Sequence[float] = (),
) -> Terms:
    """Compute `kl/<source>->student<j>`, the weighted `distillation`, of each student; one target or one for each."""
    students = torch.stack(list(logits))
    targets = target_logits.expand_as(students)
    divergences = weight * distillation(students, targets, labels, temperature, form, weights)
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
    classes = true_classes(labels)
    itself = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    positive = (classes[:, None] == classes) & ~itself
    number = positive.sum(dim=1)
    lowest = torch.finfo(similarities.dtype).min  # and no infinity, of which an image alone in its batch makes NaN
    log_shares = similarities - similarities.masked_fill(itself, lowest).logsumexp(dim=-1, keepdim=True)
    means = log_shares.masked_fill(~positive, 0).sum(dim=-1) / number.clamp(min=1)
    return -means.sum(dim=-1) / (number > 0).sum().clamp(min=1)


def attention_map(feature_map: Float[Tensor, "batch _channel _height _width"]) -> Float[Tensor, "batch place"]:
    """Compute the attention map of a feature map: the mean over its channels of the squared values at each place.

    Source: Zagoruyko, Komodakis, arXiv 1612.03928, section 3.1.
    """
    return at_least_float32(feature_map).square().mean(dim=1).flatten(1)


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
