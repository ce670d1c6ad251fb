"""OKDDip: peers with attention for each other, and a leader that learns from all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.methods.cohort import Images, Outputs
from codistill.methods.losses import Labels, Logits, Scalar, Terms, at_least_float32, ensemble
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import EnsembleSettings, cross_entropy_terms, kl_pairs, ramped_kl


@dataclass(frozen=True, kw_only=True)
class OKDDipSettings(EnsembleSettings):
    """Settings of OKDDip."""

    detach_teachers: bool = False
    """Whether the peers get no gradient through the targets that they make; the attention learns in both cases."""
    attention_reduction: int = 8
    """Reduction of the attention's projections: features of d channels become d / 8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("attention_reduction", self.attention_reduction >= 1, "at least 1")


class PeerAttention(nn.Module):
    """Attention between peers: alpha_ab = softmax_b(q_a . k_b), b = a included; q = W_L h, k = W_E h.

    All peers of one width share W_L and W_E. Peers of other widths have their own, into the same space, whose size is
    the smallest width divided by the reduction.

    Source: DefangChen/OKDDip at c052f5b, models/model_cifar/resnet_GL.py.
    Differs: their peers have one width.
    """

    def __init__(self, widths: Sequence[int], reduction: int) -> None:
        super().__init__()
        size = max(1, min(widths) // reduction)
        self.query, self.key = (
            nn.ModuleDict({str(width): nn.Linear(width, size, bias=False) for width in sorted(set(widths))})
            for _ in range(2)
        )

    def forward(self, features: Sequence[Float[Tensor, "batch _channel"]]) -> Float[Tensor, "batch learner peer"]:
        """Map pooled features, one for each peer, to the logarithms of the weights."""
        queries, keys = (
            torch.stack([projections[str(each.shape[1])](each) for each in features], dim=1)
            for projections in (self.query, self.key)
        )
        return F.log_softmax(at_least_float32(queries @ keys.transpose(1, 2)), dim=2)


@METHODS.register("okddip")
class OKDDip(Method):
    """Each peer has a target of its own, which attention mixes from all peers; the leader learns from their mean.

    The last student, student<n-1>, is the leader z_L; it is the one to deploy. The others are peers:

        sum_a CE(z_a) + CE(z_L) + r(t) T^2 [ sum_a KL(t_a || z_a) + KL(mean_a z_a || z_L) ],  t_a = sum_b alpha_ab z_b

    KL(a || b) = KL(softmax(a / T) || softmax(b / T)), nothing detached; alpha as in `PeerAttention`.

    Args:
        students: At least two peers and, last, the leader. Equal ones share all stages but the last (the branch-based
            variant); with shared_stages 0 they share nothing (the network-based variant).

    Source: Chen et al., "Online Knowledge Distillation with Diverse Peers", AAAI 2020, arXiv 1912.00350; authors' code
        DefangChen/OKDDip-AAAI2020 at c6a05de, train_GL.py, models/model_cifar/resnet_GL.py.
    Differs: their code adds 1e-7 to the target's probabilities (setting target_epsilon), shares the last block of the
        DenseNet branches by mistake, and calls the mean of the peers the ensemble; here it is the mean of all students.
    """

    settings: OKDDipSettings
    family = "online"
    year = 2020
    exchanges = "logits"
    teacher = "allowed"
    min_students = 3

    def build(self) -> None:
        """Make the attention of the peers."""
        *widths, _ = [student.widths[-1] for student in self.cohort]
        self.attention = PeerAttention(widths, self.settings.attention_reduction)

    def forward(self, images: Images) -> Outputs:
        """Run all students and the peers' attention on normalised images."""
        outputs = super().forward(images)
        features = [self._held(feature_map.mean(dim=(2, 3))) for feature_map in outputs.feature_maps[:-1]]
        return replace(outputs, extras={"log_attention": self.attention(features)})

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<j>` and `kl/peers->student<j>` of each student."""
        terms = cross_entropy_terms(outputs.logits, labels)
        pairs = kl_pairs("peers", outputs.logits, self.targets(outputs))
        # `targets` has detached the peers where asked for; the attention must learn through the targets.
        return terms | ramped_kl(pairs, labels, progress, self.settings, detach=False)

    def targets(self, outputs: Outputs) -> list[Logits]:
        """Compute each student's teacher logits: a weighted mean for each peer, the mean for the leader."""
        peers = [self._held(logits) for logits in outputs.logits[:-1]]
        rows = outputs.extras["log_attention"].unbind(dim=1)
        of, temperature = self.settings.ensemble_of, self.settings.temperature
        return [*(ensemble(peers, of, temperature, row) for row in rows), ensemble(peers, of, temperature)]

    def _held(self, teaching: Tensor) -> Tensor:
        return teaching.detach() if self.settings.detach_teachers else teaching
