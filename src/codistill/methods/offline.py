"""What the methods that compare stages with a frozen teacher's have in common: offline distillation of features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import FeatureMap, Images, Outputs
from codistill.methods.kd import KDSettings
from codistill.methods.losses import Labels, Terms
from codistill.methods.method import Method
from codistill.methods.teacher import staged
from codistill.methods.terms import cross_entropy_terms, weighted
from codistill.modules.fusion import MapShape
from codistill.networks.probe import label, probe_shapes


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

    Its outputs hold the maps of all stages, `Outputs.stage_maps` and, in training, `Outputs.teacher_maps`.
    """

    settings: OfflineSettings
    teacher = "required"
    teacher_maps = True
    adds_teacher_terms = False

    def forward(self, images: Images) -> Outputs:
        """Run all students on normalised images, and keep the outputs of all their stages."""

        def finish(index: int, maps: tuple[FeatureMap, ...]) -> tuple[tuple[FeatureMap, ...], FeatureMap]:
            return maps, self.cohort[index].head(maps[-1])

        maps, logits = zip(*self.cohort.each_staged(images, finish), strict=True)
        return Outputs(logits, tuple(each[-1] for each in maps), stage_maps=maps)

    def label_terms(self, outputs: Outputs, labels: Labels) -> Terms:
        """Compute the weighted `ce/student<j>` and, where they have a weight, the KL terms of the teacher."""
        terms = weighted(self.settings.ce_weight, cross_entropy_terms(outputs.logits, labels))
        if self.settings.kl_weight and self.taught_by is not None:
            terms |= weighted(self.settings.kl_weight, self.taught_by.terms(outputs, labels))
        return terms

    def teacher_maps_for(self, index: int, outputs: Outputs) -> tuple[FeatureMap, ...]:
        """Return the teacher's maps of the images that a student has seen; none where there is no teacher."""
        maps = outputs.teacher_maps
        return tuple(each if each.ndim == 4 else each[index] for each in maps)

    def stage_shapes(self, teacher: nn.Module) -> tuple[list[list[MapShape]], list[MapShape]]:
        """Find the shapes of all stages' outputs, [channels, height, width], of each student and of the teacher.

        Raises:
            UsageError: The teacher, or a student, has other numbers of stages than the others.
        """
        _, network = staged(teacher)
        taught = probe_shapes(network, self.image_size)
        shapes = [probe_shapes(each, self.image_size) for each in self.cohort]
        for student, each in zip(self.cohort, shapes, strict=True):
            if len(each) != len(taught):
                raise UsageError(
                    f"{self.name} pairs stages, but {label(student)} has {len(each)} and the teacher "
                    f"{label(network)} {len(taught)}: choose networks of as many stages"
                )
        return shapes, taught


class TwoStageMethod(OfflineMethod):
    """An offline method that may begin with epochs in which the teacher's maps alone train stages and connectors."""

    settings: TwoStageSettings

    def initial_epochs(self, epochs: int) -> int:
        """Return `initial_share` of the epochs: at least one, and one less than all, unless it is 0."""
        share = self.settings.initial_share
        return max(1, min(round(share * epochs), epochs - 1)) if share and epochs > 1 else 0

    def initial_parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters of all stages and of the connectors, without those of the heads."""
        parts = [*(stage for student in self.cohort for stage in student.stages), self.connectors]
        return tuple(dict.fromkeys(each for part in parts for each in part.parameters()))
