"""DML: deep mutual learning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.losses import Labels, Scalar, Terms, mean_logits
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import DistillationSettings, cross_entropy_terms, ramped_kl, weighted


@dataclass(frozen=True, kw_only=True)
class DMLSettings(DistillationSettings):
    """Settings of deep mutual learning."""

    shared_stages: int | None = 0
    """Low stages that the students share. 0: nothing, as in DML."""
    temperature: float = 3.0
    """T of the distillation terms, > 0, with the factor T^2; the paper's is 1."""
    target: Literal["pairwise", "mean"] = "pairwise"
    """Teacher of a student: each peer in a term of its own, or the mean of all its peers' logits in one term. The same
    for two students."""
    divide_by_peers: bool = True
    """Whether pairwise terms are divided by the number of peers, as in the paper; the authors' code adds them up."""
    update: Literal["simultaneous", "alternating"] = "simultaneous"
    """Whether all students take their step after one forward pass, or one after the other, each after a fresh one.
    Alternating needs n forward passes of n students a step, and students that share nothing."""
    ramp_up: float = 0.0
    """Share of the training over which the distillation terms grow to full weight; 0: at once, as in DML."""


@METHODS.register("dml")
class DML(Method):
    """Students teach each other: each learns from the labels and from the predictions of its peers.

        sum_i [ CE(z_i) + r(t) T^2 / (n - 1) sum_{j != i} KL(z_j -> z_i) ],

    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)) with a detached; r is 1 unless `ramp_up` is set. With target
    `mean` one term, KL(mean_{j != i} z_j -> z_i), stands in place of the mean over the peers.

    Args:
        students: At least two networks, of any kind.

    Raises:
        UsageError: Fewer than two students, or alternating updates of students that share stages.

    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018, arXiv 1706.00384; authors' code
        YingZhangDUT/Deep-Mutual-Learning, train_models.py. Target `mean`: DefangChen/OKDDip-AAAI2020 at c6a05de,
        train_DML.py.
    Differs: the authors have T = 1, and update the students in turn, each on a batch of its own; their code does not
        divide by n - 1. Here the default is the form that later papers compare with: T = 3 with T^2, one step for all.
        In turn (`update` alternating), all students see the same batch, as in the paper's Algorithm 1.
    """

    settings: DMLSettings
    family = "online"
    year = 2018
    exchanges = "logits"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Refuse alternating updates of students that share stages."""
        if self.settings.update == "alternating" and self.cohort.shared_stages:
            raise UsageError(
                f"dml: students that alternate cannot share stages, but these share {self.cohort.shared_stages}: "
                "set method.shared_stages to 0, or method.update to simultaneous"
            )

    def alternating_updates(self) -> Sequence[Sequence[nn.Parameter]]:
        """Return the parameters of each student if they alternate; see `Method.alternating_updates`."""
        if self.settings.update == "simultaneous":
            return ()
        return [tuple(student.parameters()) for student in self.cohort]

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<i>`, and `kl/student<j>->student<i>` or `kl/peers->student<i>`."""
        settings, count = self.settings, len(self.cohort)
        terms = cross_entropy_terms(outputs.logits, labels)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for index, logits in enumerate(outputs.logits):
            targets = {f"student{peer}": each for peer, each in enumerate(outputs.logits) if peer != index}
            if settings.target == "mean":
                targets = {"peers": mean_logits(list(targets.values()))}
            pairs |= {f"kl/{name}->student{index}": (logits, target) for name, target in targets.items()}
        share = 1 / (count - 1) if settings.divide_by_peers and settings.target != "mean" else 1.0
        divergences = ramped_kl(pairs, labels, progress, settings, settings.detach_teachers)
        return terms | weighted(share, divergences)
