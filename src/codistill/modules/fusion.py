"""Feature fusion: one classifier on the concatenated feature maps of all students; MFEF's third component."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.networks.layers import BatchNormAct2d, PooledLinear, conv_bn_act, initialise

Projection = Literal["pointwise", "each"]
MapShape = tuple[int, int, int]


def convolutional_regressor(channels: int, size: tuple[int, int], target: tuple[int, int]) -> nn.Module:
    """Make the layer that brings a feature map to a smaller height and width; channels are kept.

    In each direction: kernel 3, stride 1, padding 1 where the lengths agree; 3 with stride 2 where the map is
    twice (or twice less one) as long; else an unpadded kernel of length - target + 1. BN and ReLU follow.

    Source: Romero et al., "FitNets", arXiv 1412.6550; shape rule after RepDistiller, models/util.py. MFEF and FFL name
        a "convolutional regressor" and give no details; no pair of networks in their papers needs one.
    """

    def direction(length: int, wanted: int) -> tuple[int, int, int]:
        if length == wanted:
            return 3, 1, 1
        if (length + 1) // 2 == wanted:
            return 3, 2, 1
        return length - wanted + 1, 1, 0

    (kh, sh, ph), (kw, sw, pw) = (direction(a, b) for a, b in zip(size, target, strict=True))
    conv = nn.Conv2d(channels, channels, (kh, kw), (sh, sw), (ph, pw), bias=False)
    return nn.Sequential(conv, BatchNormAct2d(channels))


class FeatureFusion(nn.Module):
    """Fuse the feature maps of n students and classify the result.

    concat -> depthwise 3x3 + BN + ReLU -> pointwise 1x1 (sum of the widths -> smallest width) + BN + ReLU -> mean over
    places -> linear. Maps that are larger than the smallest height and width pass a convolutional regressor first.

    Args:
        shapes: (channels, height, width) of each student's map, at least two.
        num_classes: Number of logits.
        projection: Where unlike widths are projected to the smallest one: by the pointwise convolution after
            concatenation, or by a 1x1 convolution + BN + ReLU on each wider map before it.

    Raises:
        UsageError: Fewer than two maps.

    Source: Kim et al., "Feature Fusion for Online Mutual Knowledge Distillation", arXiv 1904.09058; authors' code
        Jangho-Kim/FFL-pytorch at 546d478, our_network.py. MFEF (ICANN 2022), section 3.2, "Feature Fusion".
    Differs: FFL's code knows two students of equal shape; widths are summed as in SJLeo/FFSD, models/fusion_module.py.
    """

    def __init__(self, shapes: Sequence[MapShape], num_classes: int, projection: Projection = "pointwise") -> None:
        super().__init__()
        if len(shapes) < 2:
            raise UsageError(f"feature fusion needs the maps of at least 2 students, got {len(shapes)}")
        height, width = min(shape[1] for shape in shapes), min(shape[2] for shape in shapes)
        smallest = min(shape[0] for shape in shapes)
        adapters, widths = [], []
        for channels, *size in shapes:
            layers: list[nn.Module] = []
            if tuple(size) != (height, width):
                layers.append(convolutional_regressor(channels, (size[0], size[1]), (height, width)))
            if projection == "each" and channels != smallest:
                layers.append(conv_bn_act(channels, smallest, 1))
                channels = smallest
            adapters.append(nn.Sequential(*layers))
            widths.append(channels)
        total = sum(widths)
        self.adapters = nn.ModuleList(adapters)
        self.transfer = nn.Sequential(conv_bn_act(total, total, 3, groups=total), conv_bn_act(total, smallest, 1))
        self.head = PooledLinear(smallest, num_classes)
        initialise(self)

    def fuse(
        self, feature_maps: Sequence[Float[Tensor, "batch _channel _height _width"]]
    ) -> Float[Tensor, "batch channel height width"]:
        """Map one feature map per student to the fused map."""
        alike = [adapter(feature_map) for adapter, feature_map in zip(self.adapters, feature_maps, strict=True)]
        fused: Tensor = self.transfer(torch.cat(alike, dim=1))
        return fused

    def forward(
        self, feature_maps: Sequence[Float[Tensor, "batch _channel _height _width"]]
    ) -> Float[Tensor, "batch class"]:
        """Map one feature map per student to the fused logits."""
        logits: Tensor = self.head(self.fuse(feature_maps))
        return logits
