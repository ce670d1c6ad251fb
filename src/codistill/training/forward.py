"""The forward pass of a training step: casts of weights and counters of batches are done once for all layers."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from codistill.core.device import autocast
from codistill.methods import Method
from codistill.methods.cohort import Outputs
from codistill.networks.layers import BatchNormAct2d

CAST_INPUTS = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)}


class TrainingForward:
    """Run a method for training, in bf16 autocast or in float32.

    A small network's step is a chain of launches of a few microseconds each. Autocast adds one for each weight forward
    and one backward, and batch normalisation one for its counter of batches; here all weights of convolutions and
    linear layers are cast together, and all counters counted together. Logits are bitwise equal to autocast's. So are
    gradients, unless a layer is applied twice in one pass: its two gradients are then added in bf16.

    `apart` are groups of parameters that are differentiated one after the other, each from a pass of its own.
    """

    def __init__(self, method: Method, precision: str, apart: Sequence[Sequence[nn.Parameter]] = ()) -> None:
        self.method = method
        self.precision = precision
        self._weights = _lowered(method) if precision == "bf16" else {}
        # What is cast together is differentiated together: not with what is differentiated alone, or not at all.
        frozen = [each for each in self._weights.values() if not each.requires_grad]
        self._groups = _grouped(self._weights.values(), [*apart, frozen])
        self._kept: list[Tensor] = []
        self._norms = [module for module in method.modules() if isinstance(module, _BatchNorm) and _counts(module)]

    def __call__(self, images: Float[Tensor, "*view batch channel height width"]) -> Outputs:
        """Run the method on normalised images."""
        device = images.device
        with autocast(device, self.precision), self._counted():
            if not self._weights:
                outputs: Outputs = self.method(images)
                return outputs
            copies: dict[int, Tensor] = {}
            for group in self._groups:
                copies |= zip(map(id, group), _Cast.apply(*group), strict=True)
            # Kept until the next pass: branches read them on their own streams in the backward pass, and memory that
            # is freed meanwhile would be this stream's to write to at once.
            self._kept = [copy.detach() for copy in copies.values()]
            named = {name: copies[id(weight)] for name, weight in self._weights.items()}
            called: Outputs = functional_call(self.method, named, (images,), tie_weights=False)
            return called

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Keep batch normalisations from counting this batch one by one, and count it for all of them at the end."""
        counters = [norm.num_batches_tracked for norm in self._norms]
        for norm in self._norms:
            norm.num_batches_tracked = None
        try:
            yield
        finally:
            for norm, counter in zip(self._norms, counters, strict=True):
                norm.num_batches_tracked = counter
        counting = [
            each for norm, each in zip(self._norms, counters, strict=True) if norm.training and each is not None
        ]
        if counting:
            torch._foreach_add_(counting, 1)


def _counts(norm: _BatchNorm) -> bool:
    """Whether a batch normalisation counts batches without needing the count; one with a `forward` of its own may."""
    plain = type(norm).forward in (_BatchNorm.forward, BatchNormAct2d.forward)
    return plain and norm.num_batches_tracked is not None and norm.momentum is not None


def _lowered(method: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that autocast casts as they are, each module's under the module's first name.

    A layer with a `forward` of its own, or with `weight_norm`, computes its weight from them before, in float32.
    """
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in method.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear)) and type(module).forward in CAST_INPUTS
        for name, parameter in module.named_parameters(recurse=False)
        if name in ("weight", "bias") and parameter.dtype == torch.float32
    }


def _grouped(weights: Iterable[nn.Parameter], groups: Iterable[Iterable[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Return the weights by the first group that they are in; those that are in none come last."""
    left = {id(each): each for each in weights}
    divided = [[left.pop(id(each)) for each in group if id(each) in left] for group in groups]
    return [group for group in (*divided, list(left.values())) if group]


class _Cast(torch.autograd.Function):
    """Cast float32 tensors to bf16 in one launch, and their gradients back in another one."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _cast(tensors, torch.bfloat16)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [gradient for gradient in gradients if gradient is not None]
        cast = iter(_cast(there, torch.float32) if there else ())
        return tuple(None if gradient is None else next(cast) for gradient in gradients)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(each, dtype=dtype) for each in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
