"""FSP: students begin with the flow between a teacher's stages, then learn from the labels."""

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import FeatureMap
from codistill.methods.losses import Scalar, squared_distance
from codistill.methods.method import METHODS
from codistill.methods.offline import MapPairs, TwoStageMethod, TwoStageSettings, reduced
from codistill.networks.probe import label


@dataclass(frozen=True, kw_only=True)
class FSPSettings(TwoStageSettings):
    """Settings of FSP."""

    initial_share: float = 30 / 270
    """Share of the epochs, at the start, that train the stages by the flow alone; then the labels alone train. 0: there
    are none, and both train together."""
    flow_weight: float = 1.0
    """Factor on the distances of the flow matrices, at least 0."""
    pooling: Literal["average", "max"] = "average"
    """How the larger map of a matrix is brought to the size of the smaller one; the paper's: max."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether squared distances are averaged over the entries of a matrix, or summed as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("flow_weight", 0 <= self.flow_weight < math.inf, "a number, at least 0")


def flow(
    first: FeatureMap, second: FeatureMap, maximum: bool = False
) -> Float[Tensor, "batch first_channel second_channel"]:
    """Compute the flow matrix between two maps: G_ij, the mean over places of channel i of one times j of the other.

    The larger map is brought to the size of the smaller one by averages or, with `maximum`, by maxima.
    """
    low, high = (each.flatten(2) for each in (reduced(first, second, maximum), reduced(second, first, maximum)))
    # Autocast would round a matrix product to bfloat16. Tensors without values know no autocast.
    plain = contextlib.nullcontext() if low.is_meta else torch.autocast(low.device.type, enabled=False)
    with plain:
        return low @ high.transpose(1, 2) / low.shape[2]


@METHODS.register("fsp")
class FSP(TwoStageMethod):
    """Students first match the flow matrices of a frozen teacher, then learn from the labels alone.

        sum_k mean (G(F_k, F_k+1) - G(T_k, T_k+1))^2,   then   a CE(z)

    F_k and T_k are the outputs of paired stages of student and teacher, the stems' included; G(F, F')_ij is the mean
    over the places of F_i F'_j, the larger map averaged down to the smaller one. After `initial_share` of the epochs
    nothing is learnt from the teacher, and it does not run, unless `kl_weight` is set.

    Source: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation", CVPR 2017, of which there is no authors' code; the
        pairs and the mean: HobbitLong/RepDistiller at b84f547, distiller_zoo/FSP.py, with its 30 epochs before 240.
    Differs: the paper pairs the first and the last map of each section, with max pooling and sums over the entries
        (`pooling`, `reduction`); here a section's first map is the last one of the section before it. That port has
        one learning rate in the first stage; here it is the run's. Widths must be equal, as in the paper.
    """

    settings: FSPSettings
    family = "offline"
    year = 2017
    exchanges = "flow between features"
    term = "flow"

    def connect(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """Make no module, but refuse unlike widths, for which nobody has an answer."""
        for student, pairs in zip(self.cohort, self.stage_pairs(teacher), strict=True):
            widths, taught = ([shape[0] for shape in side] for side in zip(*pairs, strict=True))
            if widths != taught:
                raise UsageError(
                    f"fsp needs stages of the teacher's widths {taught}, but {label(student)} has {widths}: choose "
                    "networks that differ in depth alone, such as resnet20 and resnet56, or at, cd, fitnets or ab"
                )
        return ()

    def distance(self, index: int, pairs: MapPairs) -> Scalar:
        """Compute the squared distance of the flow matrices, summed over neighbouring pairs of stages."""
        maximum = self.settings.pooling == "max"
        parts = []
        for (own, taught), (next_own, next_taught) in itertools.pairwise(pairs):
            matrix = flow(own, next_own, maximum)
            distance = squared_distance(matrix, flow(taught, next_taught, maximum))
            parts.append(distance / matrix[0].numel() if self.settings.reduction == "mean" else distance)
        total: Scalar = sum(parts[1:], parts[0])
        return self.settings.flow_weight * total
