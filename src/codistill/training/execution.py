"""How a training step is executed: one mathematics, several ways to compute it, chosen by fixed rules."""

from dataclasses import dataclass

import torch

from codistill.core.console import warn_once
from codistill.methods import Method
from codistill.settings.config import ExecutionSettings
from codistill.training.compiling import compile_parts, missing_compiler, run_uncompiled

PAID_BACK_STEPS = 100_000
"""Steps from which on a first compilation, about a minute, is less than what it saves, under 1 ms a step."""


@dataclass(frozen=True)
class Execution:
    """One way to compute a step.

    Attributes:
        compiled: Whether torch.compile compiles stages, heads and modules.
        overlap: Whether a captured step's branches run on streams of their own.
    """

    compiled: bool = False
    overlap: bool = False

    def prepare(self, method: Method, device: torch.device, deterministic: bool) -> None:
        """Make a method compute that way, whatever way it computed before.

        Args:
            method: Changed in place; weights, their names and files stay.
            device: Where it will be trained.
            deterministic: As in `ExecutionSettings.deterministic`.

        Raises:
            UsageError: This machine cannot compile.
        """
        if self.compiled:
            compile_parts(method, device, deterministic)
        else:
            run_uncompiled(method)


PLAIN = Execution()
"""Not compiled, on one stream."""


def choose_execution(settings: ExecutionSettings, device: torch.device, runs: int, steps: int) -> Execution:
    """Choose how a run computes its steps.

    Branches run on streams in a run alone on CUDA: several runs fill the device without. `compile` auto compiles on
    CUDA from `PAID_BACK_STEPS` steps on.

    Args:
        settings: The `compile` of a run.
        device: Where it is trained.
        runs: How many runs share the device.
        steps: Training steps of the run.
    """
    compiled = settings.compile == "on"
    if settings.compile == "auto" and device.type == "cuda" and steps >= PAID_BACK_STEPS:
        lack = missing_compiler(device)
        compiled = lack is None
        if lack is not None:
            warn_once(f"compile auto: {lack}; until then this trains without a compiler, perhaps more slowly")
    return Execution(compiled, overlap=device.type == "cuda" and runs == 1)
