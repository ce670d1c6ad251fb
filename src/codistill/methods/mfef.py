"""MFEF: multi-scale feature extraction, dual attention and feature fusion."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import EnsembleNetwork, Images, Outputs
from codistill.methods.ffl import FusionSettings, fusion_terms
from codistill.methods.losses import Labels, Scalar, Terms, ensemble
from codistill.methods.method import METHODS, Method, ParameterGroup
from codistill.methods.terms import cross_entropy_terms, kl_pairs, ramped_kl
from codistill.modules import MULTISCALE, DualAttention, FeatureFusion
from codistill.modules.attention import AttentionMaps
from codistill.modules.multiscale import Half
from codistill.networks import Network
from codistill.networks.probe import probe_shapes

FeaturePoint = Literal["raw", "msfe", "msfe_da"]
POINTS: tuple[FeaturePoint, ...] = ("raw", "msfe", "msfe_da")


@dataclass(frozen=True, kw_only=True)
class MFEFSettings(FusionSettings):
    """Settings of MFEF; the ablation of the paper's Table 5 is in the first three."""

    multiscale: Literal["hs", "res2net", "pyconv", "psa", "aspp", "none"] = "hs"
    """Multi-scale feature extraction (MSFE): the paper's hierarchical split (hs), another block, or none."""
    attention: Literal["cbam", "channel", "spatial", "spatial-channel", "none"] = "cbam"
    """Dual attention (DA): of channels, then places (cbam); of one of them; the other way round; or none."""
    distillation: Literal["fusion", "ensemble", "none"] = "fusion"
    """Teacher of the students: the fused classifier; the students' ensemble (Table 5, case C); or none (case B)."""
    head_input: FeaturePoint = "msfe_da"
    """Input of a student's classifier: its last map raw, after MSFE, or after MSFE and DA. The deployed student
    carries these components. A component that is none is skipped."""
    fusion_input: FeaturePoint = "msfe_da"
    """Input of the fusion module from each student, likewise."""
    share_components: bool = False
    """Whether all students use one MSFE and one DA instead of their own."""
    groups: int = 4
    """p, the number of channel groups of hs and res2net, at least 2."""
    exported_half: Half = "second"
    """Half of a divided group of hs that goes to its output; the other one is carried to the next group."""
    depthwise: bool = False
    """Whether the 3x3 convolutions of hs are depthwise."""
    attention_reduction: int = 16
    """Reduction of the channel attention's perceptron."""
    attention_kernel: int = 7
    """Side of the spatial attention's convolution, odd, pixels."""
    attention_bias: bool = False
    """Whether the channel attention's perceptron has biases, as in CBAM's code."""
    attention_norm: bool = False
    """Whether batch normalisation follows the spatial attention's convolution, as in CBAM's code."""
    components_decay: Literal["students", "fusion"] = "students"
    """Group whose weight decay MSFE and DA have."""


