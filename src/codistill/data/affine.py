"""The normalisation of images as one operation: a factor and a shift for each channel."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from codistill.core.errors import DataError

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel, in units of the full range (0..1)."""


def usable(statistics: Statistics) -> bool:
    """Whether images can be normalised so: numbers, and deviations above 0."""
    mean, std = statistics
    return all(map(math.isfinite, (*mean, *std))) and min(std) > 0


class Affine(nn.Module):
    """Compute scale * x + shift, with one factor and one summand per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Float[Tensor, " channel"], shift: Float[Tensor, " channel"]) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float().reshape(1, -1, 1, 1))
        self.register_buffer("shift", shift.float().reshape(1, -1, 1, 1))

    @classmethod
    def normalise(cls, statistics: Statistics) -> "Affine":
        """Make the map from pixels, 0 to 255, to normalised images; DataError where a deviation is not above 0."""
        if not usable(statistics):
            found = " and std ".join(str(list(each)) for each in statistics)
            raise DataError(f"normalisation by mean {found}: all must be numbers, and each std above 0")
        mean, std = torch.tensor(statistics, dtype=torch.float64)
        return cls(1 / (255 * std), -mean / std)

    @classmethod
    def renormalise(cls, given: Statistics, wanted: Statistics) -> "Affine":
        """Make the map from images in one normalisation to those in another."""
        (mean, std), (own_mean, own_std) = torch.tensor([given, wanted], dtype=torch.float64)
        return cls(std / own_std, (mean - own_mean) / own_std)

    def forward(
        self, images: Shaped[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Map images; the memory format stays."""
        return images * self.scale + self.shift
