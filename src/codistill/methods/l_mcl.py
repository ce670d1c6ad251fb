"""L-MCL: layer-wise mutual contrastive learning of networks with exits at several depths."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import FeatureMap, Images, Outputs
from codistill.methods.losses import Labels, Logits, Scalar, Terms, at_least_float32, students_kl, weighted_logits
from codistill.methods.mcl import ContrastSettings, Embedding, contrast_terms
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import KLSettings, cross_entropy_terms
from codistill.networks import Network
from codistill.networks.layers import initialise
from codistill.networks.probe import copied, label, probe_shapes


@dataclass(frozen=True, kw_only=True)
class LMCLSettings(ContrastSettings, KLSettings):
    """Settings of layer-wise mutual contrastive learning."""

    exits: int | None = None
    """Exits of each network beside its last classifier, the deepest ones. None: one behind each stage but the first and
    the last."""
    kl_weight: float = 1.0
    """Factor on the distillation of the aggregated logits of each network to the last classifier of every one, at least
    0; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("exits", self.exits is None or self.exits >= 1, "at least 1")
        self.check("kl_weight", 0 <= self.kl_weight < math.inf, "at least 0")


class Aggregator(nn.Module):
    """Weights of a network's classifiers for each image: linear, ReLU, linear on the pooled maps before them, softmax.

    Source: winycg/L-MCL at 42bb00a, models/aggregator.py.
    """

    def __init__(self, width: int, classifiers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(classifiers * width, width), nn.ReLU(), nn.Linear(width, classifiers))

    def forward(self, maps: list[FeatureMap], logits: list[Logits]) -> Logits:
        """Return the weighted sum of the logits of all classifiers."""
        pooled = torch.cat([each.mean(dim=(2, 3)) for each in maps], dim=1)
        weights: Float[Tensor, "batch classifier"] = F.softmax(at_least_float32(self.layers(pooled)), dim=1)
        return weighted_logits(logits, weights)


def fresh_copy(module: nn.Module) -> nn.Module:
    """Copy a part of a network, and draw the weights of its layers anew."""
    twin = copied(module)
    for layer in twin.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
    initialise(twin)
    return twin


