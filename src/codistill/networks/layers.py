"""Layers that networks are made of, and their initialisation."""

from typing import Protocol

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Normalise(Protocol):
    """What computes a batch normalisation with what follows it; see `normalised`, the one of stock layers."""

    def __call__(
        self,
        features: Float[Tensor, "batch channel height width"],
        norm: nn.BatchNorm2d,
        skipped: Float[Tensor, "batch channel height width"] | None,
        activated: bool,
    ) -> Float[Tensor, "batch channel height width"]:
        """Compute it."""


def normalised(
    features: Float[Tensor, "batch channel height width"],
    norm: nn.BatchNorm2d,
    skipped: Float[Tensor, "batch channel height width"] | None,
    activated: bool,
) -> Float[Tensor, "batch channel height width"]:
    """Normalise a map, add what skipped the layers before, if anything, and apply ReLU, if wanted."""
    result: Tensor = norm(features)
    if skipped is not None:
        result = result + skipped
    return F.relu(result, inplace=True) if activated else result


class Layers(nn.Sequential):
    """Layers in turn, where batch normalisation, the addition of a shortcut and ReLU are one operation.

    Attributes:
        normalise: Computes that operation in all `Layers`; see `normalised`.
    """

    normalise: Normalise = staticmethod(normalised)

    def forward(
        self,
        features: Float[Tensor, "batch in_channels height width"],
        skipped: Float[Tensor, "batch out_channels out_height out_width"] | None = None,
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Apply the layers.

        Args:
            features: Input of the first layer.
            skipped: Added to the output of the last layer, a batch normalisation; ReLU follows. None: neither of them.
        """
        layers = list(self)
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                last = index + 1 == len(layers)
                activated = skipped is not None if last else isinstance(layers[index + 1], nn.ReLU)
                features = self.normalise(features, layer, skipped if last else None, activated)
            elif not (isinstance(layer, nn.ReLU) and index and isinstance(layers[index - 1], nn.BatchNorm2d)):
                features = layer(features)
        return features


class PooledLinear(nn.Module):
    """Head of all networks here: mean over height and width, then a linear classifier.

    Args:
        width: Channels of the feature map.
        num_classes: Number of logits.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_classes)

    def forward(self, feature_map: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Map a feature map to logits."""
        logits: Tensor = self.linear(feature_map.mean(dim=(2, 3)))
        return logits


def initialise(module: nn.Module) -> None:
    """Initialise all layers below a module as the ResNet line of papers does.

    Convolutions: normal with variance 2 / (kernel area * out channels) (Kaiming, fan out); batch normalisation:
    weight 1, bias 0; linear layers keep the framework's default.

    Differs: FFL's code counts all output channels of a depthwise convolution as its fan-out; so does this.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, std=(2.0 / fan_out) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Make a convolution without bias whose padding keeps the size at stride 1; kernel sizes are odd."""
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Make a convolution as `conv` does and its batch normalisation, to be put into `Layers`."""
    return [conv(in_channels, out_channels, kernel_size, stride, groups), nn.BatchNorm2d(out_channels)]
