"""MobileNetV2 for 32x32 images."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.layers import BatchNormAct2d, PooledLinear, conv, conv_bn_act
from codistill.networks.network import NETWORKS, Network

FeaturePoint = Literal["head", "last-block"]
# Expansion, output channels, blocks, stride of the first block.
TRUNK = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
BRANCH = ((6, 160, 3, 2), (6, 320, 1, 1))
HEAD_WIDTH = 1280


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel by a 3x3 one, narrow by a 1x1 one that no ReLU follows.

    At stride 1 a shortcut is added: the input, behind a 1x1 convolution and batch normalisation if the width
    changes. At stride 2 there is none. The expansion is hidden channels for each input channel.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.conv1 = conv(in_channels, hidden, 1)
        self.bn1 = BatchNormAct2d(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = BatchNormAct2d(hidden)
        self.conv3 = conv(hidden, out_channels, 1)
        self.bn3 = BatchNormAct2d(out_channels, act=False)
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1:
            self.shortcut = conv_bn_act(in_channels, out_channels, 1, act=False)

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Apply the block."""
        shortcut = None if self.shortcut is None else self.shortcut(features)
        features = self.bn1(self.conv1(features))
        features = self.bn2(self.conv2(features))
        narrowed: Tensor = self.bn3(self.conv3(features), shortcut)
        return narrowed


def inverted_residuals(in_channels: int, rows: tuple[tuple[int, int, int, int], ...]) -> list[nn.Sequential]:
    """Build one group of blocks for each row (expansion, output channels, blocks, stride of the first)."""
    groups = []
    for expansion, out_channels, blocks, stride in rows:
        first = InvertedResidual(in_channels, out_channels, expansion, stride)
        others = (InvertedResidual(out_channels, out_channels, expansion, 1) for _ in range(blocks - 1))
        groups.append(nn.Sequential(first, *others))
        in_channels = out_channels
    return groups


@NETWORKS.register("mobilenetv2")
def mobilenetv2(num_classes: int, feature_point: FeaturePoint = "head") -> Network:
    """Build MobileNetV2 for 32x32 images.

    Stages: stem, one for each of the groups of 16, 24, 32, 64 and 96 channels, and all the rest from the first block
    of 160 channels. All but the last are the usual shared trunk.

    Args:
        num_classes: Number of logits.
        feature_point: Where the feature map is taken: `head`, literally the last map before pooling, [1280, 4, 4]; or
            `last-block`, [320, 4, 4], and the last 1x1 convolution belongs to the head. The network computes the
            same, but modules that take the feature map are many times smaller.

    Source: Sandler, Howard, Zhu, Zhmoginov, Chen, MobileNetV2, CVPR 2018, arXiv 1801.04381, table 2; the form for
        32x32 images: github.com/kuangliu/pytorch-cifar, which CINIC-10's benchmark (Darlow et al., arXiv 1810.03505)
        names as its source.
    Differs: from the paper, as that code does: stride 1 in the stem and in the group of 24 channels, ReLU instead of
        ReLU6, 1x1 shortcuts where only the width changes (59 152 parameters).
    """
    stem = conv_bn_act(3, 32, 3)
    trunk = inverted_residuals(32, TRUNK)
    branch = inverted_residuals(TRUNK[-1][1], BRANCH)
    widths = [32, *(row[1] for row in TRUNK)]
    last_width = BRANCH[-1][1]
    widening = conv_bn_act(last_width, HEAD_WIDTH, 1)
    head: nn.Module = PooledLinear(HEAD_WIDTH, num_classes)
    if feature_point == "head":
        last, last_width = nn.Sequential(*branch, widening), HEAD_WIDTH
    else:
        last, head = nn.Sequential(*branch), nn.Sequential(widening, head)
    return Network([stem, *trunk, last], head, [*widths, last_width])
