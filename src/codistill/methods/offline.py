"""What the methods that compare stages with a frozen teacher's have in common: offline distillation of features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import FeatureMap, Images, Outputs
from codistill.methods.kd import KDSettings
from codistill.methods.losses import Labels, Logits, Scalar, Terms, at_least_float32
from codistill.methods.method import Method
from codistill.methods.teacher import staged
from codistill.methods.terms import cross_entropy_terms, weighted
from codistill.modules.fusion import MapShape
from codistill.networks.layers import BatchNormAct2d, initialise
from codistill.networks.probe import label, probe_shapes

T = TypeVar("T")
Maps = tuple[FeatureMap, ...]
MapPairs = Sequence[tuple[FeatureMap, FeatureMap]]
"""A student's map and the teacher's, of each pair of stages."""


@dataclass(frozen=True, kw_only=True)
class OfflineSettings(KDSettings):
    """Settings of the methods that learn from the stages of a frozen teacher."""

    kl_weight: float = 0.0
    """Factor on the teacher's KL terms, beside --teacher-weight and --teacher-temperature; 0: there are none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("kl_weight", 0 <= self.kl_weight < math.inf, "a number, at least 0")


@dataclass(frozen=True, kw_only=True)
class TwoStageSettings(OfflineSettings):
    """Settings of the methods that may first train the lower part of a student, and then the whole."""

    initial_share: float = 0.0
    """Share of the epochs, at the start, that train by the teacher's maps alone, without labels; 0: there are none,
    and both terms train together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("initial_share", 0 <= self.initial_share < 1, "at least 0 and below 1, a share of the epochs")


class OfflineMethod(Method):
    """A method whose students learn from the stages of a frozen teacher, each for itself.

    Stages are paired from the last one back; of a network with more stages the first ones have no partner. In training
    `Outputs.stage_maps` holds what is compared, `compared`, and `Outputs.teacher_maps` the teacher's stages.

    A subclass has a `term`, `distance`, and `connect` and `compared` where something lies between student and teacher.
    """

    settings: OfflineSettings
    teacher = "required"
    teacher_maps = True
    adds_teacher_terms = False
    term: ClassVar[str]
    """What the term of the maps is called: `<term>/teacher->student0`."""

    def connect(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """Make no module, but refuse networks whose stages cannot be paired."""
        self.stage_pairs(teacher)
        return ()

    def forward(self, images: Images) -> Outputs:
        """Run all students on normalised images and, beside a teacher, what is compared with its maps."""

        def finish(index: int, maps: Maps) -> tuple[FeatureMap, Logits, Maps]:
            compared = self.compared(index, maps) if self.runs_teacher else ()
            return maps[-1], self.cohort[index].head(maps[-1]), compared

        maps, logits, compared = zip(*self.cohort.each_staged(images, finish), strict=True)
        return Outputs(logits, maps, stage_maps=compared)

    def compared(self, index: int, maps: Maps) -> Maps:
        """Return what a student is compared by: of the outputs of all its stages, by default, these themselves."""
        return maps

    def distance(self, index: int, pairs: MapPairs) -> Scalar:
        """Compute how far a student's maps are from the teacher's, weights applied, without half precision."""
        raise NotImplementedError

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `label_terms` and `map_terms`."""
        return self.label_terms(outputs, labels) | self.map_terms(outputs)

    def label_terms(self, outputs: Outputs, labels: Labels) -> Terms:
        """Compute the weighted `ce/student<j>` and, where they have a weight, the KL terms of the teacher."""
        terms = weighted(self.settings.ce_weight, cross_entropy_terms(outputs.logits, labels))
        if self.settings.kl_weight and self.taught_by is not None:
            terms |= weighted(self.settings.kl_weight, self.taught_by.terms(outputs, labels))
        return terms

    def map_terms(self, outputs: Outputs) -> Terms:
        """Compute `<term>/teacher->student<j>` of each student; none where there is no teacher."""
        if self.taught_by is None:
            return {}
        if not outputs.teacher_maps:
            raise ValueError("the outputs have no teacher maps: they were computed in evaluation mode")
        terms: Terms = {}
        for index, own in enumerate(outputs.stage_maps):
            taught = [each if each.ndim == 4 else each[index] for each in outputs.teacher_maps]
            terms[f"{self.term}/teacher->student{index}"] = self.distance(index, paired(own, taught))
        return terms

    def stage_pairs(self, teacher: nn.Module) -> list[list[tuple[MapShape, MapShape]]]:
        """Find the shapes, [channels, height, width], of each student's maps and the teacher's, of each pair of stages.

        Raises:
            UsageError: A network has fewer than two stages.
        """
        networks = [*self.cohort, staged(teacher)[1]]
        *shapes, taught = [probe_shapes(each, self.image_size) for each in networks]
        for network, each in zip(networks, [*shapes, taught], strict=True):
            if len(each) < 2:
                raise UsageError(
                    f"{self.name} needs networks of at least 2 stages, but {label(network)} has {len(each)}"
                )
        return [paired(each, taught) for each in shapes]


