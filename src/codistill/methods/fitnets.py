"""FitNets: a stage of the students, behind a regressor, matches a stage of a teacher."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.losses import Labels, Scalar, Terms, soft_cross_entropy, squared_distance
from codistill.methods.method import METHODS
from codistill.methods.offline import MapPairs, Maps, TwoStageMethod, TwoStageSettings, regressor
from codistill.networks.probe import label


@dataclass(frozen=True, kw_only=True)
class FitNetsSettings(TwoStageSettings):
    """Settings of FitNets."""

    initial_share: float = 0.0
    """Share of the epochs, at the start, that train the student up to the hint and its regressor by the hint alone, as
    in the paper; then labels and soft targets train the student. 0: hint and labels train together."""
    hint_stage: int = 2
    """Stage of the student that learns, counted from 0, the stem; the teacher's is the one as far from its last one."""
    hint_weight: float = 100.0
    """Factor on the mean squared distance, at least 0."""
    soft_weight: float = 4.0
    """Factor on the soft targets when the labels come in, beside --teacher-weight; only after an initialisation."""
    last_soft_weight: float = 1.0
    """The same at the end of the training; linear between."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("hint_stage", self.hint_stage >= 0, "at least 0")
        for name in ("hint_weight", "soft_weight", "last_soft_weight"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "a number, at least 0")


@METHODS.register("fitnets")
class FitNets(TwoStageMethod):
    """A stage of each student, behind a regressor, matches a stage of a frozen teacher: the hint.

        a CE(z) + 100 mean (r(F) - G)^2

    F and G are the outputs of the paired stages, r is `regressor` with ReLU, and the mean is over all elements. With
    `initial_share` above 0 it has the paper's two stages: first the hint alone, which trains the student up to its
    stage, and the regressor; then, with z_t the teacher's logits and w falling linearly from 4 to 1,

        a CE(z) - w sum_c softmax(z_t / T)_c log softmax(z / T)_c

    where T is --teacher-temperature, 3 by default, and there is no factor T^2.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550; authors' code
        adri-romsor/FitNets at 0f633b1. The default, one stage of weight 100, is that of the community's comparisons:
        HobbitLong/RepDistiller at b84f547, distiller_zoo/FitNet.py.
    Differs: the authors' code halves the squared distance and sums it over one axis of the map, which is height / 2
        times the mean; here both forms have the mean. Its w is 4 for five epochs and 1 from epoch 400 on. It sets the
        student's division by T back before it trains, so that as run only the targets are softened; here both are, as
        in the paper.
    """

    settings: FitNetsSettings
    family = "offline"
    year = 2015
    exchanges = "features"
    term = "hint"

    def connect(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """Make the regressor of each student."""
        made, hint = [], self.settings.hint_stage
        for student, pairs in zip(self.cohort, self.stage_pairs(teacher), strict=True):
            last, who = len(student.stages) - 1, f"fitnets: {label(student)}"
            if not last - len(pairs) < hint <= last:
                raise UsageError(
                    f"{who} has no partner of the teacher's for stage {hint}: choose a --method.hint-stage from "
                    f"{last - len(pairs) + 1} to {last}"
                )
            made.append(regressor(*pairs[hint - last - 1], act=True, whose=who))
        return made

    def initial_parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters of the stages up to the hint, and of the regressors."""
        stages = [stage for student in self.cohort for stage in student.stages[: self.settings.hint_stage + 1]]
        return tuple(dict.fromkeys(each for part in (*stages, self.connectors) for each in part.parameters()))

    @property
    def teaches_throughout(self) -> bool:
        """The teacher runs in both stages of the training."""
        return True

    def compared(self, index: int, maps: Maps) -> Maps:
        """Put the regressed map in the place of that of the hint's stage; unneeded after an initialisation."""
        hint = self.settings.hint_stage
        if self.settings.initial_share and not self.initialising:
            return ()
        return (*maps[:hint], self.connectors[index](maps[hint]), *maps[hint + 1 :])

    def distance(self, index: int, pairs: MapPairs) -> Scalar:
        """Compute the mean squared distance of the hint's pair of maps."""
        own, taught = pairs[self.settings.hint_stage - len(self.cohort[index].stages)]
        return self.settings.hint_weight * squared_distance(own, taught) / taught[0].numel()

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<j>`, and `hint/` or, after an initialisation, `soft/teacher->student<j>`."""
        terms, chosen, teacher = super().losses(outputs, labels, progress), self.settings, self.taught_by
        if not chosen.initial_share or teacher is None:
            return terms
        done = ((progress - chosen.initial_share) / (1 - chosen.initial_share)).clamp(min=0)
        weight = teacher.weight * (chosen.soft_weight + (chosen.last_soft_weight - chosen.soft_weight) * done)
        for index, logits in enumerate(outputs.logits):
            target = outputs.taught if outputs.taught.ndim == 2 else outputs.taught[index]
            soft = soft_cross_entropy(logits, target, teacher.temperature)
            terms[f"soft/teacher->student{index}"] = weight.to(soft.dtype) * soft
        return terms
