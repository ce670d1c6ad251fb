"""CIFAR ResNets of bottleneck blocks: what some codes of online distillation call ResNet-110 or ResNet-56."""

from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.layers import Layers, PooledLinear, conv_bn
from codistill.networks.network import NETWORKS, Network

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with batch normalisation, added to a shortcut before the last ReLU.

    Args:
        in_channels: Channels of the input.
        width: Channels of the 3x3 convolution; the output has four times as many.
        stride: Stride of the 3x3 convolution, pixels.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.residual = Layers(
            *conv_bn(in_channels, width, 1),
            nn.ReLU(inplace=True),
            *conv_bn(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *conv_bn(width, out_channels, 1),
        )
        alike = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if alike else Layers(*conv_bn(in_channels, out_channels, 1, stride))

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Apply the block."""
        activated: Tensor = self.residual(features, self.shortcut(features))
        return activated


def bottleneck_resnet(num_classes: int, blocks: int) -> Network:
    """Build a ResNet of depth 9 * blocks + 2 for 32x32 images; the feature map is [256, 8, 8].

    Source: the networks that the code of ONE (Lan1991Xu/ONE_NeurIPS2018) and OKDDip (DefangChen/OKDDip-AAAI2020 at
        c6a05de) builds from a depth of 44 on.
    """
    stages: list[nn.Module] = [Layers(*conv_bn(3, 16, 3), nn.ReLU(inplace=True))]
    channels = 16
    for width in (16, 32, 64):
        first = Bottleneck(channels, width, 1 if width == 16 else 2)
        channels = EXPANSION * width
        stages.append(nn.Sequential(first, *(Bottleneck(channels, width, 1) for _ in range(blocks - 1))))
    return Network(stages, PooledLinear(channels, num_classes), (16, 64, 128, 256))


@NETWORKS.register("resnet83-bottleneck")
def resnet83_bottleneck(num_classes: int) -> Network:
    """Build what ONE's code calls ResNet-56; see `bottleneck_resnet`."""
    return bottleneck_resnet(num_classes, 9)


@NETWORKS.register("resnet110-bottleneck")
def resnet110_bottleneck(num_classes: int) -> Network:
    """Build what OKDDip's code calls ResNet-110 (1.17M parameters); see `bottleneck_resnet`."""
    return bottleneck_resnet(num_classes, 12)


@NETWORKS.register("resnet164-bottleneck")
def resnet164_bottleneck(num_classes: int) -> Network:
    """Build what ONE's code calls ResNet-110 (1.73M parameters); see `bottleneck_resnet`."""
    return bottleneck_resnet(num_classes, 18)
