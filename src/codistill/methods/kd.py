"""KD: knowledge distillation from a frozen teacher."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.independent import IndependentSettings
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import cross_entropy_terms


@dataclass(frozen=True, kw_only=True)
class KDSettings(IndependentSettings):
    """Settings of knowledge distillation; temperature and weight of the teacher are the run's teacher_*."""

    label_weight: float = 1.0
    """Factor on the cross-entropy with the labels; RepDistiller has 0.1 beside teacher_weight 0.9."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_weight < float("inf"):
            raise UsageError(f"method.label_weight is {self.label_weight}; it must be at least 0")


@METHODS.register("kd")
class KD(Method):
    """Each student learns from the labels and from a frozen teacher: loss = sum_j [a CE(z_j) + b T^2 KL(z_t -> z_j)].

    The terms of the teacher are added by `WithTeacher`, as for every method that is given a teacher.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Weights a = b = 1 and T = 3
        as in DefangChen/OKDDip-AAAI2020 at c6a05de, train_kd.py; MFEF (ICANN 2022) prints none.
    Differs: HobbitLong/RepDistiller weights 0.1 and 0.9 with T = 4: --method.label-weight 0.1 --teacher-weight 0.9
        --teacher-temperature 4.
    """

    name = "kd"
    Settings = KDSettings
    teacher = "required"
    settings: KDSettings

    def losses(
        self, outputs: Outputs, labels: Int[Tensor, " batch"], progress: Float[Tensor, ""]
    ) -> dict[str, Float[Tensor, ""]]:
        """Give the weighted `ce/student<j>` of each student; see `Method.losses`."""
        terms = cross_entropy_terms(outputs.logits, labels)
        return {name: self.settings.label_weight * value for name, value in terms.items()}
