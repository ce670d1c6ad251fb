"""FFSD: feature fusion and self-distillation; a leader learns from the fusion of its peers and is deployed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import EnsembleNetwork, FeatureMap, Images, Outputs
from codistill.methods.losses import (
    Labels,
    Scalar,
    Terms,
    at_least_float32,
    attention_map,
    distillation,
    mean_logits,
    ramp_up,
)
from codistill.methods.method import METHODS, Method, ParameterGroup
from codistill.methods.terms import KLSettings, cross_entropy_terms
from codistill.modules import FeatureFusion
from codistill.modules.fusion import MapShape
from codistill.networks.layers import BatchNormAct2d, conv_bn_act, initialise
from codistill.networks.probe import label, probe_shapes


@dataclass(frozen=True, kw_only=True)
class FFSDSettings(KLSettings):
    """Settings of FFSD."""

    shared_stages: int | None = 0
    """Low stages that the students share. 0: nothing, as in FFSD."""
    temperature: float = 2.0
    """T of all distillation terms, > 0, with the factor T^2."""
    ramp_up: float = 5 / 300
    """Share of the training over which the three weights below grow to their full values (5 of 300 epochs); 0: at once.
    Distillation of logits has its full weight throughout."""
    diversity_weight: float = 1e-5
    """Factor on a peer's distance from the shifted attention of the one before it, and on its self-distillation, at
    least 0."""
    leader_weight: float = 10.0
    """Factor on the leader's attention losses, at least 0."""
    decoder_weight: float = 1000.0
    """Factor on the losses that decoders learn from, at least 0."""
    fusion_weight_decay: float = 1e-5
    """Weight decay of the fusion module; all else has the run's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("temperature", 0 < self.temperature < math.inf, "a number above 0")
        self.check("ramp_up", 0 <= self.ramp_up <= 1, "between 0 and 1, a share of the training")
        for name in ("diversity_weight", "leader_weight", "decoder_weight"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        self.check("fusion_weight_decay", 0 <= self.fusion_weight_decay < 1, "at least 0 and below 1")


def unit_distance(values: Float[Tensor, "batch *axes"], target: Float[Tensor, "batch *axes"]) -> Scalar:
    """Compute the mean squared difference of two values, each divided by its length; the target gets no gradient.

    Source: SJLeo/FFSD at 7038db8, CIFARTrainer.py, attention_loss; the mean is over the batch and all axes.
    """
    return (F.normalize(values.flatten(1)) - F.normalize(target.detach().flatten(1))).square().mean()


def shifted(places: Float[Tensor, "batch place"]) -> Float[Tensor, "batch place"]:
    """Compute the shifted attention that another student is to have: large where this one is small, and the reverse.

    With l the length of a, u = a / l, q the u of rank floor(places / 3) from below: l - u above q, u below, l / 2 at q.

    Source: SJLeo/FFSD at 7038db8, CIFARTrainer.py, diversity_loss.
    """
    length, unit = places.norm(dim=1, keepdim=True), F.normalize(places)
    lowest = unit.topk(max(1, places.shape[1] // 3), largest=False).values[:, -1:]
    target: Tensor = (length / 2 - unit) * torch.sign(unit - lowest) + length / 2
    return target


def shifted_map(feature_map: FeatureMap) -> FeatureMap:
    """Add, at each place and to all channels, what is missing to the shifted attention: (t - u) l / channels.

    Source: SJLeo/FFSD at 7038db8, CIFARTrainer.py, diversity_target.
    """
    places = attention_map(feature_map)
    missing = (shifted(places) - F.normalize(places)) * places.norm(dim=1, keepdim=True) / feature_map.shape[1]
    lifted: Tensor = feature_map + missing.view(len(places), 1, *feature_map.shape[2:]).to(feature_map.dtype)
    return lifted


class Decoder(nn.Module):
    """Lead a network's last map back through the shapes of its earlier stages, by transposed convolutions.

    3x3 with the stride that leads from one stage's map to that of the stage before it, BN and ReLU.

    Source: SJLeo/FFSD at 57f360a, models/self_distillation.py.
    Differs: their widths halve and sizes double at each layer; here both are those of the stages, as in their ResNets.
    """

    def __init__(self, shapes: Sequence[MapShape], name: str) -> None:
        super().__init__()
        layers = []
        for (channels, *size), (wanted, *target) in zip(shapes[:0:-1], shapes[-2::-1], strict=True):
            strides = [-(-large // small) for large, small in zip(target, size, strict=True)]
            extra = [b - (a - 1) * stride - 1 for a, b, stride in zip(size, target, strides, strict=True)]
            if min(extra) < 0:
                raise UsageError(
                    f"ffsd: no decoder leads from maps {size} of {name} to {target}: choose another network"
                )
            (high, wide), (below, right) = strides, extra
            conv = nn.ConvTranspose2d(channels, wanted, 3, (high, wide), 1, (below, right), bias=False)
            layers.append(nn.Sequential(conv, BatchNormAct2d(wanted)))
        self.layers = nn.ModuleList(layers)

    def forward(self, feature_map: FeatureMap) -> list[Tensor]:
        """Return maps in the shapes of the earlier stages, the lowest first."""
        maps = [feature_map]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return maps[:0:-1]


@METHODS.register("ffsd")
class FFSD(Method):
    """Peers teach each other, a fused classifier learns from their maps, and a leader, the last student, from it.

        peers i:   CE(z_i) + T^2 / (n-1) sum_{j != i} KL(z_j -> z_i)
                   + w delta [ mean(A(F_i)/|A(F_i)| - S(F_{i-1}))^2 + sum_k d(A(F_i^k), A(D_i^k(S'(F_{i-1})))) ], i > 0
        fusion:    CE(z_f) + T^2 KL(mean_i z_i -> z_f),   on the peers' maps without gradient
        leader:    CE(z_L) + T^2 KL(z_f -> z_L)
                   + w lambda [ d(A(F_L), A(F_f)) + d(A(R(F_L)), A([F_i])) + sum_k d(A(F_L^k), A(D_L^k(F_f))) ]
        decoders:  w mu sum_k [ d(D^k(F), F^k) + d(A(D^k(F)), A(F^k)) ]

    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)) with a detached; A is `attention_map`, d `unit_distance`, S and S'
    `shifted` and `shifted_map`, F the last map and F^k that of stage k (not the stem), F_f the fused map, D `Decoder`,
    R depthwise 3x3 and 1x1 to the width of all peers. w is the ramp-up. Whatever stands on the right of a d, or is not
    of the line's own network, is fixed: each line trains its own weights, so that one step for all has the gradients of
    the authors' steps in turn.

    Args:
        students: At least three equal networks: two peers and the leader, which is the last and the one to deploy.
        image_size: Height and width of the images, pixels.

    Source: Li et al., "Distilling a Powerful Student Model via Online Knowledge Distillation", AAAI 2022; authors' code
        SJLeo/FFSD at 7038db8, CIFARTrainer.py, and at 57f360a, models.
    Differs: their decoders are trained by Adam, here by the run's optimiser; docs/ffsd.md has the others.
    """

    settings: FFSDSettings
    family = "online"
    year = 2022
    exchanges = "logits, features"
    min_students = 3
    like_students = True

    def build(self) -> None:
        """Make fusion, the leader's transfer to the peers' maps, and a decoder for all students but the first."""
        shapes, count = probe_shapes(self.cohort[0], self.image_size)[1:], len(self.cohort)
        name, width = label(self.cohort[0]), self.cohort[0].widths[-1]
        if len(shapes) < 2:
            raise UsageError(
                f"ffsd needs networks of at least 3 stages, but {name} has {len(shapes) + 1}: choose another"
            )
        self.fusion = FeatureFusion([shapes[-1]] * (count - 1), self.num_classes)
        transfer = conv_bn_act(width, width, 3, groups=width), conv_bn_act(width, (count - 1) * width, 1)
        self.transfer = nn.Sequential(*transfer)
        initialise(self.transfer)
        self.decoders = nn.ModuleList(Decoder(shapes, name) if index else nn.Sequential() for index in range(count))

    def refuse_useless(self) -> None:
        """Refuse a view for each student, too."""
        super().refuse_useless()
        if self.settings.views_per_student:
            raise UsageError(
                "ffsd compares maps place by place, but views have other crops and flips: "
                "set method.views_per_student to false"
            )

    def forward(self, images: Images) -> Outputs:
        """Run all students and the fused classifier; in training also what students learn their maps from."""

        def finish(index: int, maps: tuple[FeatureMap, ...]) -> tuple[tuple[FeatureMap, ...], Tensor]:
            return maps, self.cohort[index].head(maps[-1])

        stage_maps, logits = zip(*self.cohort.each_staged(images, finish), strict=True)
        last = [maps[-1] for maps in stage_maps]
        fused_map = self.fusion.fuse([each.detach() for each in last[:-1]])
        extras: dict[str, Tensor] = {}
        if self.training:
            extras = {"fused": fused_map, "transferred": self.transfer(last[-1])}
            sources = [shifted_map(each.detach()) for each in last[:-2]]
            for index, source in enumerate([*sources, fused_map.detach()], start=1):
                decoder = self.decoders[index]
                # With running statistics as a teacher. Not without gradient: autocast would keep weights cast so.
                taught = decoder.eval()(source)
                own = decoder.train()(last[index].detach())
                for number, (target, each) in enumerate(zip(taught, own, strict=True)):
                    extras |= {f"target{index}/{number}": target.detach(), f"decoded{index}/{number}": each}
        return Outputs(logits, tuple(last), self.fusion.head(fused_map), stage_maps=stage_maps, extras=extras)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/`, `kl/`, `diversity/`, `self/`, `attention/`, `transfer/` and `decoder/` terms."""
        chosen, extras, logits, fused = self.settings, outputs.extras, outputs.logits, outputs.fused
        leader, fused_map = len(logits) - 1, outputs.of_training("fused")
        last = [maps[-1] for maps in outputs.stage_maps]
        terms = cross_entropy_terms(logits, labels, fused=fused)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for index in range(leader):
            others = [peer for peer in range(leader) if peer != index]
            pairs |= {f"kl/student{peer}->student{index}": (logits[index], logits[peer]) for peer in others}
        pairs["kl/peers->fused"] = (fused, mean_logits(logits[:-1]))
        pairs[f"kl/fused->student{leader}"] = (logits[leader], fused)
        learned, targets = (torch.stack(side) for side in zip(*pairs.values(), strict=True))
        divergences = distillation(learned, targets, labels, chosen.temperature, *chosen.form)
        for name, divergence in zip(pairs, divergences.unbind(), strict=True):
            terms[name] = divergence / (leader - 1) if name.startswith("kl/student") else divergence
        warm = ramp_up(progress, chosen.ramp_up).to(divergences.dtype)
        for index in range(1, leader):
            own, target = F.normalize(attention_map(last[index])), shifted(attention_map(last[index - 1].detach()))
            distance = (own - target).square().mean()
            terms[f"diversity/student{index - 1}->student{index}"] = chosen.diversity_weight * warm * distance
        attended = unit_distance(attention_map(last[leader]), attention_map(fused_map))
        terms[f"attention/fused->student{leader}"] = chosen.leader_weight * warm * attended
        peers = attention_map(torch.cat(last[:-1], dim=1))
        transferred = unit_distance(attention_map(extras["transferred"]), peers)
        terms[f"transfer/peers->student{leader}"] = chosen.leader_weight * warm * transferred
        for index in range(1, leader + 1):
            taught, decoded = [], []
            for number, own in enumerate(outputs.stage_maps[index][1:-1]):
                taught.append(unit_distance(attention_map(own), attention_map(extras[f"target{index}/{number}"])))
                made, wanted = at_least_float32(extras[f"decoded{index}/{number}"]), at_least_float32(own)
                decoded += [unit_distance(made, wanted), unit_distance(attention_map(made), attention_map(wanted))]
            weight = chosen.leader_weight if index == leader else chosen.diversity_weight
            terms[f"self/student{index}"] = weight * warm * torch.stack(taught).sum()
            terms[f"decoder/student{index}"] = chosen.decoder_weight * warm * torch.stack(decoded).sum()
        return terms

    def parameter_groups(self) -> list[ParameterGroup]:
        """Split into the fusion module, with its own weight decay, and all else."""
        others = (self.cohort, self.transfer, self.decoders)
        return [
            ParameterGroup("students", tuple(each for module in others for each in module.parameters())),
            ParameterGroup("fusion", tuple(self.fusion.parameters()), self.settings.fusion_weight_decay),
        ]

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble and the fused classifier, which has the peers alone."""
        fused = EnsembleNetwork(self.cohort, self.fusion)
        fused.branches = fused.branches[:-1]
        return {**super().predictors(), "fused": fused}
