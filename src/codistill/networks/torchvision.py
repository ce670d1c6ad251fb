"""Every image classifier of torchvision, by its name: torchvision/mobilenet_v3_small."""

import contextlib
import io
from typing import Any

from torch import Tensor, fx, nn

from codistill.core.console import note_once
from codistill.core.errors import CheckpointError, UsageError, in_words
from codistill.core.extras import lacks
from codistill.core.registry import near_matches, write_spec
from codistill.networks.cut import Form, Trace, cut, found_ends, named_ends, planned_once
from codistill.networks.network import NETWORKS, Network

SIZE = (128, 128)  # of the images that networks are tried on, pixels
LAST = ("features.1", "features.3", "features.5", "norm")  # ends of stages where channels are the last axis: of Swin


@NETWORKS.register("torchvision/*")
def torchvision_network(name: str, num_classes: int, pretrained: bool = False, **options: Any) -> Network:
    """Build any image classifier of torchvision: torchvision/mobilenet_v3_small.

    A stage ends where the resolution changes; the feature map is the last one before pooling. Names and weights of the
    parts are torchvision's.

    Args:
        name: As in `torchvision.models.list_models(torchvision.models)`.
        num_classes: Number of logits.
        pretrained: Whether to begin with torchvision's best weights; the classifier is drawn where classes differ.
        **options: Those of `torchvision.models.get_model`.

    Raises:
        UsageError: torchvision is not installed, has no such network, or it cannot be cut.
        CheckpointError: The pretrained weights cannot be had.
    """
    title = f"network torchvision/{name}"
    try:
        from torchvision import models
    except ImportError as error:
        raise UsageError(f"{title}: {lacks('torchvision')}") from error
    known = models.list_models(module=models)
    if name.startswith("vit_"):
        raise UsageError(f"{title}: its tokens are no map: name one of timm's: timm/vit_tiny_patch16_224")
    if name not in known:
        raise UsageError(f"unknown {title}: {near_matches(name, known)}")
    try:
        module: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    except Exception as error:
        raise UsageError(f"{title}: torchvision cannot make it: {in_words(error)}") from error
    if pretrained:
        note_once(f"{title}: fetching its pretrained weights")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch.hub prints the address
                state = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # of the network, of the disk
            fix = "without a network, name a file: --weights student0=FILE"
            raise CheckpointError(f"{title}: its pretrained weights: {in_words(error)}: {fix}") from error
        begin_with(module, state, title)
    return cut(module, planned_once(module, choose, title, write_spec(name, options), SIZE))


def begin_with(module: nn.Module, state: dict[str, Tensor], title: str) -> None:
    """Load pretrained weights but for a classifier for other classes, which stays as it is drawn."""
    own = module.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    module.load_state_dict(fitting, strict=False)
    if drawn := [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]:
        note_once(f"{title}: its pretrained classifier is for other classes: {' and '.join(drawn)} drawn")


def choose(trace: Trace, module: nn.Module, images: Tensor) -> tuple[list[fx.Node], Form]:
    """Choose the ends of the stages, and find the form of the tensors."""
    if type(module).__name__ == "SwinTransformer":
        return named_ends(trace, module, LAST), Form("last")
    return found_ends(trace, trace.results(images)), Form()
