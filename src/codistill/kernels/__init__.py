"""Kernels beyond PyTorch's own, in Triton; each computes what stock layers compute, rounded less often."""

from importlib.util import find_spec

import torch
from torch import nn

from codistill.errors import UsageError
from codistill.networks.network import Layers


def use_fused(method: nn.Module, device: torch.device) -> int:
    """Let all `Layers` of a method compute batch normalisation, shortcut and ReLU in fused kernels, in training mode.

    Weights, their names and files stay as they are, and evaluation mode stays stock.

    Args:
        method: A method or a network.
        device: Where it is trained.

    Returns:
        How many normalisations this concerns.

    Raises:
        UsageError: No CUDA device, no Triton, nothing to fuse, or a normalisation that the kernels do not know.
    """
    if device.type != "cuda":
        raise UsageError(f"kernels fused: they need a CUDA device, not {device}: use --kernels stock")
    if find_spec("triton") is None:
        raise UsageError("kernels fused: there is no Triton: pip install triton, or use --kernels stock")
    return install_fused(method)


def install_fused(method: nn.Module) -> int:
    """Do what `use_fused` does, on any device; a CPU needs Triton's interpreter.

    Raises:
        UsageError: Nothing to fuse, or a normalisation that the kernels do not know.
    """
    from codistill.kernels.batch_norm import normalised

    every = [layers for layers in method.modules() if isinstance(layers, Layers)]
    norms = [layer for layers in every for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        if norm.momentum is None or not norm.affine or not norm.track_running_stats:
            raise UsageError(
                f"kernels fused: {norm} needs momentum, weight and running statistics: use --kernels stock"
            )
    if not norms:
        raise UsageError("kernels fused: these networks have no layers that could be fused: use --kernels stock")
    for layers in every:
        layers.normalise = normalised
    return len(norms)
