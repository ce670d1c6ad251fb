"""AT, attention transfer: students match where a teacher's stages are active."""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from codistill.methods.cohort import FeatureMap
from codistill.methods.losses import Scalar, attention_map
from codistill.methods.method import METHODS
from codistill.methods.offline import MapPairs, OfflineMethod, OfflineSettings, reduced


@dataclass(frozen=True, kw_only=True)
class ATSettings(OfflineSettings):
    """Settings of attention transfer."""

    attention_weight: float = 1000.0
    """Factor on the distances of the attention maps, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("attention_weight", 0 <= self.attention_weight < math.inf, "a number, at least 0")


def attention(feature_map: FeatureMap) -> Float[Tensor, "batch place"]:
    """Compute the attention map of a map, `attention_map`, as a vector of length 1."""
    return F.normalize(attention_map(feature_map))


@METHODS.register("at")
class AT(OfflineMethod):
    """Students learn from the labels and match the attention maps of a frozen teacher's stages.

        a CE(z) + b sum_k mean (Q(F_k) - Q(G_k))^2,   Q(F) = v / ||v||,  v = mean over channels of F^2

    F_k and G_k are the outputs of paired stages of student and teacher, without the first pair, which is that of the
    stems. The mean is over the places and the batch. Widths may be unlike; of unlike sizes the larger map is averaged
    down first.

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928; authors' code
        szagoruyko/attention-transfer. That unlike maps are averaged: HobbitLong/RepDistiller at b84f547.
    Differs: the authors' code adds KD with 0.1 and 0.9 at T 4 where it is asked to: `ce_weight`, `kl_weight`.
    """

    settings: ATSettings
    family = "offline"
    year = 2017
    exchanges = "attention of features"
    term = "attention"

    def distance(self, index: int, pairs: MapPairs) -> Scalar:
        """Compute the mean squared distance of the attention maps, summed over the pairs of stages."""
        parts = [
            (attention(reduced(own, taught)) - attention(reduced(taught, own))).square().mean()
            for own, taught in pairs[1:]
        ]
        total: Scalar = sum(parts[1:], parts[0])
        return self.settings.attention_weight * total
