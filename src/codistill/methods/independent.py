"""Independent training: the baseline of every table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codistill.cohort import Outputs
from codistill.losses import cross_entropy
from codistill.methods.method import METHODS, Method, MethodSettings


@dataclass(frozen=True, kw_only=True)
class IndependentSettings(MethodSettings):
    """Settings of independent training."""

    shared_stages: int | None = 0
    """Low stages that the students share. 0: nothing, so that each trains as if it were alone."""


def cross_entropy_terms(
    logits: Sequence[Float[Tensor, "batch class"]],
    labels: Int[Tensor, " batch"],
    **others: Float[Tensor, "batch class"],
) -> dict[str, Float[Tensor, ""]]:
    """Give the term `ce/student<j>` of each student and `ce/<name>` of each other head, all at once."""
    names = [*(f"student{index}" for index in range(len(logits))), *others]
    losses = cross_entropy(torch.stack([*logits, *others.values()]), labels)
    return {f"ce/{name}": loss for name, loss in zip(names, losses.unbind(), strict=True)}


@METHODS.register("independent")
class Independent(Method):
    """Each student learns from the labels alone: loss = sum_j CE(z_j).

    Source: the baseline column of MFEF (ICANN 2022), Table 1. One student or several side by side.
    """

    name = "independent"
    Settings = IndependentSettings

    def losses(
        self, outputs: Outputs, labels: Int[Tensor, " batch"], progress: Float[Tensor, ""]
    ) -> dict[str, Float[Tensor, ""]]:
        """Give `ce/student<j>` for each student; see `Method.losses`."""
        return cross_entropy_terms(outputs.logits, labels)
