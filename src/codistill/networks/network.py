"""What every network is: stages that make feature maps, and a head that makes logits of the last one."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.errors import UsageError
from codistill.registry import Registry, checked_options, parse_spec, write_spec

NETWORKS: Registry[Callable[..., "Network"]] = Registry("network", "codistill.networks")


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


class Network(nn.Module):
    """An image classifier made of stages and a head.

    Sharing a trunk is putting the same stage objects into two networks; there are no hooks and no second copies.

    Args:
        stages: Modules applied in turn, each mapping [batch, channels, height, width] to the same form. The output
            of the last one is the feature map.
        head: Maps the feature map to logits [batch, classes].
        widths: Channels of each stage's output.
        spec: The text that `network` rebuilds this network from; empty for a network of your own.
    """

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module, widths: Sequence[int], spec: str = "") -> None:
        super().__init__()
        if len(stages) != len(widths):
            raise ValueError(f"{len(stages)} stages but {len(widths)} widths")
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.widths = tuple(widths)
        self.spec = spec

    def feature_map(
        self, images: Float[Tensor, "batch channel height width"], first_stage: int = 0
    ) -> Float[Tensor, "batch features map_height map_width"]:
        """Apply the stages from `first_stage` on; `images` is then the output of the stage before it."""
        for stage in self.stages[first_stage:]:
            images = stage(images)
        return images

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch *answer"]:
        """Map normalised images to what the head makes of their feature map: logits [batch, classes]."""
        answer: Tensor = self.head(self.feature_map(images))
        return answer


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


def network(spec: str, num_classes: int, **options: Any) -> Network:
    """Build a registered network with fresh weights from torch's default generator.

    Args:
        spec: A registered name (`codistill list`), with options behind a colon: `resnet20:shortcut=A`.
        num_classes: Number of logits, at least 2.
        **options: The same options by keyword.

    Returns:
        The network; its `spec` names it with all options that were given.

    Raises:
        UsageError: Unknown name or option, or a value that the network does not take.
    """
    name, written = parse_spec(spec)
    build = NETWORKS[name]
    if num_classes < 2:
        raise UsageError(f"network {spec!r}: needs at least 2 classes, got {num_classes}")
    chosen = checked_options(f"network {name}", build, {**written, **options})
    built = build(num_classes=num_classes, **chosen)
    initialise(built)
    built.spec = write_spec(name, chosen)
    return built


def parameter_count(module: nn.Module) -> int:
    """Count the parameters of a module, each shared tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


def probe_shapes(built: Network, image_size: tuple[int, int]) -> list[tuple[int, ...]]:
    """Find the shape [channels, height, width] of each stage's output without computing anything.

    Runs on the meta device in evaluation mode, so neither buffers nor random state change.

    Args:
        built: Any network.
        image_size: Height and width of its input, pixels.

    Raises:
        UsageError: The images are too small for the network.
    """
    probe = copy.deepcopy(built).to("meta").eval()
    images = torch.empty(1, 3, *image_size, device="meta")
    shapes = []
    for index, stage in enumerate(probe.stages):
        try:
            images = stage(images)
        except RuntimeError as error:
            size = f"{image_size[0]}x{image_size[1]}"
            raise UsageError(
                f"network {built.spec or type(built).__name__}: stage {index} cannot take {size} images: {error}"
            ) from error
        shapes.append(tuple(images.shape[1:]))
    return shapes
