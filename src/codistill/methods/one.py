"""ONE: on-the-fly native ensemble."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import EnsembleNetwork, FeatureMap, Images, Outputs
from codistill.methods.losses import Labels, Logits, Scalar, Terms, weighted_logits
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import DistillationSettings, cross_entropy_terms, kl_pairs, ramped_kl


class Gate(nn.Module):
    """Weights of the ensemble's members, one set for each image: they are positive and add up to 1.

    g = softmax(ReLU(BN(W h + b))), h the mean over all places of the maps that the gate sees, concatenated.

    Source: Lan1991Xu/ONE_NeurIPS2018 at 9da95a8, models/cifar/resnet.py.
    """

    def __init__(self, width: int, members: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, members), nn.BatchNorm1d(members), nn.ReLU())

    def forward(self, maps: Sequence[FeatureMap]) -> Float[Tensor, "batch member"]:
        """Map feature maps to weights."""
        pooled = torch.cat([each.mean(dim=(2, 3)) for each in maps], dim=1)
        return torch.softmax(self.layers(pooled), dim=1)


class GatedPredictor(EnsembleNetwork):
    """The gated ensemble alone; `combine` is the gate, which sees the trunk's map or, without one, those of all."""

    combine: Gate

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Logits:
        """Map normalised images to logits."""
        low = self.trunk(images)
        maps, logits = self.maps_and_logits(low)
        return weighted_logits(logits, self.combine([low] if len(self.trunk) else maps))


@METHODS.register("one")
class ONE(Method):
    """A gate on the shared trunk weighs the students' logits; the gated ensemble z_e = sum_j g_j z_j teaches them.

        sum_j CE(z_j) + CE(z_e) + r(t) T^2 sum_j KL(z_e -> z_j)

    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)) with a detached. The gate learns from CE(z_e) alone. z_e is the
    predictor `fused`, the paper's ONE-E; `ensemble` is the plain mean of the logits.

    Args:
        students: At least two networks; equal ones share all stages but the last. The authors have three.

    Source: Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, arXiv 1806.04606;
        authors' code Lan1991Xu/ONE_NeurIPS2018 at 9da95a8.
    Differs: their code has exactly three equal branches, and adds 1e-7 to the target's probabilities (setting
        target_epsilon). Students without a trunk are ours: their gate sees the concatenated last maps of all of them.
    """

    settings: DistillationSettings
    family = "online"
    year = 2018
    exchanges = "logits"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Make the gate; refuse a view for each student where it sees the one map of their trunk."""
        shared = self.cohort.shared_stages
        if shared and self.settings.views_per_student:
            raise UsageError(
                f"one: the gate sees one image, but {shared} shared stages would see a view for each student: "
                "set method.views_per_student to false, or method.shared_stages to 0"
            )
        width = self.cohort[0].widths[shared - 1] if shared else sum(student.widths[-1] for student in self.cohort)
        self.gate = Gate(width, len(self.cohort))

    def forward(self, images: Images) -> Outputs:
        """Run all students, the gate and the gated ensemble on normalised images."""
        low = self.cohort.trunk(images)
        outputs = self.branches(low)
        weights = self.gate([low] if self.cohort.shared_stages else outputs.feature_maps)
        return replace(outputs, fused_logits=weighted_logits(outputs.logits, weights), extras={"gate": weights})

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<j>` and `kl/fused->student<j>` of each student, and `ce/fused`."""
        terms = cross_entropy_terms(outputs.logits, labels, fused=outputs.fused)
        pairs = kl_pairs("fused", outputs.logits, outputs.fused)
        return terms | ramped_kl(pairs, labels, progress, self.settings, self.settings.detach_teachers)

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble and the gated ensemble."""
        heads = [student.head for student in self.cohort]
        return {**super().predictors(), "fused": GatedPredictor(self.cohort, self.gate, heads)}
