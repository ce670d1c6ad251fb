"""Logits, targets and labels for tests of the fused losses, which compute the losses of stock PyTorch in float64."""

import torch
from torch import Tensor

from codistill import losses as stock
from codistill.kernels import losses_of

from . import DEVICE, INTERPRETED

SMALL = (3, 5, 10)
"""Heads, batch and classes."""
# A GPU's exp and log are approximate, and the factor T^2 is up to 64.
NEAR = 2e-5 if INTERPRETED else 1e-4


class Case:
    """Random logits of n heads, targets and labels, and a gradient for each head's loss."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 3.0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.logits = (random(*shape) * size).to(DEVICE, dtype)
        self.targets = (random(*shape) * size).to(DEVICE, dtype)
        self.labels = torch.randint(shape[-1], shape[-2:-1], generator=generator).to(DEVICE)
        self.gradient = random(*shape[:-2]).to(DEVICE)

    def cross_entropy(self, fused: bool) -> tuple[Tensor, ...]:
        """Loss and gradient of the logits; stock ones in float64."""
        (logits,) = leaves(fused, self.logits)
        with losses_of("fused" if fused else "stock"):
            loss = stock.cross_entropy(logits, self.labels)
        return loss.detach(), *torch.autograd.grad(loss, logits, self.gradient.to(loss.dtype))

    def divergence(
        self, fused: bool, temperature: float = 3.0, detach: bool = False, epsilon: float = 0.0
    ) -> tuple[Tensor, ...]:
        """Loss and gradients of logits and, unless it is detached, target; stock ones in float64."""
        logits, targets = leaves(fused, self.logits, self.targets)
        with losses_of("fused" if fused else "stock"):
            loss = stock.soft_target_kl(logits, targets, temperature, detach, epsilon)
        gradients = torch.autograd.grad(loss, [logits, targets], self.gradient.to(loss.dtype), allow_unused=True)
        assert (gradients[1] is None) is detach
        return loss.detach(), *(each for each in gradients if each is not None)


def leaves(fused: bool, *tensors: Tensor) -> list[Tensor]:
    return [each.to(each.dtype if fused else torch.float64, copy=True).requires_grad_() for each in tensors]