@METHODS.register("l-mcl")
class LMCL(Method):
    """Networks with exits at several depths, each a whole network, compare the embeddings of all exits.

    An exit leaves behind an early stage, and goes on through copies of all later stages and of the head with weights of
    their own: with its stages below it is a network of the student's own form. With a and b over the last classifier
    and the exits of networks i and j, v_i the weighted sum of all logits of i by its `Aggregator`:

        sum_i [ sum_a CE(z_ia) + CE(v_i) ] + sum_{i, j} w T^2 KL(v_j -> z_i) + sum over all a of i, b of j, i < j of MCL

    MCL are the terms of `contrast_terms` for the two embeddings; v is detached in KL, z_i are the last logits.

    Predictors: the students, their ensemble, and each exit as a plain network, `student0/exit1` behind stage 1, ..

    Args:
        students: At least two networks of at least three stages; they share nothing unless `shared_stages` says so.
        image_size: Height and width of the images, pixels, for which the networks' maps are looked at.

    Source: Yang, An, Zhou, Zhuang, Xu, Zhang, "Online Knowledge Distillation via Mutual Contrastive Learning for Visual
        Recognition", TPAMI 2023, arXiv 2207.11518; authors' code winycg/L-MCL, main_layer_mcl_cifar_meta.py at 2c0901e,
        models/lmcl_resnet_cifar.py and losses/cifar_sup_layer_mcl_meta_loss.py at 42bb00a.
    Differs: all comparisons have equal weights; there a network that is trained by second-order steps weights each pair
        of exits and each image. Images without another one of their class are left out: docs/l-mcl.md.
    """

    settings: LMCLSettings
    title = "L-MCL"
    family = "online"
    year = 2023
    exchanges = "logits, embeddings"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Make exits, embeddings and the aggregator of each student."""
        self.exits = nn.ModuleList(nn.ModuleList(self._exits(student)) for student in self.cohort)
        self.embeddings, self.aggregators = nn.ModuleList(), nn.ModuleList()
        for student, exits in zip(self.cohort, self.exits, strict=True):
            width, classifiers = probe_shapes(student, self.image_size)[-1][0], len(networks(exits)) + 1
            self.embeddings.append(nn.ModuleList(Embedding(width) for _ in range(classifiers)))
            self.aggregators.append(Aggregator(width, classifiers))

    def _exits(self, student: Network) -> list[Network]:
        """Return, for each exit, what follows the stage behind which it leaves."""
        name, most = label(student), len(student.stages) - 2
        if most < 1:
            raise UsageError(f"l-mcl needs networks of at least 3 stages, but {name} has {most + 2}: choose another")
        count = most if self.settings.exits is None else self.settings.exits
        if count > most:
            raise UsageError(f"method.exits is {count}, but {name} of {most + 2} stages has room for {most}: use fewer")
        return [
            Network(list(map(fresh_copy, student.stages[-rest:])), fresh_copy(student.head), student.widths[-rest:])
            for rest in range(count, 0, -1)
        ]

    def named_exits(self) -> dict[str, tuple[int, Network]]:
        """Return the exits of all students by name, each with its student's index."""
        found: dict[str, tuple[int, Network]] = {}
        for index, exits in enumerate(self.exits):
            stages = len(self.cohort[index].stages)
            found |= {f"student{index}/exit{stages - 1 - len(each.stages)}": (index, each) for each in networks(exits)}
        return found

    def forward(self, images: Images) -> Outputs:
        """Run all students, stage by stage, with their exits, embeddings and aggregators on normalised images."""

        def finish(index: int, stages: tuple[FeatureMap, ...]) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
            exits = networks(self.exits[index])
            maps = [*(each.feature_map(stages[-1 - len(each.stages)]) for each in exits), stages[-1]]
            heads = [*(each.head for each in exits), self.cohort[index].head]
            logits = [head(each) for head, each in zip(heads, maps, strict=True)]
            embed = self.embeddings[index]
            assert isinstance(embed, nn.ModuleList)
            embedded = torch.stack([module(each) for module, each in zip(embed, maps, strict=True)])
            return stages[-1], logits, embedded, self.aggregators[index](maps, logits)

        maps, logits, embedded, aggregated = zip(*self.cohort.each_staged(images, finish), strict=True)
        left = [each for own in logits for each in own[:-1]]
        extras = dict(zip(self.named_exits(), left, strict=True))
        extras |= {f"embeddings{index}": each for index, each in enumerate(embedded)}
        extras |= {f"aggregated{index}": each for index, each in enumerate(aggregated)}
        return Outputs(tuple(own[-1] for own in logits), maps, extras=extras)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/` of students, exits and `aggregated<i>`, `kl/aggregated<j>->student<i>` and the contrasts."""
        chosen, count = self.settings, len(self.cohort)
        exits = {name: outputs.extras[name] for name in self.named_exits()}
        aggregated = {f"aggregated{index}": outputs.extras[f"aggregated{index}"] for index in range(count)}
        terms = cross_entropy_terms(outputs.logits, labels, **exits, **aggregated)
        if chosen.kl_weight:
            how = chosen.temperature, chosen.kl_weight, *chosen.form
            for name, target in aggregated.items():
                terms |= students_kl(name, outputs.logits, target, labels, *how)
        embeddings = [outputs.extras[f"embeddings{index}"].unbind() for index in range(count)]
        contrasts = contrast_terms(embeddings, labels, chosen)
        for index, own in enumerate(embeddings):
            # That within a network belongs to each comparison with an embedding of another one.
            contrasts[f"vcl/student{index}"] = contrasts[f"vcl/student{index}"] * (sum(map(len, embeddings)) - len(own))
        return terms | contrasts

    def predictions(self, outputs: Outputs) -> dict[str, Logits]:
        """Name the logits of students, ensemble and exits; see `Method.predictions`."""
        return super().predictions(outputs) | {name: outputs.extras[name] for name in self.named_exits()}

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble and, as plain networks, the exits."""
        found = super().predictors()
        for name, (index, left) in self.named_exits().items():
            student = self.cohort[index]
            low = student.stages[: -len(left.stages)]
            whole = Network([*low, *left.stages], left.head, student.widths, student.spec)
            whole.is_cut = student.is_cut
            found[name] = whole
        return found


def networks(modules: nn.Module) -> list[Network]:
    """Return the networks of a list of modules."""
    return [each for each in modules.children() if isinstance(each, Network)]
