"""Cross-entropy and distillation of n heads, each as one kernel forward, one mean, and one kernel backward."""

# mypy: disable-error-code="no-untyped-call"

from typing import Any

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from codistill.kernels.losses_passes import (
    cross_entropy_gradient,
    cross_entropy_rows,
    divergence_gradients,
    divergence_rows,
)
from codistill.kernels.reach import reached
from codistill.losses import LossKernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CLASSES = 4096
"""Classes that a program holds at a time, and with them the most that the kernels take."""
MIN_BLOCK, CLASSES_OF_A_WARP, MAX_WARPS = 32, 256, 8


def takes(*logits: Tensor) -> bool:
    """Say whether the kernels compute losses of such tensors; whatever else comes is for stock PyTorch."""
    return all(
        each.dtype in DTYPES
        and reached(each)
        and each.dim() >= 2
        and each.shape[-1] <= MAX_CLASSES
        and each.numel() > 0
        for each in logits
    )


def cross_entropy(logits: Float[Tensor, "*head batch class"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " *head"]:
    """Compute `losses.cross_entropy` in float32, with a gradient of the type of the logits.

    No host read, nothing random and no atomics: it may be captured in a CUDA graph and repeats to the last bit.

    Args:
        logits: float32, bfloat16 or float16 with at most `MAX_CLASSES` classes.
        labels: From 0 to below the number of classes; any other one makes the loss NaN.

    Raises:
        TypeError: Logits that `takes` does not take.
    """
    _check(logits)
    heads = logits.dim() - 2
    losses: Tensor = _CrossEntropy.apply(logits.contiguous(), _rows(labels.expand(logits.shape[:-1]), heads))
    return losses


def soft_target_kl(
    logits: Float[Tensor, "*head batch class"],
    target_logits: Float[Tensor, "*head batch class"],
    temperature: float,
    detach: bool = True,
    epsilon: float = 0.0,
) -> Float[Tensor, " *head"]:
    """Compute `losses.soft_target_kl` in float32, with gradients of the types of logits and target.

    No host read, nothing random and no atomics: it may be captured in a CUDA graph and repeats to the last bit.

    Args:
        logits: float32, bfloat16 or float16 with at most `MAX_CLASSES` classes.
        target_logits: The same; one target that is expanded to all heads and detached is read as one.
        temperature: T > 0.
        detach: Whether the target side gets no gradient.
        epsilon: Added to the target's probabilities.

    Raises:
        TypeError: Logits or targets that `takes` does not take.
    """
    _check(logits, target_logits)
    logits, target_logits = torch.broadcast_tensors(logits, target_logits.detach() if detach else target_logits)
    learning = torch.is_grad_enabled() and target_logits.requires_grad
    target_logits = target_logits.contiguous() if learning else _rows(target_logits, logits.dim() - 2)
    losses: Tensor = _SoftTargetKL.apply(logits.contiguous(), target_logits, float(temperature), float(epsilon))
    return losses


FUSED = LossKernels(takes, cross_entropy, soft_target_kl)
"""What `losses.computed_by` is given."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
        with torch.cuda.device_of(logits):
            cross_entropy_rows[(losses.numel(),)](
                logits, labels, losses, logits.shape[-1], labels.numel(), **_blocks(logits)
            )
        ctx.save_for_backward(logits, labels)
        return losses.mean(dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        batch, classes = logits.shape[-2:]
        logits_gradient = torch.empty_like(logits)
        with torch.cuda.device_of(logits):
            cross_entropy_gradient[(logits.numel() // classes,)](
                logits,
                labels,
                gradient.contiguous(),
                logits_gradient,
                classes,
                labels.numel(),
                batch,
                1 / batch,
                **_blocks(logits),
            )
        return logits_gradient, None


class _SoftTargetKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, epsilon: float) -> Tensor:
        losses = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
        classes = logits.shape[-1]
        ctx.sizes = classes, targets.numel() // classes
        ctx.temperature, ctx.epsilon = temperature, epsilon
        with torch.cuda.device_of(logits):
            divergence_rows[(losses.numel(),)](
                logits,
                targets,
                losses,
                *ctx.sizes,
                temperature,
                epsilon,
                temperature**2,
                HAS_EPSILON=epsilon != 0,
                **_blocks(logits),
            )
        ctx.save_for_backward(logits, targets)
        return losses.mean(dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        batch, classes = logits.shape[-2:]
        learning = ctx.needs_input_grad[1]
        logits_gradient = torch.empty_like(logits)
        targets_gradient = torch.empty_like(targets) if learning else None
        with torch.cuda.device_of(logits):
            divergence_gradients[(logits.numel() // classes,)](
                logits,
                targets,
                gradient.contiguous(),
                logits_gradient,
                targets_gradient if learning else logits_gradient,
                *ctx.sizes,
                batch,
                ctx.temperature,
                ctx.epsilon,
                ctx.temperature / batch,  # T^2, and 1 / T of the softened scores
                HAS_EPSILON=ctx.epsilon != 0,
                LEARNING_TARGETS=learning,
                **_blocks(logits),
            )
        return logits_gradient, targets_gradient, None, None


def _check(*logits: Tensor) -> None:
    if not takes(*logits):
        found = ", ".join(f"{each.dtype} {list(each.shape)} on {each.device}" for each in logits)
        raise TypeError(
            f"fused losses take float32, bfloat16 or float16 on CUDA, at least 1 row and at most {MAX_CLASSES} "
            f"classes, not {found}"
        )


def _rows(tensor: Tensor, heads: int) -> Tensor:
    """Make contiguous what gets no gradient; what is expanded to all heads comes without their axes."""
    shared = all(tensor.shape[axis] == 1 or tensor.stride(axis) == 0 for axis in range(heads))
    return (tensor[(0,) * heads] if shared else tensor).contiguous()


def _blocks(logits: Tensor) -> dict[str, int]:
    """Give the compile-time sizes of a program that holds one row."""
    block = max(MIN_BLOCK, triton.next_power_of_2(logits.shape[-1]))
    return {"BLOCK_CLASSES": block, "num_warps": min(MAX_WARPS, max(1, block // CLASSES_OF_A_WARP))}
