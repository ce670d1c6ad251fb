"""MCL: mutual contrastive learning of embeddings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, permutations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.methods.cohort import FeatureMap, Images, Outputs
from codistill.methods.losses import (
    Labels,
    Scalar,
    Terms,
    at_least_float32,
    mean_logits,
    soft_target_kl,
    students_kl,
    supervised_contrast,
)
from codistill.methods.method import METHODS, Method, MethodSettings
from codistill.methods.terms import KLSettings, cross_entropy_terms
from codistill.networks.probe import probe_shapes

SIZE = 128
"""Of embeddings, and of the layer before them."""
Embeddings = Float[Tensor, "batch dimension"]


@dataclass(frozen=True, kw_only=True)
class ContrastSettings(MethodSettings):
    """Settings of the contrast between embeddings."""

    shared_stages: int | None = 0
    """Low stages that the students share. 0: nothing."""
    vcl_weight: float = 0.1
    """Factor on the contrast within each network, at least 0."""
    icl_weight: float = 0.1
    """Factor on the contrast between the networks, at least 0."""
    soft_vcl_weight: float = 1.0
    """Factor on the KL between the similarities within two networks, at least 0."""
    soft_icl_weight: float = 1.0
    """Factor on the KL between the similarities of two networks' embeddings and those the other way round, at least
    0."""
    contrast_temperature: float = 0.1
    """tau, > 0, by which all similarities are divided."""
    temperature: float = 3.0
    """T of all KL terms, > 0, with the factor T^2."""

    @property
    def needs_full_batch(self) -> str:
        """Each image is compared with all others of its batch; see `MethodSettings.needs_full_batch`."""
        return "the contrast between images"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vcl_weight", "icl_weight", "soft_vcl_weight", "soft_icl_weight"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in ("contrast_temperature", "temperature"):
            self.check(name, 0 < getattr(self, name) < math.inf, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class MCLSettings(ContrastSettings, KLSettings):
    """Settings of mutual contrastive learning."""

    kl_weight: float = 0.0
    """Factor on the distillation of the mean logits of all students to each, at least 0; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("kl_weight", 0 <= self.kl_weight < math.inf, "at least 0")


class Embedding(nn.Module):
    """Map a feature map to an embedding of length 1: mean over all places, linear, ReLU, linear, division by its norm.

    Source: winycg/MCL at 61f20d1, losses/cifar_sup_mcl_loss.py.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE))

    def forward(self, feature_map: FeatureMap) -> Embeddings:
        """Map [batch, channels, height, width] to [batch, 128]."""
        return F.normalize(at_least_float32(self.layers(feature_map.mean(dim=(2, 3)))), dim=1)


def contrast_terms(embeddings: Sequence[Sequence[Embeddings]], labels: Labels, settings: ContrastSettings) -> Terms:
    """Compute the four contrasts of the embeddings of several networks.

    With [S_ab]_pq = e_a(p) . e_b(q) / tau, for images p and q of the batch, SC as in `supervised_contrast`, and
    KL(A || B) that of softmax(A / T) and softmax(B / T), row by row, A detached; each is the sum over all embeddings a
    of network i and, where there are two networks, all b of network j:

        vcl/student<i>                  vcl_weight SC(S_aa)
        icl/student<j>->student<i>      icl_weight SC(S_ab)
        softvcl/student<j>->student<i>  soft_vcl_weight T^2 KL(S_bb || S_aa)
        softicl/student<j>->student<i>  soft_icl_weight T^2 KL(S_ba || S_ab)

    Args:
        embeddings: Of each network one or more, [batch, dimension], each of length 1.
        labels: Class indices or shares of the classes.
        settings: The weights, tau and T.
    """
    together = torch.stack([each for own in embeddings for each in own])
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # which would round to bfloat16
        compared = together[:, None] @ together.transpose(1, 2) / settings.contrast_temperature
    contrasts = supervised_contrast(compared, labels)
    within = compared.diagonal().permute(2, 0, 1)
    one, other = within[:, None].expand_as(compared), within.expand_as(compared)
    soft = {
        "softvcl": settings.soft_vcl_weight * soft_target_kl(one, other, settings.temperature),
        "softicl": settings.soft_icl_weight * soft_target_kl(compared, compared.mT, settings.temperature),
    }
    ends = accumulate(map(len, embeddings), initial=0)
    parts = [slice(*each) for each in pairwise(ends)]
    terms = {
        f"vcl/student{index}": settings.vcl_weight * contrasts[part, part].diagonal().sum()
        for index, part in enumerate(parts)
    }
    for kind, values in {"icl": settings.icl_weight * contrasts, **soft}.items():
        for own, source in permutations(range(len(parts)), 2):
            terms[f"{kind}/student{source}->student{own}"] = values[parts[own], parts[source]].sum()
    return terms


@METHODS.register("mcl")
class MCL(Method):
    """Each student learns to tell the classes' embeddings apart, within its own and between its own and its peers'.

        sum_i [ CE(z_i) + vcl + sum_{j != i} (icl + softvcl + softicl) ] + w T^2 sum_i KL(mean_j z_j -> z_i)

    with the terms of `contrast_terms`, on one embedding of each student, `Embedding`, which only the training has. The
    last sum, with the mean detached, has the weight 0 by default.

    Args:
        students: At least two networks. They share nothing unless `shared_stages` says so.
        image_size: Height and width of the images, pixels, for which the networks' maps are looked at.

    Source: Yang, An, Cai, Xu, "Mutual Contrastive Learning for Visual Representation Learning", AAAI 2022; authors'
        code winycg/MCL, main_cifar.py at 53ed5cc and losses/cifar_sup_mcl_loss.py at 61f20d1.
    Differs: images without another one of their class in the batch are left out of the means of vcl and icl, which are
        NaN in that code; all students have the KL term, there of more than two networks the last one alone; its tau is
        0.07: docs/mcl.md.
    """

    settings: MCLSettings
    family = "online"
    year = 2022
    exchanges = "logits, embeddings"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Make the embeddings of the students."""
        self.embeddings = nn.ModuleList(
            Embedding(probe_shapes(student, self.image_size)[-1][0]) for student in self.cohort
        )

    def forward(self, images: Images) -> Outputs:
        """Run all students and their embeddings on normalised images."""
        outputs = super().forward(images)
        pairs = zip(self.embeddings, outputs.feature_maps, strict=True)
        return replace(outputs, extras={f"embedding{i}": embed(each) for i, (embed, each) in enumerate(pairs)})

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<i>`, the terms of `contrast_terms` and, with a weight, `kl/ensemble->student<i>`."""
        terms = cross_entropy_terms(outputs.logits, labels)
        terms |= contrast_terms([[each] for each in outputs.extras.values()], labels, self.settings)
        if self.settings.kl_weight:
            mean, chosen = mean_logits(outputs.logits), self.settings
            how = chosen.temperature, chosen.kl_weight, *chosen.form
            terms |= students_kl("ensemble", outputs.logits, mean, labels, *how)
        return terms
