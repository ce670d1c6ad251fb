"""The form of every network: stages that compute feature maps, and a head that maps the last one to logits."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.core.registry import Registry, checked_options, parse_spec, write_spec
from codistill.networks.layers import initialise
from codistill.networks.origin import DRAWN, mark

NETWORKS: Registry[Callable[..., "Network"]] = Registry("network", "codistill.networks")


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
            raise UsageError(f"a network got {len(stages)} stages, but {len(widths)} widths: name one for each stage")
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
        """Map normalised images to the output of the head: logits [batch, classes]."""
        answer: Tensor = self.head(self.feature_map(images))
        return answer


def network(spec: str, num_classes: int, **options: Any) -> Network:
    """Build a registered network with fresh weights.

    They come from torch's default generator. A training draws them again from its seed, unless they were changed since.

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
    mark(built, DRAWN)
    return built


def parameter_count(module: nn.Module) -> int:
    """Count the parameters of a module, each shared tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())
