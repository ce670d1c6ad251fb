"""Pyramidal convolution: kernels of several sizes over the whole map, side by side."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.networks.layers import BatchNormAct2d, conv, initialise

KERNELS, GROUPS = (3, 5, 7, 9), (1, 4, 8, 16)
SHARES = {1: (1,), 2: (2, 2), 3: (4, 4, 2), 4: (4, 4, 4, 4)}
"""By the number of levels, the part of all output channels, 1 / n, that each level makes."""


def level_widths(channels: int, levels: int) -> list[int]:
    """Return the output channels of each level; those of the later ones are multiples of 4, unless they are less."""
    later = [channels // share for share in SHARES[levels][1:]]
    later = [width - width % 4 if width > 4 else width for width in later]
    return [channels - sum(later), *later]


class Pyramid(nn.Module):
    """The convolutions of `PyConv` and `PSA`, without what follows them: one map for each level.

    Each level convolves all channels with a kernel of its own size: 3, 5, 7 and 9, in 1, 4, 8 and 16 groups. Where
    these do not divide the channels, it has the most groups below that do.

    Args:
        channels: C of the input, and of all outputs together.
        levels: 1 to 4.

    Attributes:
        widths: Output channels of each level.

    Raises:
        UsageError: Another number of levels, or fewer channels than levels.
    """

    def __init__(self, channels: int, levels: int = 4) -> None:
        super().__init__()
        if levels not in SHARES:
            raise UsageError(f"pyramid: levels is {levels}; it must be from 1 to {len(SHARES)}")
        if channels < max(SHARES[levels]):
            raise UsageError(f"pyramid: {levels} levels need at least {max(SHARES[levels])} channels, got {channels}")
        self.widths = level_widths(channels, levels)
        self.levels = nn.ModuleList(
            conv(channels, width, kernel, groups=math.gcd(groups, channels, width))
            for width, kernel, groups in zip(self.widths, KERNELS, GROUPS, strict=False)
        )
        initialise(self)

    def forward(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> list[Float[Tensor, "batch _level_channel height width"]]:
        """Return the map of each level."""
        return [level(feature_map) for level in self.levels]


class PyConv(nn.Module):
    """Convolve a feature map with kernels of 3, 5, 7 and 9 pixels, each for a part of the output channels.

    concat(level_1(x), .., level_n(x)), then BN and ReLU. With four levels, each makes C / 4 channels and has 1, 4, 8 or
    16 groups: 6.609375 C^2 weights where 64 divides C, against the 9 C^2 of a 3x3 convolution.

    Args:
        channels: C of the input and the output.
        levels: 1 to 4. The authors' networks have 4 on maps of 56 pixels, 3 (C/4, C/4, C/2) on 28, 2 (C/2 each) on 14
            and 1 on 7.

    Raises:
        UsageError: Another number of levels, or fewer channels than levels.

    Source: Duta, Liu, Zhu, Shao, "Pyramidal Convolution", arXiv 2006.11538; authors' code iduta/pyconv at d8b39cf,
        models/pyconvresnet.py.
    Differs: their code needs channels that its groups divide. Here the levels behind the first make multiples of 4
        channels and the first one the rest, and each has the largest divisor of its groups that divides input and
        output: 132 channels become 36, 32, 32 and 32, in 1, 4, 4 and 4 groups.
    """

    def __init__(self, channels: int, levels: int = 4) -> None:
        super().__init__()
        self.pyramid = Pyramid(channels, levels)
        self.norm = BatchNormAct2d(channels)

    def forward(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return a map of the same shape whose channels have several receptive fields."""
        normed: Tensor = self.norm(torch.cat(self.pyramid(feature_map), dim=1))
        return normed