class Enhancement(nn.Module):
    """Multi-scale extraction and dual attention of one student; beyond `length` steps, or off, the identity."""

    def __init__(self, channels: int, settings: MFEFSettings, length: int) -> None:
        super().__init__()
        steps: list[nn.Module] = [nn.Identity(), nn.Identity()]
        if settings.multiscale != "none" and length >= 1:
            groups = {"groups": settings.groups}
            halves = {"exported": settings.exported_half, "depthwise": settings.depthwise}
            options: dict[str, dict[str, Any]] = {"hs": groups | halves, "res2net": groups}
            steps[0] = MULTISCALE[settings.multiscale](channels, **options.get(settings.multiscale, {}))
        if settings.attention != "none" and length >= 2:
            reduction, kernel = settings.attention_reduction, settings.attention_kernel
            form = (settings.attention_bias, settings.attention_norm)
            steps[1] = DualAttention(channels, reduction, kernel, *form, kind=settings.attention)
        self.steps = nn.ModuleList(steps)

    def forward(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> tuple[Float[Tensor, "batch channel height width"], ...]:
        """Return the map raw, after MSFE, and after MSFE and DA: one entry for each of `POINTS`."""
        points = [feature_map]
        for step in self.steps:
            points.append(step(points[-1]))
        return tuple(points)


@METHODS.register("mfef")
class MFEF(Method):
    """Feature maps gain several scales and attention, are fused, and the fused classifier teaches the students.

    Each student's last map F_j passes multi-scale extraction E and dual attention; the result feeds the student's own
    classifier and the feature fusion. Loss as in FFL:

        sum_j CE(z_j) + CE(z_f) + r(t) T^2 [ sum_j KL(z_f -> z_j) + KL(z_a -> z_f) ]

    Args:
        students: At least two networks (one suffices with distillation "none"). Equal ones share all stages but the
            last; extraction, attention and classifier are each student's own.
        image_size: Height and width of the images, pixels; only maps of unlike resolution depend on it.

    Source: Zou, Teng, Niu, "Multi-scale Feature Extraction and Fusion for Online Knowledge Distillation", ICANN 2022.
    Differs: the paper has no code. What it leaves open is a setting each; docs/mfef.md lists them with the evidence.
    """

    settings: MFEFSettings
    family = "online"
    year = 2022
    exchanges = "logits, features"
    teacher = "allowed"

    @classmethod
    def alone(cls, settings: MFEFSettings) -> MFEFSettings | None:
        """Return the settings of Table 5's case B with one student, unless the deployed one carries no component."""
        carried = {"raw": (), "msfe": (settings.multiscale,), "msfe_da": (settings.multiscale, settings.attention)}
        return replace(settings, distillation="none") if {*carried[settings.head_input]} - {"none"} else None

    def build(self) -> None:
        """Make the components of each student and the fusion module."""
        chosen = self.settings
        fused = chosen.distillation == "fusion"
        if chosen.distillation != "none":
            fix = "with one student use --method.distillation none (MSFE and DA alone)"
            self.require_students(len(self.cohort), 2, fix)
        self.head_point = POINTS.index(chosen.head_input)
        self.fusion_point = POINTS.index(chosen.fusion_input) if fused else 0
        steps = (chosen.multiscale, chosen.attention)[self.head_point : self.fusion_point]
        late = any(each != "none" for each in steps)
        if chosen.detach_fusion_input and late:
            raise UsageError(
                "mfef: detach_fusion_input would leave the components that only the fusion sees without a gradient: "
                "set fusion_input to head_input, or detach_fusion_input to false"
            )
        shapes = [probe_shapes(student, self.image_size)[-1] for student in self.cohort]
        self.enhancements = nn.ModuleList(self._enhancements([shape[0] for shape in shapes]))
        self.fusion = FeatureFusion(shapes, self.num_classes, chosen.fusion_projection) if fused else None

    @property
    def parallel_branches(self) -> bool:
        """Shared components have one set of batch statistics, which branches cannot update at the same time."""
        return not self.settings.share_components

    def _enhancements(self, widths: list[int]) -> list[Enhancement]:
        length = max(self.head_point, self.fusion_point)
        if not self.settings.share_components:
            return [Enhancement(width, self.settings, length) for width in widths]
        if len(set(widths)) > 1:
            raise UsageError(f"mfef: share_components needs feature maps of one width, got {widths}: set it to false")
        return [Enhancement(widths[0], self.settings, length)] * len(widths)

    def forward(self, images: Images) -> Outputs:
        """Run all students, their components and the fused classifier on normalised images."""

        def finish(index: int, feature_map: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            points = self.enhancements[index](feature_map)
            return points, self.cohort[index].head(points[self.head_point])

        points, logits = zip(*self.cohort.each_branch(self.cohort.trunk(images), finish), strict=True)
        maps = tuple(each[0] for each in points)
        if self.fusion is None:
            return Outputs(logits, maps)
        inputs = [each[self.fusion_point] for each in points]
        if self.settings.detach_fusion_input:
            inputs = [each.detach() for each in inputs]
        return Outputs(logits, maps, self.fusion(inputs))

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute the terms of `fusion_terms`, or fewer without a fused classifier."""
        if self.fusion is not None:
            return fusion_terms(outputs, labels, progress, self.settings)
        terms = cross_entropy_terms(outputs.logits, labels)
        if self.settings.distillation == "ensemble":
            mean = ensemble(outputs.logits, self.settings.ensemble_of, self.settings.temperature)
            pairs = kl_pairs("ensemble", outputs.logits, mean)
            terms |= ramped_kl(pairs, labels, progress, self.settings, self.settings.detach_teachers)
        return terms

    def parameter_groups(self) -> list[ParameterGroup]:
        """Split into the students with their components and, with its own weight decay, the fusion module."""
        students = list(self.cohort.parameters())
        fusion = [] if self.fusion is None else list(self.fusion.parameters())
        (students if self.settings.components_decay == "students" else fusion).extend(self.enhancements.parameters())
        groups = [ParameterGroup("students", tuple(students))]
        if fusion:
            groups.append(ParameterGroup("fusion", tuple(fusion), self.settings.fusion_weight_decay))
        return groups

    def deployed_student(self, index: int) -> Network:
        """Return the student as a plain network whose head begins with its components."""
        student, steps = self.cohort[index], self._steps(index, self.head_point)
        if not steps:
            return student
        return Network(list(student.stages), nn.Sequential(*steps, student.head), student.widths)

    def _steps(self, index: int, point: int) -> list[nn.Module]:
        enhancement = self.enhancements[index]
        assert isinstance(enhancement, Enhancement)
        return [step for step in enhancement.steps[:point] if not isinstance(step, nn.Identity)]

    def attention_maps(self, images: Images) -> dict[str, AttentionMaps]:
        """Compute the weights of each student's attention and, for the fused classifier, of all that it sees.

        Those of the fused classifier are the students' channels side by side, and the mean of their places.
        """
        found = {}
        for index, feature_map in enumerate(self(images).feature_maps):
            enhancement = self.enhancements[index]
            assert isinstance(enhancement, Enhancement)
            extraction, attention = enhancement.steps
            if isinstance(attention, DualAttention):
                found[f"student{index}"] = attention.maps(extraction(feature_map))
        if found and self.fusion is not None and POINTS[self.fusion_point] == "msfe_da":
            channels = [each.channels for each in found.values() if each.channels is not None]
            places = [each.places[:, None] for each in found.values() if each.places is not None]
            size = [max((each.shape[axis] for each in places), default=0) for axis in (2, 3)]
            alike = [F.interpolate(each, size, mode="bilinear", align_corners=False) for each in places]
            found["fused"] = AttentionMaps(
                torch.cat(channels, dim=1) if channels else None, torch.cat(alike, dim=1).mean(dim=1) if alike else None
            )
        return found

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble and, where there is one, the fused classifier."""
        named = super().predictors()
        if self.fusion is not None:
            seen = [nn.Sequential(*self._steps(index, self.fusion_point)) for index in range(len(self.cohort))]
            named["fused"] = EnsembleNetwork(self.cohort, self.fusion, seen)
        return named
