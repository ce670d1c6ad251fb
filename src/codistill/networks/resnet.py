"""ResNets of basic blocks for 32x32 images: of depth 6n+2, two of them four times as wide, and ResNet-18."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.chains import second_use
from codistill.networks.layers import BatchNormAct2d, PooledLinear, conv, conv_bn_act
from codistill.networks.network import NETWORKS, Network

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Shortcut without parameters: take every `stride`-th pixel, add channels of zeros on both sides.

    Half of the new channels stand before the old ones and half behind. He et al. do not say where the zeros go;
    this is the place that most implementations chose.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.behind = out_channels - in_channels - self.before
        self.stride = stride

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Subsample and pad."""
        subsampled = features[:, :, :: self.stride, :: self.stride]
        return F.pad(subsampled, (0, 0, 0, 0, self.before, self.behind))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to a shortcut before the last ReLU.

    Where the shape changes, shortcut `A` is zero padding, `B` a 1x1 convolution and batch normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = BatchNormAct2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = BatchNormAct2d(out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PaddedShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = conv_bn_act(in_channels, out_channels, 1, stride, act=False)

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Apply the block."""
        shortcut = self.shortcut(second_use(features))
        features = self.bn1(self.conv1(features))
        activated: Tensor = self.bn2(self.conv2(features), shortcut)
        return activated


def basic_resnet(num_classes: int, widths: tuple[int, ...], blocks: int, shortcut: Shortcut) -> Network:
    """Build a ResNet of basic blocks with a 3x3 stem and no max-pooling, for small images.

    Each stage after the stem halves height and width, but the first one, which keeps them; `widths` are the channels
    of the stem and of these stages, `blocks` counts for each. The feature map is the last stage's output, after its
    ReLU.
    """
    channels = widths[0]
    stages: list[nn.Module] = [conv_bn_act(3, channels, 3)]
    for index, width in enumerate(widths[1:]):
        first = BasicBlock(channels, width, 1 if index == 0 else 2, shortcut)
        stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1, shortcut) for _ in range(blocks - 1))))
        channels = width
    return Network(stages, PooledLinear(channels, num_classes), widths)


def cifar_resnet(num_classes: int, depth: int, shortcut: Shortcut) -> Network:
    """Build a ResNet of depth 6n+2 for 32x32 images.

    The feature map is [64, 8, 8]; stem, stage 1 and stage 2 are the usual shared trunk. Shortcut `A` is zero padding
    without parameters, `B` a 1x1 convolution and batch normalisation, 2 752 parameters more.

    Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385,
        section 4.2.
    Differs: `B` is the default, as in the code of FFL, ONE and OKDDip; He et al. use `A` on CIFAR.
    """
    return basic_resnet(num_classes, (16, 16, 32, 64), (depth - 2) // 6, shortcut)


@NETWORKS.register("resnet8")
def resnet8(num_classes: int, shortcut: Shortcut = "B") -> Network:
    """Build ResNet-8 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 8, shortcut)


@NETWORKS.register("resnet14")
def resnet14(num_classes: int, shortcut: Shortcut = "B") -> Network:
    """Build ResNet-14 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 14, shortcut)


@NETWORKS.register("resnet20")
def resnet20(num_classes: int, shortcut: Shortcut = "B") -> Network:
    """Build ResNet-20 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 20, shortcut)


@NETWORKS.register("resnet32")
def resnet32(num_classes: int, shortcut: Shortcut = "B") -> Network:
    """Build ResNet-32 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 32, shortcut)


@NETWORKS.register("resnet44")
def resnet44(num_classes: int, shortcut: Shortcut = "B") -> Network:
    """Build ResNet-44 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 44, shortcut)


@NETWORKS.register("resnet56")
def resnet56(num_classes: int, shortcut: Shortcut = "B") -> Network:
    """Build ResNet-56 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 56, shortcut)


@NETWORKS.register("resnet110")
def resnet110(num_classes: int, shortcut: Shortcut = "B") -> Network:
    """Build ResNet-110 of basic blocks for 32x32 images; see `cifar_resnet`.

    Differs: ONE and OKDDip give this name to bottleneck networks, which have other sizes and errors.
    """
    return cifar_resnet(num_classes, 110, shortcut)


def wide_cifar_resnet(num_classes: int, depth: int) -> Network:
    """Build a ResNet of depth 6n+2 that is four times as wide as `cifar_resnet`, but for its stem, twice as wide.

    The feature map is [256, 8, 8]; stem, stage 1 and stage 2 are the usual shared trunk.

    Source: HobbitLong/RepDistiller at eedab9d, models/resnet.py, for Tian, Krishnan, Isola, Contrastive Representation
        Distillation, ICLR 2020, arXiv 1910.10699.
    """
    return basic_resnet(num_classes, (32, 64, 128, 256), (depth - 2) // 6, "B")


@NETWORKS.register("resnet8x4")
def resnet8x4(num_classes: int) -> Network:
    """Build ResNet-8x4 for 32x32 images; see `wide_cifar_resnet`."""
    return wide_cifar_resnet(num_classes, 8)


@NETWORKS.register("resnet32x4")
def resnet32x4(num_classes: int) -> Network:
    """Build ResNet-32x4 for 32x32 images; see `wide_cifar_resnet`."""
    return wide_cifar_resnet(num_classes, 32)


@NETWORKS.register("resnet18")
def resnet18(num_classes: int) -> Network:
    """Build ResNet-18 for 32x32 images.

    The feature map is [512, 4, 4]; stem and stages 1 to 3 are the usual shared trunk.

    Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385, table 1;
        the form for 32x32 images: github.com/kuangliu/pytorch-cifar, which CINIC-10's benchmark (Darlow et al.,
        arXiv 1810.03505) names as its source.
    Differs: from the paper, a 3x3 stem of stride 1 and no max-pooling, as in that code.
    """
    return basic_resnet(num_classes, (64, 64, 128, 256, 512), 2, "B")
