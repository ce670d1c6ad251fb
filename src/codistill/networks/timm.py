"""Every image classifier of timm, by its name: timm/resnet18, timm/vit_tiny_patch16_224."""

import functools
import logging
import math
from typing import Any

from torch import Tensor, fx, nn

from codistill.core.console import note_once
from codistill.core.errors import CheckpointError, UsageError, in_words
from codistill.core.extras import lacks
from codistill.core.registry import near_matches, write_spec
from codistill.networks.cut import Form, Trace, cut, found_ends, planned_once
from codistill.networks.network import NETWORKS, Network

SIZE = (64, 64)  # of the images that networks for images of any size are tried on, pixels
EVERY = "timm.list_models() shows all"


@NETWORKS.register("timm/*")
def timm_network(
    name: str, num_classes: int, image_size: tuple[int, int] | None, pretrained: bool = False, **options: Any
) -> Network:
    """Build any image classifier of timm: timm/resnet18, timm/vit_tiny_patch16_224:drop_path_rate=0.1.

    The stages are those of timm's `forward_intermediates`, and the feature map is the last of them, so that a layer
    between it and the pooling, as of MobileNets, belongs to the head. Tokens of a vision transformer become a map; its
    blocks are cut into quarters. Names and weights of the parts are timm's.

    Args:
        name: As in `timm.list_models()`, with or without a tag of pretrained weights.
        num_classes: Number of logits.
        image_size: Height and width of the images, pixels, for networks of one size, such as vision transformers.
        pretrained: Whether to begin with weights from timm's hub; the classifier is drawn where classes differ.
        **options: Those of `timm.create_model`.

    Raises:
        UsageError: timm is not installed, has no such network, or it cannot be cut.
        CheckpointError: The pretrained weights cannot be had.
    """
    module = create(name, num_classes, image_size, pretrained, options)
    fixed = getattr(module, "img_size", None) or getattr(getattr(module, "patch_embed", None), "img_size", None)
    height, width = fixed or SIZE
    return cut(module, planned_once(module, choose, f"network timm/{name}", write_spec(name, options), (height, width)))


def create(
    name: str, num_classes: int, image_size: tuple[int, int] | None, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    """Make a network of timm, for images of a size where it is made for one."""
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"network timm/{name}: {lacks('timm')}") from error
    if not timm.is_model(name):
        raise UsageError(f"unknown network timm/{name}: {near_matches(name, timm.list_models(), EVERY)}")
    make = functools.partial(timm.create_model, name, pretrained, num_classes=num_classes, **options)
    sized: dict[str, Any] = {} if image_size is None or "img_size" in options else {"img_size": image_size}
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    if pretrained:
        note_once(f"network timm/{name}: fetching its pretrained weights")
        hub.setLevel(logging.CRITICAL)  # it logs every attempt
    try:
        try:
            return make(**sized)
        except TypeError as error:  # it is for images of any size
            if not sized or "img_size" not in str(error):
                raise
            return make()
    except Exception as error:  # whatever the network's constructor, or the hub's client, raises
        if pretrained:
            fix = "without a network, name a file: --weights student0=FILE"
            raise CheckpointError(f"network timm/{name}: its pretrained weights: {in_words(error)}: {fix}") from error
        raise UsageError(f"network timm/{name}: timm cannot make it: {in_words(error)}") from error
    finally:
        hub.setLevel(level)


def choose(trace: Trace, module: nn.Module, images: Tensor) -> tuple[list[fx.Node], Form]:
    """Choose the ends of the stages by what timm calls intermediate features, and find the form of the tensors."""
    whole: Any = module
    results = trace.results(images)
    if hasattr(whole, "forward_intermediates"):
        paths, _ = outputs(module, lambda: whole.forward_intermediates(images, intermediates_only=True))
        ends = [trace.end_of(path) for path in paths if path]
        passes = trace.passes()
        if ends and all(paths) and all(end in passes for end in ends):
            return [end for end in ends if end is not None], Form()
    if not hasattr(whole, "forward_features"):
        return found_ends(trace, results), Form()
    (path,), features = outputs(module, lambda: whole.forward_features(images))
    final = trace.end_of(path) if path else None
    form = form_of(module, features)
    return found_ends(trace, results, final, form.kind == "last"), form


def outputs(module: nn.Module, run: Any) -> tuple[list[str], Tensor]:
    """Run a part of a network, and return the names of the submodules that made its results; empty: none did."""
    made: dict[int, tuple[str, Tensor]] = {}

    def note(path: str, result: Any) -> None:
        if isinstance(result, Tensor):
            made[id(result)] = path, result  # held, or another tensor would get its id

    hooks = [
        each.register_forward_hook(lambda _, __, result, path=path: note(path, result))
        for path, each in module.named_modules()
        if path
    ]
    try:
        results = run()
    finally:
        for hook in hooks:
            hook.remove()
    results = results if isinstance(results, list) else [results]
    return [made.get(id(each), ("", each))[0] for each in results], results[-1]


def form_of(module: nn.Module, features: Any) -> Form:
    """Return the form of the tensors within a network, by its last features."""
    if not isinstance(features, Tensor):
        raise UsageError(f"its features are a {type(features).__name__}")
    if features.ndim == 4:
        return Form("last" if getattr(module, "output_fmt", "NCHW") == "NHWC" else "maps")
    if features.ndim != 3:
        raise UsageError(f"its features {list(features.shape)} are neither maps nor tokens")
    tokens = features.shape[1]
    prefix = int(getattr(module, "num_prefix_tokens", math.isqrt(tokens) ** 2 != tokens))
    square = (math.isqrt(tokens - prefix),) * 2
    rows, columns = getattr(getattr(module, "patch_embed", None), "grid_size", square)
    if tokens - prefix != rows * columns:
        raise UsageError(f"its features {list(features.shape)} are not the tokens of a grid of patches")
    pooled = getattr(module, "global_pool", "") == "token" and getattr(module, "attn_pool", None) is None
    return Form("tokens", prefix, (int(rows), int(columns)), pooled and prefix > 0)
