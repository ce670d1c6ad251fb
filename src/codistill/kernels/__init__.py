"""Kernels beyond PyTorch's own, in Triton; each computes what stock layers compute, rounded less often."""

import contextlib
from importlib.util import find_spec

import torch
from torch import nn

from codistill.errors import UsageError
from codistill.losses import computed_by
from codistill.modules import DualAttention
from codistill.networks.network import Layers


def use_fused(method: nn.Module, device: torch.device) -> int:
    """Let a method's `Layers` and `DualAttention` modules compute in fused kernels, in training mode.

    Of `Layers` that is batch normalisation, shortcut and ReLU, but not a normalisation without momentum, weight or
    running statistics; of attention all of it, but not where it has a normalisation, nor where a map is too large.
    Weights, their names and files stay as they are, and evaluation mode stays stock.

    Args:
        method: A method or a network.
        device: Where it is trained.

    Returns:
        How many normalisations and attention modules this concerns.

    Raises:
        UsageError: No CUDA device, or no Triton.
    """
    if device.type != "cuda":
        raise UsageError(f"kernels fused: they need a CUDA device, not {device}: use --kernels stock")
    if find_spec("triton") is None:
        raise UsageError("kernels fused: there is no Triton: pip install triton, or use --kernels stock")
    return install_fused(method)


def install_fused(method: nn.Module) -> int:
    """Do what `use_fused` does, on any device; a CPU needs Triton's interpreter."""
    from codistill.kernels.attention import attended
    from codistill.kernels.batch_norm import normalised, takes

    every = [layers for layers in method.modules() if isinstance(layers, Layers)]
    norms = [layer for layers in every for layer in layers if isinstance(layer, nn.BatchNorm2d) and takes(layer)]
    attentions = [each for each in method.modules() if isinstance(each, DualAttention) and len(each.spatial) == 1]
    for layers in every:
        layers.normalise = normalised
    for attention in attentions:
        attention.attend = attended
    return len(norms) + len(attentions)


def use_stock(method: nn.Module) -> None:
    """Let a method compute as it was built, whatever it computed with before."""
    for module in method.modules():
        for hook in ("normalise", "attend"):
            vars(module).pop(hook, None)


def losses_of(kernels: str) -> contextlib.AbstractContextManager[None]:
    """Compute the losses within this block by what an execution's kernels say.

    Args:
        kernels: stock, or fused: on CUDA by own kernels, on a CPU only in Triton's interpreter.
    """
    if kernels != "fused":
        return computed_by(None)
    from codistill.kernels.losses import FUSED

    return computed_by(FUSED)
