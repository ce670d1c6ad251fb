"""The form of every network: stages that compute feature maps, and a head that maps the last one to logits."""

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.console import note_once
from codistill.core.errors import UsageError
from codistill.core.registry import Registry, write_spec
from codistill.networks.layers import initialise
from codistill.networks.origin import DRAWN, mark
from codistill.networks.weights import classifier_of, take

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
        initialised: Whether the weights are as they shall be; else `network` draws them by `initialise`.

    Attributes:
        is_cut: Whether the parts are those of a module of somebody else's, under their own names.
    """

    is_cut: bool = False

    def __init__(
        self,
        stages: Sequence[nn.Module],
        head: nn.Module,
        widths: Sequence[int],
        spec: str = "",
        initialised: bool = False,
    ) -> None:
        super().__init__()
        if len(stages) != len(widths):
            raise UsageError(f"a network got {len(stages)} stages, but {len(widths)} widths: name one for each stage")
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.widths = tuple(widths)
        self.spec = spec
        self.initialised = initialised

    def feature_map(
        self, images: Float[Tensor, "batch channel height width"], first_stage: int = 0
    ) -> Float[Tensor, "batch features map_height map_width"]:
        """Apply the stages from `first_stage` on; `images` is then the output of the stage before it."""
        for stage in self.stages[first_stage:]:
            images = stage(images)
        return images

    def original_names(self) -> dict[str, str]:
        """Return the names of the state_dict, each with the name in the module that the network was cut from."""
        pattern = r"(stages\.\d+|head)\." if self.is_cut else ""
        return {name: re.sub(f"^{pattern}", "", name) for name in self.state_dict()}

    def original_state_dict(self) -> dict[str, Tensor]:
        """Return the weights by the names of the module that the network was cut from, such as timm's."""
        state = self.state_dict()
        return {name: state[own] for own, name in self.original_names().items()}

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch *answer"]:
        """Map normalised images to the output of the head: logits [batch, classes]."""
        answer: Tensor = self.head(self.feature_map(images))
        return answer


def network(
    spec: str,
    num_classes: int,
    *,
    image_size: tuple[int, int] | None = None,
    weights: str | Path | None = None,
    fresh: bool = True,
    **options: Any,
) -> Network:
    """Build a registered network with fresh weights.

    They come from torch's default generator. A training draws them again from its seed, unless they were changed since.

    Args:
        spec: A registered name (`codistill list`), with options behind a colon: `resnet20:shortcut=A`.
        num_classes: Number of logits, at least 2.
        image_size: Height and width of the images, pixels, for networks that are made for one size; others take any.
        weights: A file of weights to begin with, by torch.save or .safetensors, also of timm, torchvision or other
            repositories; a classifier for other classes is drawn, which a note says. None: all are drawn.
        fresh: Whether the network is to be trained; else its weights are loaded afterwards, and those of an option
            `pretrained` are not fetched.
        **options: The same options by keyword.

    Returns:
        The network; its `spec` names it with all options that were given.

    Raises:
        UsageError: Unknown name or option, or a value that the network does not take.
        CheckpointError: The file of weights is missing, damaged, or of another network.
    """
    name, build, chosen = NETWORKS.find(spec, options)
    if num_classes < 2:
        raise UsageError(f"network {spec!r}: needs at least 2 classes, got {num_classes}")
    passed, taken = dict(chosen), inspect.signature(build).parameters
    if "image_size" in taken:
        passed["image_size"] = image_size
    if not fresh:
        passed.pop("pretrained", None)
    built = build(num_classes=num_classes, **passed)
    if not isinstance(built, Network):
        what = f"network {name}: its function returns a {type(built).__name__}, which is no Network"
        raise UsageError(f"{what}: have it return codistill.network_from(module)")
    if not built.initialised:
        initialise(built)
    built.spec = write_spec(name, chosen)
    mark(built, DRAWN)
    if weights is not None:
        begin_with(built, Path(weights), num_classes)
    return built


def begin_with(built: Network, path: Path, num_classes: int) -> None:
    """Load a file of weights into a network, but for a classifier of other classes; see `take`."""
    what, fix = f"weights {path}", "are they of another network, or of other options?"
    classifier = classifier_of(built.head, num_classes)
    left = take(built, built.original_names(), path, what, f"network {built.spec}", fix, classifier)
    if left:
        names = built.original_names()
        drawn = " and ".join(names[name] for name in left)
        note_once(f"{what}: its classifier is not for {num_classes} classes: {drawn} of {built.spec} drawn")


def parameter_count(module: nn.Module) -> int:
    """Count the parameters of a module, each shared tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())
