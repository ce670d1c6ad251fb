"""How a training step is executed: one mathematics, several ways to compute it."""

from dataclasses import dataclass

import torch

from codistill.compiling import compile_parts, missing_compiler, run_uncompiled
from codistill.config import Kernels, TrainSettings
from codistill.kernels import use_fused, use_stock
from codistill.methods import Method
from codistill.notices import warn_once

PAID_BACK_STEPS = 100_000
"""Steps from which on a first compilation, about a minute, is less than what it saves, under 1 ms a step."""


@dataclass(frozen=True)
class Execution:
    """One way to compute a step.

    Attributes:
        kernels: PyTorch's own, or fused ones.
        compiled: Whether torch.compile compiles stages, heads and modules.
        overlap: Whether a captured step's branches, and its gradients of weights, run on streams of their own.
    """

    kernels: Kernels = "stock"
    compiled: bool = False
    overlap: bool = False

    def prepare(self, method: Method, device: torch.device, deterministic: bool) -> None:
        """Let a method compute that way, whatever way it computed before.

        Args:
            method: Changed in place; weights, their names and files stay.
            device: Where it will be trained.
            deterministic: As in `TrainSettings.deterministic`.

        Raises:
            UsageError: The method or this machine cannot.
        """
        if self.kernels == "fused":
            use_fused(method, device)
        else:
            use_stock(method)
        if self.compiled:
            compile_parts(method, device, deterministic)
        else:
            run_uncompiled(method)

    def __str__(self) -> str:
        parts = [f"{self.kernels} kernels"] + ["compiled"] * self.compiled + ["overlapping streams"] * self.overlap
        return ", ".join(parts)


PLAIN = Execution()
"""PyTorch's own kernels, one after the other."""


def as_asked(settings: TrainSettings, device: torch.device, runs: int) -> Execution:
    """Give the execution that settings name; where they leave the choice, the one that needs no measurement.

    Args:
        settings: Their `kernels`, `compile` and `overlap`.
        device: Where is trained.
        runs: How many runs share the device: several fill it without overlap within each.
    """
    captured = device.type == "cuda" and settings.processes == 1
    return Execution(
        kernels="fused" if settings.kernels == "fused" else "stock",
        compiled=settings.compile == "on",
        overlap=captured and (runs == 1 if settings.overlap == "auto" else settings.overlap == "on"),
    )


def choices(settings: TrainSettings, device: torch.device, runs: int, steps: int) -> list[Execution]:
    """List the executions that settings leave open, `as_asked` first; one where there is nothing to choose.

    On a CPU and where results must repeat there is not: a choice by time may be another one next time.

    Args:
        settings: See `as_asked`.
        device: See `as_asked`.
        runs: See `as_asked`.
        steps: Training steps of the run; compilation has to be paid back.
    """
    first = as_asked(settings, device, runs)
    if device.type != "cuda" or settings.deterministic or settings.processes > 1:
        return [first]
    kernels: tuple[Kernels, ...] = ("stock", "fused") if settings.kernels == "auto" else (first.kernels,)
    overlaps = (first.overlap, not first.overlap) if settings.overlap == "auto" else (first.overlap,)
    if first.compiled:
        return [Execution("stock", True, overlap) for overlap in overlaps]
    listed = [Execution(kernel, False, overlap) for kernel in kernels for overlap in overlaps]
    if settings.compile == "auto" and settings.kernels != "fused" and steps >= PAID_BACK_STEPS:
        lack = missing_compiler(device)
        if lack is None:
            listed += [Execution("stock", True, overlap) for overlap in overlaps]
        else:
            warn_once(f"compile auto: {lack}; until then this trains without a compiler, perhaps more slowly")
    return listed
