"""VGG with batch normalisation and one linear layer, for small images: VGG-8 and VGG-13."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.layers import BatchNormAct2d, PooledLinear
from codistill.networks.network import NETWORKS, Network

WIDTHS = (64, 128, 256, 512, 512)


class HalveLarge(nn.Module):
    """Max pooling of 8x8 maps, those of 64x64 images; others stay as they are."""

    def forward(
        self, features: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel out_height out_width"]:
        """Pool or not."""
        return F.max_pool2d(features, 2) if features.shape[2] == 8 else features


def vgg(num_classes: int, convolutions: tuple[int, ...]) -> Network:
    """Build a VGG of five stages of 3x3 convolutions with biases, each before batch normalisation and ReLU.

    Max pooling begins stages 1 to 3, and stage 4 where the images are 64x64, so that the feature map is
    [512, 4, 4] for images of 32x32 and 64x64. All stages but the last are the usual shared trunk.

    Args:
        num_classes: Number of logits.
        convolutions: How many there are in each stage.

    Source: Simonyan, Zisserman, Very Deep Convolutional Networks, ICLR 2015, arXiv 1409.1556, table 1 (B is VGG-13);
        the form for small images: HobbitLong/RepDistiller at eedab9d, models/vgg.py, `vgg8_bn` and `vgg13_bn`, which
        are the vgg8 and vgg13 of that zoo.
    Differs: the linear layer keeps the framework's initialisation; that code draws it with standard deviation 0.01.
    """
    stages: list[nn.Module] = []
    channels = 3
    for index, (width, count) in enumerate(zip(WIDTHS, convolutions, strict=True)):
        layers: list[nn.Module] = [] if index == 0 else [HalveLarge() if index == 4 else nn.MaxPool2d(2)]
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), BatchNormAct2d(width)]
            channels = width
        stages.append(nn.Sequential(*layers))
    return Network(stages, PooledLinear(channels, num_classes), WIDTHS)


@NETWORKS.register("vgg8")
def vgg8(num_classes: int) -> Network:
    """Build VGG-8 for small images; see `vgg`."""
    return vgg(num_classes, (1, 1, 1, 1, 1))


@NETWORKS.register("vgg13")
def vgg13(num_classes: int) -> Network:
    """Build VGG-13 for small images; see `vgg`."""
    return vgg(num_classes, (2, 2, 2, 2, 2))
