"""FFL: feature fusion learning."""

from dataclasses import dataclass, replace

from torch import nn

from codistill.methods.cohort import EnsembleNetwork, Images, Outputs
from codistill.methods.losses import Labels, Scalar, Terms, ensemble
from codistill.methods.method import METHODS, Method, ParameterGroup
from codistill.methods.terms import EnsembleSettings, cross_entropy_terms, kl_pairs, ramped_kl
from codistill.modules import FeatureFusion
from codistill.modules.fusion import Projection
from codistill.networks.probe import probe_shapes


@dataclass(frozen=True, kw_only=True)
class FusionSettings(EnsembleSettings):
    """Settings of the methods that teach their students by a fused classifier."""

    detach_fusion_input: bool = False
    """Whether the fused classifier's loss stops at its input instead of training the students' backbones too."""
    fusion_projection: Projection = "pointwise"
    """Where unlike widths are projected to the smallest one: after concatenation (pointwise), or before it (each)."""
    fusion_weight_decay: float = 1e-5
    """Weight decay of the fusion module; the students have the run's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("fusion_weight_decay", 0 <= self.fusion_weight_decay < 1, "at least 0 and below 1")


def fusion_terms(outputs: Outputs, labels: Labels, progress: Scalar, settings: FusionSettings) -> Terms:
    """Compute the loss of FFL and MFEF.

    sum_j CE(z_j) + CE(z_f) + r(t) T^2 [ sum_j KL(z_f -> z_j) + KL(z_a -> z_f) ], z_a the mean of the students' logits;
    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)) with a detached.

    Source: MFEF (ICANN 2022), Eqs. (9)-(11), with the ramp-up of FFL's code (Jangho-Kim/FFL-pytorch at 546d478,
        train_FFL.py), which the paper names (alpha = 80) but leaves out of Eq. (11).
    """
    fused = outputs.fused
    terms = cross_entropy_terms(outputs.logits, labels, fused=fused)
    mean = ensemble(outputs.logits, settings.ensemble_of, settings.temperature)
    pairs = {**kl_pairs("fused", outputs.logits, fused), "kl/ensemble->fused": (fused, mean)}
    return terms | ramped_kl(pairs, labels, progress, settings, settings.detach_teachers)


@METHODS.register("ffl")
class FFL(Method):
    """The students' feature maps are fused; the fused classifier teaches the students, their mean teaches it.

    Args:
        students: At least two networks. Equal ones share all stages but the last.
        image_size: Height and width of the images, pixels; only maps of unlike resolution depend on it.

    Source: Kim et al., "Feature Fusion for Online Mutual Knowledge Distillation", ICPR 2020, arXiv 1904.09058;
        authors' code Jangho-Kim/FFL-pytorch at 546d478.
    Differs: their code trains 301 epochs, pads by reflection and has exactly two equal students.
    """

    settings: FusionSettings
    family = "online"
    year = 2020
    exchanges = "logits, features"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Make the fusion module."""
        shapes = [probe_shapes(student, self.image_size)[-1] for student in self.cohort]
        self.fusion = FeatureFusion(shapes, self.num_classes, self.settings.fusion_projection)

    def forward(self, images: Images) -> Outputs:
        """Run all students and the fused classifier on normalised images."""
        outputs = super().forward(images)
        maps = outputs.feature_maps
        if self.settings.detach_fusion_input:
            maps = tuple(each.detach() for each in maps)
        return replace(outputs, fused_logits=self.fusion(maps))

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute the terms of `fusion_terms`."""
        return fusion_terms(outputs, labels, progress, self.settings)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Split into the students and, with its own weight decay, the fusion module."""
        return [
            ParameterGroup("students", tuple(self.cohort.parameters())),
            ParameterGroup("fusion", tuple(self.fusion.parameters()), self.settings.fusion_weight_decay),
        ]

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble and the fused classifier."""
        return {**super().predictors(), "fused": EnsembleNetwork(self.cohort, self.fusion)}
