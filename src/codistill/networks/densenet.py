"""DenseNets of depth 40 and growth 12 for 32x32 images: with bottlenecks and compression (BC), and plain."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.networks.layers import BatchNormAct2d, PooledLinear, conv
from codistill.networks.network import NETWORKS, Network

DEPTH = 40
GROWTH = 12


def bn_relu_conv(in_channels: int, out_channels: int, kernel_size: int) -> list[nn.Module]:
    """Make a convolution behind batch normalisation and ReLU."""
    return [BatchNormAct2d(in_channels), conv(in_channels, out_channels, kernel_size)]


class DenseLayer(nn.Module):
    """Append `GROWTH` new channels; with a bottleneck, a 1x1 convolution narrows the input to 4 * `GROWTH` first."""

    def __init__(self, in_channels: int, bottleneck: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if bottleneck:
            layers += bn_relu_conv(in_channels, 4 * GROWTH, 1)
            in_channels = 4 * GROWTH
        self.growth = nn.Sequential(*layers, *bn_relu_conv(in_channels, GROWTH, 3))

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Concatenate the input and the new channels, in this order."""
        return torch.cat([features, self.growth(features)], dim=1)


def densenet(num_classes: int, initial_channels: int, compressed: bool) -> Network:
    """Build a DenseNet of depth 40 and growth 12 for 32x32 images.

    Stages: the first convolution, dense block 1 with its transition, dense block 2 with its transition, dense block 3
    with the final batch normalisation and ReLU. All but the last are the usual shared trunk.

    Args:
        num_classes: Number of logits.
        initial_channels: Output channels of the first convolution.
        compressed: DenseNet-BC: bottlenecks in the layers (half as many layers) and transitions that halve the
            channels. Otherwise plain layers and transitions that keep the channels.

    Source: Huang, Liu, van der Maaten, Weinberger, Densely Connected Convolutional Networks, CVPR 2017,
        arXiv 1608.06993, sections 3 and 4.2.
    Differs: no dropout (the paper uses none either on data with augmentation).
    """
    layers = (DEPTH - 4) // 6 if compressed else (DEPTH - 4) // 3
    stages: list[nn.Module] = [conv(3, initial_channels, 3)]
    widths = [initial_channels]
    for block in range(3):
        channels = widths[-1]
        modules: list[nn.Module] = []
        for _ in range(layers):
            modules.append(DenseLayer(channels, compressed))
            channels += GROWTH
        if block < 2:
            kept = channels // 2 if compressed else channels
            modules += [*bn_relu_conv(channels, kept, 1), nn.AvgPool2d(2)]
            channels = kept
        else:
            modules += [BatchNormAct2d(channels)]
        stages.append(nn.Sequential(*modules))
        widths.append(channels)
    return Network(stages, PooledLinear(widths[-1], num_classes), widths)


@NETWORKS.register("densenet-40-12")
def densenet_40_12(num_classes: int) -> Network:
    """Build DenseNet-BC-40-12, feature map [132, 8, 8]: what distillation papers mean by DenseNet-40-12.

    Six layers a block with bottlenecks, compression 0.5 and 24 initial channels, as in OKDDip, MCL-OKD and PCL. MFEF
    does not say which form it uses; its baseline error on CIFAR-100 (28.97 %) is this one's, not the plain one's
    (24.42 %). See `densenet`.
    """
    return densenet(num_classes, 2 * GROWTH, compressed=True)


@NETWORKS.register("densenet-40-12-plain")
def densenet_40_12_plain(num_classes: int, initial_channels: int = 16) -> Network:
    """Build the plain DenseNet-40-12 (1.0M parameters), feature map [448, 8, 8]; see `densenet`.

    Args:
        num_classes: Number of logits.
        initial_channels: Output channels of the first convolution: 16 as in the paper, or 24 as in the authors' Lua
            code and in FFSD, which makes the feature map [456, 8, 8].

    Raises:
        UsageError: `initial_channels` is below 1.
    """
    if initial_channels < 1:
        raise UsageError(f"densenet-40-12-plain: initial_channels is {initial_channels}: use at least 1 (16 or 24)")
    return densenet(num_classes, initial_channels, compressed=False)
