"""ResNets of basic blocks for 32x32 images: of depth 6n+2, two of them four times as wide, and ResNet-18."""

import functools
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.networks.chains import second_use
from codistill.networks.cheap import Cheap, cheap_unit
from codistill.networks.layers import BatchNormAct2d, PooledLinear, conv, conv_bn_act
from codistill.networks.network import NETWORKS, Network

Shortcut = Literal["A", "B"]
Convolution = Literal["standard", Cheap]


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


def shortcut_path(in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> nn.Module:
    """Make what leads past a block: nothing, unless the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if shortcut == "A":
        return PaddedShortcut(in_channels, out_channels, stride)
    return conv_bn_act(in_channels, out_channels, 1, stride, act=False)


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
        self.shortcut = shortcut_path(in_channels, out_channels, stride, shortcut)

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Apply the block."""
        shortcut = self.shortcut(second_use(features))
        features = self.bn1(self.conv1(features))
        activated: Tensor = self.bn2(self.conv2(features), shortcut)
        return activated


class CheapBlock(nn.Module):
    """Two cheap units, each with batch normalisation and ReLU, added to a shortcut; no ReLU follows the addition."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut, kind: Cheap, groups: int
    ) -> None:
        super().__init__()
        first = cheap_unit(kind, in_channels, out_channels, stride, groups)
        self.units = nn.Sequential(first, cheap_unit(kind, out_channels, out_channels, 1, groups))
        self.shortcut = shortcut_path(in_channels, out_channels, stride, shortcut)

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Apply the block."""
        added: Tensor = self.shortcut(second_use(features)) + self.units(features)
        return added


def basic_resnet(
    num_classes: int, widths: tuple[int, ...], blocks: int, block: Callable[[int, int, int], nn.Module]
) -> Network:
    """Build a ResNet with a 3x3 stem and no max-pooling, for small images.

    Each stage after the stem halves height and width, but the first one, which keeps them; `widths` are the channels
    of the stem and of these stages, `blocks` counts for each; `block` makes one of channels before and after, and
    stride. The feature map is the last stage's output, with basic blocks after its ReLU.
    """
    channels = widths[0]
    stages: list[nn.Module] = [conv_bn_act(3, channels, 3)]
    for index, width in enumerate(widths[1:]):
        first = block(channels, width, 1 if index == 0 else 2)
        stages.append(nn.Sequential(first, *(block(width, width, 1) for _ in range(blocks - 1))))
        channels = width
    return Network(stages, PooledLinear(channels, num_classes), widths)


def cifar_resnet(num_classes: int, depth: int, shortcut: Shortcut, conv: Convolution, groups: int) -> Network:
    """Build a ResNet of depth 6n+2 for 32x32 images.

    The feature map is [64, 8, 8]; stem, stage 1 and stage 2 are the usual shared trunk. Shortcut `A` is zero padding
    without parameters, `B` a 1x1 convolution and batch normalisation, 2 752 parameters more. With another `conv` than
    standard the blocks, but not the stem, are of cheap units, `CheapBlock`; `groups`, a divisor of 16, is for `group`.

    Raises:
        UsageError: Groups that do not divide the channels, or without `conv=group`.

    Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385,
        section 4.2.
    Differs: `B` is the default, as in the code of FFL, ONE and OKDDip; He et al. use `A` on CIFAR.
    """
    if groups != 1 and (conv != "group" or groups < 1 or 16 % groups):
        need = "must be 1, 2, 4, 8 or 16" if conv == "group" else f"is for conv=group, but conv is {conv}"
        raise UsageError(f"network resnet{depth}: option groups is {groups}; it {need}")
    block: Callable[[int, int, int], nn.Module] = functools.partial(BasicBlock, shortcut=shortcut)
    if conv != "standard":
        block = functools.partial(CheapBlock, shortcut=shortcut, kind=conv, groups=groups)
    return basic_resnet(num_classes, (16, 16, 32, 64), (depth - 2) // 6, block)


@NETWORKS.register("resnet8")
def resnet8(num_classes: int, shortcut: Shortcut = "B", conv: Convolution = "standard", groups: int = 1) -> Network:
    """Build ResNet-8 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 8, shortcut, conv, groups)


@NETWORKS.register("resnet14")
def resnet14(num_classes: int, shortcut: Shortcut = "B", conv: Convolution = "standard", groups: int = 1) -> Network:
    """Build ResNet-14 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 14, shortcut, conv, groups)


@NETWORKS.register("resnet20")
def resnet20(num_classes: int, shortcut: Shortcut = "B", conv: Convolution = "standard", groups: int = 1) -> Network:
    """Build ResNet-20 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 20, shortcut, conv, groups)


@NETWORKS.register("resnet32")
def resnet32(num_classes: int, shortcut: Shortcut = "B", conv: Convolution = "standard", groups: int = 1) -> Network:
    """Build ResNet-32 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 32, shortcut, conv, groups)


@NETWORKS.register("resnet44")
def resnet44(num_classes: int, shortcut: Shortcut = "B", conv: Convolution = "standard", groups: int = 1) -> Network:
    """Build ResNet-44 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 44, shortcut, conv, groups)


@NETWORKS.register("resnet56")
def resnet56(num_classes: int, shortcut: Shortcut = "B", conv: Convolution = "standard", groups: int = 1) -> Network:
    """Build ResNet-56 for 32x32 images; see `cifar_resnet`."""
    return cifar_resnet(num_classes, 56, shortcut, conv, groups)


@NETWORKS.register("resnet110")
def resnet110(num_classes: int, shortcut: Shortcut = "B", conv: Convolution = "standard", groups: int = 1) -> Network:
    """Build ResNet-110 of basic blocks for 32x32 images; see `cifar_resnet`.

    Differs: ONE and OKDDip give this name to bottleneck networks, which have other sizes and errors.
    """
    return cifar_resnet(num_classes, 110, shortcut, conv, groups)


def wide_cifar_resnet(num_classes: int, depth: int) -> Network:
    """Build a ResNet of depth 6n+2 that is four times as wide as `cifar_resnet`, but for its stem, twice as wide.

    The feature map is [256, 8, 8]; stem, stage 1 and stage 2 are the usual shared trunk.

    Source: HobbitLong/RepDistiller at eedab9d, models/resnet.py, for Tian, Krishnan, Isola, Contrastive Representation
        Distillation, ICLR 2020, arXiv 1910.10699.
    """
    return basic_resnet(num_classes, (32, 64, 128, 256), (depth - 2) // 6, functools.partial(BasicBlock, shortcut="B"))


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
    return basic_resnet(num_classes, (64, 64, 128, 256, 512), 2, functools.partial(BasicBlock, shortcut="B"))