class TwoStageMethod(OfflineMethod):
    """An offline method that may begin with epochs in which the teacher's maps alone train stages and connectors.

    Then the labels train the students, with the teacher's KL where that has a weight, and else without the teacher.
    """

    settings: TwoStageSettings

    def initial_epochs(self, epochs: int) -> int:
        """Return `initial_share` of the epochs: unless it is 0, at least one, and fewer than all."""
        share = self.settings.initial_share
        return max(1, min(round(share * epochs), epochs - 1)) if share and epochs > 1 else 0

    def initial_parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters of all stages and of the connectors, without those of the heads."""
        parts = [*(stage for student in self.cohort for stage in student.stages), self.connectors]
        return tuple(dict.fromkeys(each for part in parts for each in part.parameters()))

    def initial_losses(self, outputs: Outputs, labels: Labels) -> Terms:
        """Compute `map_terms`."""
        return self.map_terms(outputs)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `label_terms` and, without an initialisation, `map_terms`."""
        terms = self.label_terms(outputs, labels)
        return terms if self.settings.initial_share else terms | self.map_terms(outputs)

    @property
    def teaches_throughout(self) -> bool:
        """Whether the teacher also runs after the initialisation: where there is none, or its KL has a weight."""
        return not self.settings.initial_share or self.settings.kl_weight > 0

    @property
    def runs_teacher(self) -> bool:
        """Whether a pass runs the teacher: not where only the labels train."""
        return (self.initialising or self.teaches_throughout) and super().runs_teacher


def paired(own: Sequence[T], taught: Sequence[T]) -> list[tuple[T, T]]:
    """Pair what a student and a teacher have of each stage, from the last one back; in the order of the stages."""
    count = min(len(own), len(taught))
    return list(zip(own[len(own) - count :], taught[len(taught) - count :], strict=True))


def reduced(features: FeatureMap, like: FeatureMap, maximum: bool = False) -> FeatureMap:
    """Bring a map down to the height and width of another one, where that is smaller, by averages or maxima."""
    (height, width), size = (
        features.shape[2:],
        (min(features.shape[2], like.shape[2]), min(features.shape[3], like.shape[3])),
    )
    features = at_least_float32(features)
    if size == (height, width):
        return features
    if height % size[0] or width % size[1]:
        return F.adaptive_max_pool2d(features, size) if maximum else F.adaptive_avg_pool2d(features, size)
    ratio = (height // size[0], width // size[1])  # the same, and on CUDA there is a deterministic form of it
    return F.max_pool2d(features, ratio) if maximum else F.avg_pool2d(features, ratio)


def regressor(shape: MapShape, target: MapShape, act: bool, whose: str) -> nn.Module:
    """Make the layer that brings a student's map to the channels, height and width of a teacher's.

    FitNets' layer; `fusion.convolutional_regressor`, for students among themselves, has other kernels. A transposed
    convolution, 4x4 with stride 2, where the map is half as large in both directions. Else a convolution:
    in a direction in which the map is twice as long of kernel 3, stride 2 and padding 1, else an unpadded one of kernel
    length - target + 1, which is 1 between equal ones. Batch normalisation follows and, with `act`, ReLU.

    Raises:
        UsageError: The teacher's map is larger, but not twice as large; the line begins with `whose`.

    Source: Romero et al., "FitNets", arXiv 1412.6550, section 2.2; the rule of HobbitLong/RepDistiller at b84f547,
        models/util.py, ConvReg.
    Differs: that code looks at the height alone, and its convolutions have biases, which BN takes away again.
    """
    (channels, *size), (width, *wanted) = shape, target
    conv: nn.Module
    if [2 * each for each in size] == wanted:
        conv = nn.ConvTranspose2d(channels, width, 4, stride=2, padding=1, bias=False)
    elif all(each >= goal for each, goal in zip(size, wanted, strict=True)):
        rules = [
            (3, 2, 1) if each == 2 * goal else (each - goal + 1, 1, 0) for each, goal in zip(size, wanted, strict=True)
        ]
        (kh, sh, ph), (kw, sw, pw) = rules
        conv = nn.Conv2d(channels, width, (kh, kw), (sh, sw), (ph, pw), bias=False)
    else:
        raise UsageError(
            f"{whose}: no layer brings maps of {size[0]}x{size[1]} to the teacher's {wanted[0]}x{wanted[1]}: choose "
            "networks whose maps are as large, larger, or half as large"
        )
    made = nn.Sequential(conv, BatchNormAct2d(width, act))
    initialise(made)
    return made
