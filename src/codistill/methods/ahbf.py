"""AHBF-OKD: adaptive hierarchy-branch fusion of students that grow deeper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.methods.cohort import Cohort, EnsembleNetwork, FeatureMap, Images, Outputs
from codistill.methods.losses import Labels, Logits, Scalar, Terms, weighted_logits
from codistill.methods.method import METHODS, Method
from codistill.methods.one import Gate
from codistill.methods.terms import DistillationSettings, cross_entropy_terms, ramped_kl
from codistill.modules.fusion import convolutional_regressor
from codistill.networks.layers import conv_bn_act, initialise
from codistill.networks.probe import probe_shapes


@dataclass(frozen=True, kw_only=True)
class AHBFSettings(DistillationSettings):
    """Settings of hierarchy-branch fusion."""

    ramp_up: float = 240 / 300
    """Share of the training over which the distillation terms grow to full weight (240 of 300 epochs); 0: at once."""
    detach_teachers: bool = False
    """Whether the teaching side of a distillation term gets no gradient; in the authors' code it does."""
    kl_weight: float = 0.75
    """Factor on all distillation terms, at least 0; the authors' 1.5, halved where their ramp-up is computed."""
    assistant_weight: float = 2.0
    """lambda_1, factor on the terms whose teacher is an assistant, at least 0."""
    branch_weight: float = 4.0
    """lambda_2, factor on the terms whose teacher is the next deeper branch, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kl_weight", "assistant_weight", "branch_weight"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "at least 0")


class Assistant(nn.Module):
    """Fuse the maps and logits of what there is so far with those of the next branch.

    f = BN(1x1([x, y])), g = softmax(ReLU(BN(W mean(f) + b))), z = g_0 z_x + g_1 z_y; without ReLU after the first BN.

    Source: linruigong965/AHBF at 8d899d6, resnet_ahbf.py.
    Differs: their 1x1 convolution has a bias, which BN takes away again. Unlike widths are ours.
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.fuse = conv_bn_act(width_in, width, 1, act=False)
        self.gate = Gate(width, 2)
        initialise(self)

    def forward(
        self, maps: Sequence[FeatureMap], logits: Sequence[Logits]
    ) -> tuple[Float[Tensor, "batch channel height width"], Logits]:
        """Map two feature maps and their logits to one of each."""
        fused: Tensor = self.fuse(torch.cat(list(maps), dim=1))
        return fused, weighted_logits(logits, self.gate([fused]))


