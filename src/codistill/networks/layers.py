"""Layers that networks are made of, and their initialisation."""

import contextlib
from collections.abc import Collection, Iterator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.chains import norm_act


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch normalisation, then an optional addition of a shortcut, then an optional ReLU.

    Attributes:
        keeps_sum: Whether a pass keeps what it computes before the ReLU; see `sums_kept`.
        sum: What the last pass has kept.
    """

    keeps_sum: bool = False
    sum: Float[Tensor, "batch channel height width"]

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.act = act

    def forward(
        self,
        features: Float[Tensor, "batch channel height width"],
        shortcut: Float[Tensor, "batch channel height width"] | None = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """Compute relu(norm(features) + shortcut); neither argument is written to."""
        act = self.act and not self.keeps_sum
        result = norm_act(self, features, act, shortcut)
        if result is None:
            result = super().forward(features)
            if shortcut is not None:
                result = result + shortcut
            result = F.relu(result, inplace=True) if act else result
        if not self.keeps_sum:
            return result
        self.sum = result
        return F.relu(result)

    def extra_repr(self) -> str:
        """Return the settings of the layer; students share stages whose descriptions are equal."""
        return f"{self.num_features}, act={self.act}"


@contextlib.contextmanager
def sums_kept(norms: Collection[BatchNormAct2d]) -> Iterator[None]:
    """Have layers with a ReLU keep what they compute before it, as `sum`, until the context ends."""
    for norm in norms:
        norm.keeps_sum = True
    try:
        yield
    finally:
        for norm in norms:
            for name in ("keeps_sum", "sum"):
                vars(norm).pop(name, None)


class PooledLinear(nn.Module):
    """Head of all networks here: mean over height and width, then a linear classifier."""

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


def conv_bn_act(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Make a convolution as `conv` does, its batch normalisation and, if wanted, ReLU."""
    convolution = conv(in_channels, out_channels, kernel_size, stride, groups)
    return nn.Sequential(convolution, BatchNormAct2d(out_channels, act))
