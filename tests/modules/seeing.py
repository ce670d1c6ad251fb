"""What a part of a block's output sees of its input."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIDE = 13


def positive(block: nn.Module) -> nn.Module:
    """Make weights positive, so that no ReLU hides what is seen; in evaluation mode, in float64."""
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.abs_()
    return block.double().eval()


def field_of(compute: Callable[[Tensor], Tensor], channels: int, part: slice = slice(None)) -> int:
    """Return the side of the square in which a part of the output answers to one pixel, whatever its channel."""
    impulses = torch.zeros(channels, channels, SIDE, SIDE, dtype=torch.float64)
    for channel in range(channels):
        impulses[channel, channel, SIDE // 2, SIDE // 2] = 1.0
    still = compute(torch.zeros_like(impulses[:1]))
    answered = ((compute(impulses) - still)[:, part].abs() > 1e-12).any(dim=1).any(dim=0)
    rows, columns = (answered.any(axis).nonzero().flatten() for axis in (1, 0))
    height, width = (int(each.max() - each.min()) + 1 for each in (rows, columns))
    assert height == width
    return height


def sees(compute: Callable[[Tensor], Tensor], inputs: list[slice], outputs: list[slice]) -> list[list[bool]]:
    """Return for each group of output channels which groups of input channels it has a gradient to."""
    channels, rows = max(each.stop for each in inputs), []
    for output in outputs:
        maps = torch.rand(1, channels, 6, 6, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(compute(maps)[:, output].sum(), maps)
        rows.append([bool(gradient[:, group].any()) for group in inputs])
    return rows
