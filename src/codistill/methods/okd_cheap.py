"""Online distillation of students with cheap convolutions: a classifier on all their last maps teaches them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from codistill.methods.cohort import EnsembleNetwork, FeatureMap, Images, Outputs
from codistill.methods.losses import Labels, Logits, Scalar, Terms
from codistill.methods.method import METHODS, Method
from codistill.methods.pcl import ConcatenatedClassifier
from codistill.methods.terms import DistillationSettings, cross_entropy_terms, kl_pairs, ramped_kl, weighted
from codistill.networks.layers import BatchNormAct2d


@dataclass(frozen=True, kw_only=True)
class OKDCheapSettings(DistillationSettings):
    """Settings of online distillation with cheap convolutions."""

    shared_stages: int | None = 0
    temperature: float = 4.0
    ramp_up: float = 0.0
    mean_over_classes: bool = False
    """Whether the KL terms are averaged over classes too, as in the authors' code, and so 1 / classes as large."""


class NormedClassifier(ConcatenatedClassifier):
    """A linear classifier on the concatenated maps of all students, after batch normalisation, ReLU and pooling.

    Each of the three treats a channel for itself, so that maps may differ in height and width, too.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths, num_classes)
        self.norms = nn.ModuleList(BatchNormAct2d(width) for width in widths)

    def forward(self, feature_maps: Sequence[FeatureMap]) -> Logits:
        """Map one feature map per student to logits."""
        return super().forward([norm(each) for norm, each in zip(self.norms, feature_maps, strict=True)])


@METHODS.register("okd-cheap")
class OKDCheap(Method):
    """Students, in the paper with cheap convolutions, learn from a classifier on the last maps of all of them.

    The teacher is trained beside the students: concat of their last maps -> BN -> ReLU -> mean over places -> linear.
    With z_f its logits:

        CE(z_f) + sum_j [ CE(z_j) + T^2 KL(z_f -> z_j) ]

    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)) with a detached. Nothing is shared.

    Args:
        students: At least two networks of any kind, such as resnet56:conv=depthwise. The authors have four alike.

    Source: Xie et al., "Training Convolutional Neural Networks with Cheap Convolutions and Online Distillation",
        arXiv 1909.13063; authors' code EthanZhangYC/OD-cheap-convolution at a405c9e.
    Differs: the code averages the KL over classes too (setting mean_over_classes), and does not detach the teacher
        (detach_teachers). Maps of unlike height and width are ours. Their result is the best student at each epoch.
    """

    settings: OKDCheapSettings
    title = "OKD-Cheap"
    family = "online"
    year = 2019
    exchanges = "logits, features"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Make the classifier of all maps."""
        self.fusion = NormedClassifier([student.widths[-1] for student in self.cohort], self.num_classes)

    def forward(self, images: Images) -> Outputs:
        """Run all students and the classifier of their maps on normalised images."""
        outputs = super().forward(images)
        return replace(outputs, fused_logits=self.fusion(outputs.feature_maps))

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/` and `kl/fused->` of each student, and `ce/fused`."""
        fused, chosen = outputs.fused, self.settings
        pairs = kl_pairs("fused", outputs.logits, fused)
        share = 1 / fused.shape[1] if chosen.mean_over_classes else 1.0
        divergences = ramped_kl(pairs, labels, progress, chosen, chosen.detach_teachers)
        return cross_entropy_terms(outputs.logits, labels, fused=fused) | weighted(share, divergences)

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble and the classifier of all maps."""
        return {**super().predictors(), "fused": EnsembleNetwork(self.cohort, self.fusion)}
