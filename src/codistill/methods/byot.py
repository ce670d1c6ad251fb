"""BYOT, "be your own teacher": a network's last classifier teaches classifiers behind its earlier stages."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods import losses
from codistill.methods.cohort import FeatureMap, Images, Outputs
from codistill.methods.independent import IndependentSettings
from codistill.methods.losses import Labels, Scalar, Terms
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import cross_entropy_terms
from codistill.modules.fusion import MapShape
from codistill.networks import Network, PooledLinear
from codistill.networks.layers import BatchNormAct2d, initialise
from codistill.networks.probe import label, probe_shapes


@dataclass(frozen=True, kw_only=True)
class BYOTSettings(IndependentSettings):
    """Settings of self-distillation."""

    soft_weight: float = 0.3
    """a, from 0 to 1: weight of an exit's soft targets, the last classifier's; its cross-entropy has 1 - a."""
    temperature: float = 3.0
    """T of the soft targets, > 0."""
    scale_by_temperature: bool = False
    """Whether their term is multiplied by T^2, which the authors' code does not."""
    hint_weight: float = 0.03
    """Factor on the squared distance of an exit's features to the last ones, at least 0."""
    hint_form: Literal["pooled", "map"] = "pooled"
    """Features that it compares: the means over all places that the classifiers see, or the maps (mean over places)."""
    hint_skips: Literal["shallowest", "deepest", "none"] = "shallowest"
    """Exit without a hint."""
    adapter_width: int | None = None
    """Channels in the middle of an exit's adapter. None: a quarter of those of the last map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("soft_weight", 0 <= self.soft_weight <= 1, "between 0 and 1")
        self.check("temperature", 0 < self.temperature < math.inf, "a number above 0")
        self.check("hint_weight", 0 <= self.hint_weight < math.inf, "at least 0")
        self.check("adapter_width", self.adapter_width is None or self.adapter_width >= 1, "at least 1")


class Exit(nn.Module):
    """A classifier behind an earlier stage: an adapter that gives its map the shape of the last one, and a head.

    1x1 -> s x s with stride s -> 1x1, each with BN and ReLU, where the map is s times as high and as wide as the last
    one; where it is not a multiple, the kernel is as much larger as is left over. `width`: of the middle convolution.

    Source: Zhang et al., arXiv 1905.08094, "bottleneck"; authors' code ArchipLab-LinfengZhang/
        pytorch-self-distillation-final at 307141b, resnet.py, ScalaNet.
    Differs: their convolutions have biases, which BN takes away again.
    """

    def __init__(self, shape: MapShape, last: MapShape, num_classes: int, width: int) -> None:
        super().__init__()
        (_, high, wide), (_, low, narrow) = shape, last
        stride = (high // low, wide // narrow)
        kernel = (high - (low - 1) * stride[0], wide - (narrow - 1) * stride[1])
        middle = nn.Conv2d(width, width, kernel, stride, bias=False)
        layers: list[nn.Module] = []
        for conv in (nn.Conv2d(shape[0], width, 1, bias=False), middle, nn.Conv2d(width, last[0], 1, bias=False)):
            layers += [conv, BatchNormAct2d(conv.out_channels)]
        self.adapter = nn.Sequential(*layers)
        self.head = PooledLinear(last[0], num_classes)
        initialise(self)

    def forward(self, stage_map: FeatureMap) -> tuple[Float[Tensor, "batch channel height width"], losses.Logits]:
        """Return the adapted map and its logits."""
        adapted = self.adapter(stage_map)
        return adapted, self.head(adapted)


@METHODS.register("byot")
class BYOT(Method):
    """Each student's last classifier teaches exits behind its earlier stages; only the plain network is deployed.

    With z the last logits, F the last features, z_k and F_k those of exit k (k = 1, 2, .. below the last stage):

        CE(z) + sum_k [ (1 - a) CE(z_k) + a CE(softmax(z / T), softmax(z_k / T)) + lambda ||F_k - F||^2 ]

    z and F are detached as targets; the shallowest exit has no hint. The distance is summed over channels and averaged
    over the batch. Several students train side by side and do not learn from each other.

    Args:
        students: Networks with at least three stages; stage 0, the stem, has no exit.
        image_size: Height and width of the images, pixels; the adapters depend on it.

    Source: Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
        Distillation", ICCV 2019, arXiv 1905.08094; authors' code of the journal version, ArchipLab-LinfengZhang/
        pytorch-self-distillation-final at eda2f2b, train.py (the earlier 317b7e5 has no hint).
    Differs: that code takes the norm of the whole batch instead of the mean squared distance, adapts pooled features by
        a linear layer and maps by separable convolutions behind attention, and spares the hint of the deepest exit
        where its comment says the shallowest: docs/byot.md.
    """

    settings: BYOTSettings
    family = "self"
    year = 2019
    exchanges = "logits, features"

    def build(self) -> None:
        """Make the exits of each student."""
        self.exits = nn.ModuleList(nn.ModuleList(self._exits(student)) for student in self.cohort)

    def _exits(self, student: Network) -> list[Exit]:
        name, shapes = label(student), probe_shapes(student, self.image_size)
        if len(shapes) < 3:
            raise UsageError(f"byot needs networks of at least 3 stages, but {name} has {len(shapes)}: choose another")
        last = shapes[-1]
        for shape in shapes[1:-1]:
            if shape[1] < last[1] or shape[2] < last[2]:
                raise UsageError(f"byot: maps of {name} grow from {shape[1:]} to {last[1:]}: choose another network")
        width = self.settings.adapter_width or max(1, last[0] // 4)
        return [Exit(shape, last, self.num_classes, width) for shape in shapes[1:-1]]

    def forward(self, images: Images) -> Outputs:
        """Run all students, stage by stage, and their exits on normalised images."""

        def finish(index: int, maps: tuple[FeatureMap, ...]) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
            exits = self.exits[index]
            assert isinstance(exits, nn.ModuleList)
            left = [leave(each) for leave, each in zip(exits, maps[1:-1], strict=True)]  # maps[0] is the stem's
            return maps[-1], self.cohort[index].head(maps[-1]), left

        maps, logits, left = zip(*self.cohort.each_staged(images, finish), strict=True)
        extras: dict[str, Tensor] = {}
        for index, pairs in enumerate(left):
            for number, (features, exit_logits) in enumerate(pairs, start=1):
                name = f"student{index}/exit{number}"
                extras |= {f"features/{name}": features, f"logits/{name}": exit_logits}
        return Outputs(logits, maps, extras=extras)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<j>`, and `ce/`, `soft/` and `hint/student<j>/exit<k>` of its exits."""
        chosen = self.settings
        terms = cross_entropy_terms(outputs.logits, labels)
        scale = chosen.temperature**2 if chosen.scale_by_temperature else 1.0
        for index, (logits, last) in enumerate(zip(outputs.logits, outputs.feature_maps, strict=True)):
            count = len(self.cohort[index].stages) - 2
            skipped = {"shallowest": 1, "deepest": count, "none": 0}[chosen.hint_skips]
            for number in range(1, count + 1):
                name = f"student{index}/exit{number}"
                own = outputs.extras[f"logits/{name}"]
                terms[f"ce/{name}"] = (1 - chosen.soft_weight) * losses.cross_entropy(own, labels)
                soft = losses.soft_cross_entropy(own, logits, chosen.temperature)
                terms[f"soft/{name}"] = chosen.soft_weight * scale * soft
                if number != skipped:
                    terms[f"hint/{name}"] = chosen.hint_weight * self._hint(outputs.extras[f"features/{name}"], last)
        return terms

    def _hint(self, features: Tensor, last: Tensor) -> Tensor:
        if self.settings.hint_form == "map":
            return losses.squared_distance(features, last) / (last.shape[2] * last.shape[3])
        features, last = (losses.at_least_float32(each).mean(dim=(2, 3)) for each in (features, last))
        return losses.squared_distance(features, last)
