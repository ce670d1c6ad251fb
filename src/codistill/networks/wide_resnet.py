"""Wide ResNets of depth 6n+4 for 32x32 images: WRN-16-1, -16-2, -40-1 and -40-2."""

from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.layers import BatchNormAct2d, PooledLinear, conv
from codistill.networks.network import NETWORKS, Network


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch normalisation and ReLU, added to a shortcut; nothing after the sum.

    Where the width changes, and only there the stride may be above 1, the shortcut is a bare 1x1 convolution of the
    normalised and activated input; elsewhere it is the raw input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNormAct2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = BatchNormAct2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.shortcut = None if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Apply the block."""
        activated = self.bn1(features)
        shortcut = features if self.shortcut is None else self.shortcut(activated)
        summed: Tensor = self.conv2(self.bn2(self.conv1(activated))) + shortcut
        return summed


def wide_resnet(num_classes: int, depth: int, widening: int) -> Network:
    """Build a wide ResNet for 32x32 images.

    The feature map is [64 * widening, 8, 8], after the final batch normalisation and ReLU, which belong to the last
    stage; stem, stage 1 and stage 2 are the usual shared trunk. The depth is 6n+4, with n blocks in each stage.

    Source: Zagoruyko, Komodakis, Wide Residual Networks, BMVC 2016, arXiv 1605.07146; the details as in the authors'
        github.com/szagoruyko/wide-residual-networks, pytorch/resnet.py.
    Differs: no dropout, and weights from `initialise`. The port in the code of FFSD and CMFF is another network:
        biases, the stride in the second convolution, a shortcut of the raw input.
    """
    stages: list[nn.Module] = [conv(3, 16, 3)]
    widths = [16]
    blocks = (depth - 4) // 6
    for width, stride in ((16 * widening, 1), (32 * widening, 2), (64 * widening, 2)):
        first = PreActivationBlock(widths[-1], width, stride)
        stages.append(nn.Sequential(first, *(PreActivationBlock(width, width, 1) for _ in range(blocks - 1))))
        widths.append(width)
    stages[-1] = nn.Sequential(stages[-1], BatchNormAct2d(widths[-1]))
    return Network(stages, PooledLinear(widths[-1], num_classes), widths)


@NETWORKS.register("wrn-16-1")
def wrn_16_1(num_classes: int) -> Network:
    """Build WRN-16-1 for 32x32 images; see `wide_resnet`."""
    return wide_resnet(num_classes, 16, 1)


@NETWORKS.register("wrn-16-2")
def wrn_16_2(num_classes: int) -> Network:
    """Build WRN-16-2 for 32x32 images; see `wide_resnet`."""
    return wide_resnet(num_classes, 16, 2)


@NETWORKS.register("wrn-40-1")
def wrn_40_1(num_classes: int) -> Network:
    """Build WRN-40-1 for 32x32 images; see `wide_resnet`."""
    return wide_resnet(num_classes, 40, 1)


@NETWORKS.register("wrn-40-2")
def wrn_40_2(num_classes: int) -> Network:
    """Build WRN-40-2 for 32x32 images; see `wide_resnet`."""
    return wide_resnet(num_classes, 40, 2)
