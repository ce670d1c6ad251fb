"""KD: knowledge distillation from a frozen teacher."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.independent import IndependentSettings
from codistill.methods.losses import soft_target_kl
from codistill.methods.method import METHODS, Method
from codistill.methods.terms import cross_entropy_terms


def teacher_terms(outputs: Outputs, weight: float, temperature: float) -> dict[str, Float[Tensor, ""]]:
    """Compute b T^2 KL(softmax(z_t / T) || softmax(z_j / T)) of each student j with the teacher t.

    Args:
        outputs: With teacher logits z_t: one for all students, or one per student where each has a view of its own.
        weight: b, at least 0.
        temperature: T > 0.

    Returns:
        `kl/teacher->student<j>` for each student, in nats.
    """
    teacher = outputs.teacher_logits
    if teacher is None:
        raise ValueError("the outputs have no teacher logits: they were computed in evaluation mode")
    students = torch.stack(list(outputs.logits))
    divergences = weight * soft_target_kl(students, teacher.expand_as(students), temperature)
    return {f"kl/teacher->student{index}": each for index, each in enumerate(divergences.unbind())}


@dataclass(frozen=True, kw_only=True)
class KDSettings(IndependentSettings):
    """Settings of knowledge distillation; temperature and weight of the teacher are the run's teacher_*."""

    ce_weight: float = 1.0
    """a, the factor on the cross-entropy with the labels; RepDistiller has 0.1 beside teacher_weight 0.9."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ce_weight < float("inf"):
            raise UsageError(f"method.ce_weight is {self.ce_weight}; it must be at least 0")


@METHODS.register("kd")
class KD(Method):
    """Each student learns from the labels and from a frozen teacher.

        sum_j [ a CE(z_j) + b T^2 KL(softmax(z_t / T) || softmax(z_j / T)) ]

    The second term is `teacher_terms`, which `WithTeacher` adds to the losses of any method that is given a teacher.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Weights a = b = 1 and T = 3
        as in DefangChen/OKDDip-AAAI2020 at c6a05de, train_kd.py; MFEF (ICANN 2022) prints none.
    Differs: HobbitLong/RepDistiller weights 0.1 and 0.9 with T = 4: --method.ce-weight 0.1 --teacher-weight 0.9
        --teacher-temperature 4.
    """

    settings: KDSettings
    teacher = "required"

    def losses(
        self, outputs: Outputs, labels: Int[Tensor, " batch"], progress: Float[Tensor, ""]
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute a CE(z_j), `ce/student<j>`, of each student; see `Method.losses`."""
        terms = cross_entropy_terms(outputs.logits, labels)
        return {name: self.settings.ce_weight * value for name, value in terms.items()}
