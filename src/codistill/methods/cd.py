"""CD, channel distillation: students match the means of a teacher's channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from codistill.methods.cohort import Outputs
from codistill.methods.losses import Labels, Scalar, Terms, at_least_float32, soft_target_kl, true_classes
from codistill.methods.method import METHODS
from codistill.methods.offline import MapPairs, Maps, OfflineMethod, OfflineSettings
from codistill.methods.terms import weighted
from codistill.networks.layers import conv_bn_act, initialise

DECAYS_AT = (60 / 200, 160 / 200)  # shares of the epochs after which the teacher's maps weigh less


@dataclass(frozen=True, kw_only=True)
class CDSettings(OfflineSettings):
    """Settings of channel distillation."""

    channel_weight: float = 6.0
    """Factor on the distances of the channels' means, summed over the stages, at least 0."""
    guided_weight: float = 0.1
    """Factor on the KL of the images that the teacher classifies right, at least 0; the authors' on ImageNet: 1."""
    guided_temperature: float = 1.0
    """T of that KL, > 0."""
    decay: float = 1.0
    """By what the factor on the channels is multiplied after 30 % and again after 80 % of the epochs, from 0 to 1; the
    authors' early decay: 0.9."""
    silent_share: float = 0.0
    """Share of the epochs, at the start, in which neither labels nor logits teach; the authors' early decay: 0.3."""

    @property
    def needs_full_batch(self) -> str:
        """The guided term counts the right images of the batch; see `MethodSettings.needs_full_batch`."""
        return "method.guided_weight above 0" if self.guided_weight > 0 else super().needs_full_batch

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("channel_weight", 0 <= self.channel_weight < math.inf, "a number, at least 0")
        self.check("guided_weight", 0 <= self.guided_weight < math.inf, "a number, at least 0")
        self.check("guided_temperature", 0 < self.guided_temperature < math.inf, "a number above 0")
        self.check("decay", 0 <= self.decay <= 1, "between 0 and 1")
        self.check("silent_share", 0 <= self.silent_share < 1, "at least 0 and below 1, a share of the epochs")


@METHODS.register("cd")
class CD(OfflineMethod):
    """Students learn from the labels, match a teacher's channel means, and imitate its correct predictions.

        a CE(z) + 6 sum_k mean (GAP(K_k(F_k)) - GAP(G_k))^2 + 0.1 T^2 / n sum over right images of KL(p_t || p_s)

    F_k and G_k are the outputs of paired stages of student and teacher, without the first pair, which is that of the
    stems; GAP is the mean over places, the mean is over the batch and the channels. The connector K_k, 1x1 convolution,
    BN and ReLU, is there between equal widths too. n counts the images that the teacher classifies right; where there
    is none, the term is 0. With mixed labels right is the class of the largest share.

    Source: Zhou, Zhuge, Guan, Liu, "Channel Distillation: Channel-Wise Attention for Knowledge Distillation",
        arXiv 2006.01683; authors' code zhouzaida/channel-distillation at 2464d30.
    Differs: the teacher stays in evaluation mode; their `net.train()` puts it into training mode too. There n = 0
        divides by 0. Their early decay (`decay`, `silent_share`) counts epochs from 1, so that it decays an epoch
        earlier; it is off by default, as in their rows "CD" and "CD+GKD".
    """

    settings: CDSettings
    family = "offline"
    year = 2020
    exchanges = "features, logits"
    term = "channel"

    def connect(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """Make the connectors of each student, one for each pair of stages but the first."""
        made = [
            nn.ModuleList(conv_bn_act(own[0], taught[0], 1) for own, taught in pairs[1:])
            for pairs in self.stage_pairs(teacher)
        ]
        for each in made:
            initialise(each)
        return made

    def compared(self, index: int, maps: Maps) -> Maps:
        """Apply the connectors to the last maps."""
        connectors = self.connectors[index]
        assert isinstance(connectors, nn.ModuleList)
        return tuple(connector(each) for connector, each in zip(connectors, maps[-len(connectors) :], strict=True))

    def distance(self, index: int, pairs: MapPairs) -> Scalar:
        """Compute the mean squared distance of the channels' means, summed over the pairs of stages."""
        parts = [
            (at_least_float32(own).mean(dim=(2, 3)) - at_least_float32(taught).mean(dim=(2, 3))).square().mean()
            for own, taught in pairs
        ]
        total: Scalar = sum(parts[1:], parts[0])
        return self.settings.channel_weight * total

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<j>`, `channel/teacher->student<j>` and `guided/teacher->student<j>`."""
        speaks = (progress >= self.settings.silent_share).float()
        passed = torch.stack([progress >= share for share in DECAYS_AT]).sum()
        told = self.label_terms(outputs, labels) | self.guided_terms(outputs, labels)
        terms = {name: speaks.to(each.dtype) * each for name, each in told.items()}
        decayed = self.settings.decay**passed
        return terms | {name: decayed.to(each.dtype) * each for name, each in self.map_terms(outputs).items()}

    def guided_terms(self, outputs: Outputs, labels: Labels) -> Terms:
        """Compute the weighted KL to the teacher of the images that it classifies right, of each student."""
        if self.taught_by is None:
            return {}
        chosen, terms = self.settings, Terms()
        classes = true_classes(labels)
        for index, (logits, targets) in enumerate(
            zip(outputs.logits, outputs.taught.expand(len(outputs.logits), -1, -1), strict=True)
        ):
            each = soft_target_kl(logits[:, None], targets[:, None], chosen.guided_temperature)
            right = (targets.argmax(dim=1) == classes).to(each.dtype)
            terms[f"guided/teacher->student{index}"] = (right * each).sum() / right.sum().clamp(min=1)
        return weighted(chosen.guided_weight, terms)
