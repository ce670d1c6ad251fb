"""CIFAR ResNets of bottleneck blocks: what some codes of online distillation call ResNet-110 or ResNet-56."""

from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.layers import BatchNormAct2d, PooledLinear, conv, conv_bn_act
from codistill.networks.network import NETWORKS, Network

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 (of `width` channels) and 1x1 convolution, added to a shortcut before the last ReLU."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = BatchNormAct2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = BatchNormAct2d(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = BatchNormAct2d(out_channels)
        alike = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if alike else conv_bn_act(in_channels, out_channels, 1, stride, act=False)

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Apply the block."""
        shortcut = self.shortcut(features)
        features = self.bn1(self.conv1(features))
        features = self.bn2(self.conv2(features))
        activated: Tensor = self.bn3(self.conv3(features), shortcut)
        return activated


def bottleneck_resnet(num_classes: int, blocks: int) -> Network:
    """Build a ResNet of depth 9 * blocks + 2 for 32x32 images; the feature map is [256, 8, 8].

    Source: the networks that the code of ONE (Lan1991Xu/ONE_NeurIPS2018) and OKDDip (DefangChen/OKDDip-AAAI2020 at
        c6a05de) builds from a depth of 44 on.
    """
    stages: list[nn.Module] = [conv_bn_act(3, 16, 3)]
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
