"""Cheap convolutions: what stands in place of a 3x3 convolution, so that a network has a tenth of its weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.layers import BatchNormAct2d, conv

Cheap = Literal["depthwise", "group", "shift"]


class Shift(nn.Module):
    """Move each channel by at most one pixel in each direction; what comes in from outside is zero.

    Channel c below 9 floor(C / 9) moves by c % 3 - 1 pixels to the right and c // 3 % 3 - 1 down; the others stay. It
    is a depthwise 3x3 convolution with constant weights, one 1 each, which are no parameters and not in the state_dict.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        channel = torch.arange(channels)
        moved = channel < channels // 9 * 9
        row, column = (torch.where(moved, 2 - part % 3, 1) for part in (channel // 3, channel))
        weight = torch.zeros(channels, 1, 3, 3)
        weight[channel, 0, row, column] = 1.0
        self.weight: Tensor
        self.register_buffer("weight", weight, persistent=False)

    def forward(
        self, features: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Shift the channels."""
        return F.conv2d(features, self.weight, padding=1, groups=len(self.weight))

    def extra_repr(self) -> str:
        """Return the number of channels; students share stages whose descriptions are equal."""
        return str(len(self.weight))


def cheap_unit(kind: Cheap, in_channels: int, out_channels: int, stride: int, groups: int) -> nn.Sequential:
    """Make a spatial part that costs little, a 1x1 convolution that has the stride, batch normalisation and ReLU.

    The spatial part keeps channels and size: a depthwise 3x3 convolution (9 C weights), one of groups (9 C^2 / groups),
    or a shift (none).

    Source: Xie et al., "Training Convolutional Neural Networks with Cheap Convolutions and Online Distillation",
        arXiv 1909.13063; authors' code EthanZhangYC/OD-cheap-convolution at a405c9e.
    """
    spatial = (
        Shift(in_channels)
        if kind == "shift"
        else conv(in_channels, in_channels, 3, groups=in_channels if kind == "depthwise" else groups)
    )
    return nn.Sequential(spatial, conv(in_channels, out_channels, 1, stride), BatchNormAct2d(out_channels))
