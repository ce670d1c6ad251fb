"""Independent training: the baseline of every table."""

from dataclasses import dataclass

from codistill.methods.cohort import Outputs
from codistill.methods.losses import Labels, Scalar, Terms
from codistill.methods.method import METHODS, Method, MethodSettings
from codistill.methods.terms import cross_entropy_terms


@dataclass(frozen=True, kw_only=True)
class IndependentSettings(MethodSettings):
    """Settings of independent training."""

    shared_stages: int | None = 0
    """Low stages that the students share. 0: nothing, so that each trains as if it were alone."""


@METHODS.register("independent")
class Independent(Method):
    """Each student learns from the labels alone: loss = sum_j CE(z_j).

    Source: the baseline column of MFEF (ICANN 2022), Table 1. One student or several side by side.
    """

    settings: IndependentSettings
    family = "baseline"

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student<j>` for each student."""
        return cross_entropy_terms(outputs.logits, labels)
