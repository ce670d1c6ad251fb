"""Atrous spatial pyramid pooling: dilated convolutions and the mean of the map, side by side."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.networks.layers import BatchNormAct2d, conv, conv_bn_act, initialise


class ASPP(nn.Module):
    """See a feature map at several dilations and as a whole, and project what is seen to as many channels.

    Branches of C / 4 channels each: a 1x1 convolution, a 3x3 convolution for each dilation, and the mean over places
    with a 1x1 convolution, the same at all places. Then a 1x1 convolution to C. BN and ReLU follow every convolution.
    With three dilations that makes 8.5 C^2 weights where 4 divides C.

    Args:
        channels: C of the input and the output.
        dilations: Of the 3x3 convolutions, pixels, each at least 1; one as long as the map leaves its centre alone.

    Raises:
        UsageError: A dilation below 1.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv 1706.05587, after
        "DeepLab", arXiv 1606.00915; torchvision, models/segmentation/deeplabv3.py.
    Differs: dilations 1, 2 and 3, for maps of 4 to 16 pixels, in place of 6 and more; branches of C / 4 channels in
        place of 256; no dropout. The mean's batch normalisation comes after the spreading over all places, not before:
        it has the same statistics, and takes a batch of one image too.
    """

    def __init__(self, channels: int, dilations: Sequence[int] = (1, 2, 3)) -> None:
        super().__init__()
        if not dilations or min(dilations) < 1:
            raise UsageError(f"aspp: dilations are {list(dilations)}; name at least one, each at least 1")
        width = max(1, channels // 4)
        self.local = conv_bn_act(channels, width, 1)
        self.dilated = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False), BatchNormAct2d(width)
            )
            for dilation in dilations
        )
        self.mean, self.mean_norm = conv(channels, width, 1), BatchNormAct2d(width)
        self.project = conv_bn_act((2 + len(dilations)) * width, channels, 1)
        initialise(self)

    def forward(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return a map of the same shape that has seen several scales."""
        mean = self.mean(feature_map.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *feature_map.shape[2:])
        branches = [self.local, *self.dilated]
        seen = [*(branch(feature_map) for branch in branches), self.mean_norm(mean)]
        projected: Tensor = self.project(torch.cat(seen, dim=1))
        return projected
