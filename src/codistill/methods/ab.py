"""AB: students begin with the activation boundaries of a teacher's neurons, then learn from the labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import FeatureMap, Images, Outputs
from codistill.methods.losses import Scalar, at_least_float32
from codistill.methods.method import METHODS
from codistill.methods.offline import MapPairs, Maps, TwoStageMethod, TwoStageSettings, regressor
from codistill.methods.teacher import staged
from codistill.networks import Network
from codistill.networks.layers import BatchNormAct2d, sums_kept
from codistill.networks.probe import activations, label


@dataclass(frozen=True, kw_only=True)
class ABSettings(TwoStageSettings):
    """Settings of AB."""

    initial_share: float = 30 / 270
    """Share of the epochs, at the start, that train stages and connectors by the boundaries alone; then the labels
    alone train. 0: there are none, and both train together."""
    boundary_weight: float = 3 / 1000
    """Factor on the boundaries, at least 0; the authors' on other data sets: 0.001."""
    margin: float = 1.0
    """How far beyond a boundary a student's neuron is to be, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("boundary_weight", 0 <= self.boundary_weight < math.inf, "a number, at least 0")
        self.check("margin", 0 <= self.margin < math.inf, "a number, at least 0")


def boundary_distance(own: FeatureMap, taught: FeatureMap, margin: float) -> Scalar:
    """Compute by how much a student's neurons miss the side of 0 on which the teacher's are; sum over them, mean batch.

    (s + m)^2 where the teacher's is at most 0 and s > -m, (m - s)^2 where it is above 0 and s < m, 0 elsewhere.

    Source: Heo, Lee, Yun, Choi, arXiv 1811.03233; authors' code bhheo/AB_distillation at a7701d3.
    """
    own, taught = at_least_float32(own), at_least_float32(taught)
    missed = (margin + own).where(taught <= 0, margin - own).clamp(min=0)
    return missed.square().sum() / len(own)


@METHODS.register("ab")
class AB(TwoStageMethod):
    """Students first match where a frozen teacher's neurons are active, then learn from the labels alone.

        3/1000 sum_k 2^(k - n) L(K_k(F_k), G_k) / B,   then   a CE(z)

    F_k and G_k, k = 1 .. n, are the maps of paired stages of student and teacher before their last ReLU, without the
    first pair, which is that of the stems; L is `boundary_distance`. The connector K_k is there between unlike shapes
    only: `regressor` without ReLU. Where a stage has no ReLU after it, the map is that of the next one, as the first of
    the next block of a wide ResNet, batch normalisation included. After `initial_share` of the epochs nothing is learnt
    from the teacher, and it does not run, unless `kl_weight` is set.

    Source: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
        Neurons", AAAI 2019, arXiv 1811.03233; authors' code bhheo/AB_distillation at a7701d3. The length of the first
        stage, 30 epochs before 240, and the connectors of unlike sizes: HobbitLong/RepDistiller at b84f547.
    Differs: the teacher stays in evaluation mode; theirs is in training mode. Their momentum begins again at 3/4 of
        the first stage, and their learning rate at its end; here the momentum does at its end, and the learning rate
        is the run's.
    """

    settings: ABSettings
    family = "offline"
    year = 2019
    exchanges = "activation boundaries"
    term = "boundary"

    def connect(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """Make the connectors of each student, and find the layers before whose ReLU maps are compared."""
        made, teacher_network = [], staged(teacher)[1]
        pairs_of = self.stage_pairs(teacher)
        self.watched = [self._watched(each, len(pairs) - 1) for each, pairs in zip(self.cohort, pairs_of, strict=True)]
        self.taught = self._watched(teacher_network, max(map(len, self.watched)))
        for student, pairs in zip(self.cohort, pairs_of, strict=True):
            who = f"ab: {label(student)}"
            layers = [nn.Identity() if a == b else regressor(a, b, act=False, whose=who) for a, b in pairs[1:]]
            made.append(nn.ModuleList(layers))
        return made

    def _watched(self, network: Network, count: int) -> list[BatchNormAct2d]:
        """Return the layer with the ReLU of each of the last stages of a network."""
        found = activations(network, self.image_size)[-count:]
        norms = [each for each in found if each is not None]
        if len(norms) < count:
            number = len(network.stages) - count + found.index(None)
            raise UsageError(
                f"ab compares maps before a ReLU, but at the end of stage {number} {label(network)} has none of ours "
                "(BatchNormAct2d): choose networks that have, such as resnet20, wrn-16-2, vgg8 or densenet-40-12"
            )
        return norms

    def __call__(self, images: Images) -> Outputs:
        """Run students and, where `runs_teacher`, the teacher, and keep their maps before the ReLU."""
        if not self.runs_teacher:
            return super().__call__(images)
        with sums_kept([norm for norms in (*self.watched, self.taught) for norm in norms]):
            outputs = super().__call__(images)
            views = images.shape[:-3]
            kept = tuple(norm.sum.reshape(*views, *norm.sum.shape[1:]) for norm in self.taught)
        return replace(outputs, teacher_maps=kept)

    def compared(self, index: int, maps: Maps) -> Maps:
        """Apply the connectors to the maps before the ReLU."""
        connectors = self.connectors[index]
        assert isinstance(connectors, nn.ModuleList)

        def own(norm: BatchNormAct2d) -> Tensor:  # a layer of a trunk has seen all students' views
            views = norm.sum.reshape(-1, len(maps[-1]), *norm.sum.shape[1:])
            return views[index if len(views) > 1 else 0]

        return tuple(connect(own(norm)) for connect, norm in zip(connectors, self.watched[index], strict=True))

    def distance(self, index: int, pairs: MapPairs) -> Scalar:
        """Compute `boundary_distance` of the pairs of stages: the deepest has weight 1, each one before it half."""
        parts = [
            boundary_distance(own, taught, self.settings.margin) / 2**depth
            for depth, (own, taught) in enumerate(reversed(pairs))
        ]
        total: Scalar = sum(parts[1:], parts[0])
        return self.settings.boundary_weight * total