class Hierarchy(nn.Module):
    """Assistants, each on the one before it and the next branch; maps that are larger than the smallest are reduced."""

    def __init__(self, adapters: Sequence[nn.Module], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self.layers = nn.ModuleList(layers)

    def forward(self, maps: Sequence[FeatureMap], logits: Sequence[Logits]) -> list[Logits]:
        """Map feature maps and logits of all branches to the logits of each assistant."""
        fused, mixed = self.adapters[0](maps[0]), logits[0]
        found = []
        for adapter, layer, branch, own in zip(self.adapters[1:], self.layers, maps[1:], logits[1:], strict=True):
            fused, mixed = layer([fused, adapter(branch)], [mixed, own])
            found.append(mixed)
        return found


class HierarchyPredictor(EnsembleNetwork):
    """One assistant with the branches and assistants below it; `combine` is its part of the hierarchy."""

    combine: Hierarchy

    def __init__(self, cohort: Cohort, hierarchy: Hierarchy, assistant: int) -> None:
        part = Hierarchy(list(hierarchy.adapters[: assistant + 1]), list(hierarchy.layers[:assistant]))
        super().__init__(cohort, part, [student.head for student in cohort])
        self.branches = self.branches[: assistant + 1]

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Logits:
        """Map normalised images to logits."""
        low = self.trunk(images)
        maps, logits = self.maps_and_logits(low)
        fused: list[Logits] = self.combine(maps, logits)
        return fused[-1]


@METHODS.register("ahbf")
class AHBF(Method):
    """Branches of growing depth are fused one after the other by assistants; student0, the thinnest, is to be deployed.

    Assistant e_1 fuses the branches z_0 and z_1, e_i fuses e_{i-1} and z_i; the last one is the predictor `fused`:

        sum_j CE(z_j) + sum_i CE(e_i) + r(t) T^2 kappa [
            lambda_2 KL(z_1 -> z_0) + lambda_1 KL(e_1 -> z_0) + lambda_1 KL(e_1 -> z_1)
            + sum_{i>1} ( lambda_2 KL(z_i -> e_{i-1}) + lambda_1 KL(e_i -> z_i) + lambda_1 KL(e_i -> e_{i-1}) ) ]

    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)). Teachers are trained by it too, as in the authors' code.

    Args:
        students: At least two networks, the thinnest first. Equal ones share all stages but the last; unlike ones share
            nothing unless `shared_stages` says how many of their first stages are alike.
        image_size: Height and width of the images, pixels; only maps of unlike resolution depend on it.

    Source: Gong et al., "Adaptive Hierarchy-Branch Fusion for Online Knowledge Distillation", AAAI 2023; authors' code
        linruigong965/AHBF at 8d899d6, train_ahbf.py and resnet_ahbf.py.
    Differs: their code adds 1e-7 to the target's probabilities (setting target_epsilon). Its branches share all stages
        but the last, in which they differ by some blocks; docs/ahbf.md says how to build those.
    """

    settings: AHBFSettings
    family = "online"
    year = 2023
    exchanges = "logits, features"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Make the assistants."""
        shapes = [probe_shapes(student, self.image_size)[-1] for student in self.cohort]
        smallest, size = min(shape[0] for shape in shapes), (min(s[1] for s in shapes), min(s[2] for s in shapes))
        adapters = [
            nn.Identity() if each[1:] == size else convolutional_regressor(each[0], each[1:], size) for each in shapes
        ]
        before = [shapes[0][0], *[smallest] * (len(shapes) - 2)]
        layers = [Assistant(width + each[0], smallest) for width, each in zip(before, shapes[1:], strict=True)]
        self.assistants = Hierarchy(adapters, layers)
        initialise(self.assistants.adapters)

    @property
    def names(self) -> list[str]:
        """The assistants' names: assistant1, assistant2, .. and, the last one, fused."""
        return [*(f"assistant{number}" for number in range(1, len(self.cohort) - 1)), "fused"]

    def forward(self, images: Images) -> Outputs:
        """Run all students and assistants on normalised images."""
        outputs = super().forward(images)
        *below, last = self.assistants(outputs.feature_maps, outputs.logits)
        return replace(outputs, fused_logits=last, extras=dict(zip(self.names, below, strict=False)))

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/` of each student and assistant, and the `kl/` terms that the class lists."""
        chosen, students = self.settings, outputs.logits
        assistants = {**outputs.extras, "fused": outputs.fused}
        terms = cross_entropy_terms(students, labels, **assistants)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        below, learns = "student0", students[0]
        for number, (name, mixed) in enumerate(assistants.items(), start=1):
            deeper = f"student{number}"
            pairs[f"kl/{deeper}->{below}"] = (learns, students[number])
            pairs[f"kl/{name}->{below}"] = (learns, mixed)
            pairs[f"kl/{name}->{deeper}"] = (students[number], mixed)
            below, learns = name, mixed
        divergences = ramped_kl(pairs, labels, progress, chosen, chosen.detach_teachers)
        for name, divergence in divergences.items():
            weight = chosen.branch_weight if name.startswith("kl/student") else chosen.assistant_weight
            terms[name] = chosen.kl_weight * weight * divergence
        return terms

    def predictions(self, outputs: Outputs) -> dict[str, Logits]:
        """Name the logits of students, ensemble and assistants; see `Method.predictions`."""
        return {**super().predictions(outputs), **outputs.extras}

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble and the assistants, each with what lies below it."""
        numbered = {name: number for number, name in enumerate(self.names, start=1)}
        order = ["fused", *(name for name in numbered if name != "fused")]
        fused = {name: HierarchyPredictor(self.cohort, self.assistants, numbered[name]) for name in order}
        return {**super().predictors(), **fused}
