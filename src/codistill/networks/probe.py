"""Probes of networks: a copy runs on a few images, so that what cannot work is refused in one line."""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from codistill.core.errors import UsageError, in_words
from codistill.core.randomness import CPU, draws_kept
from codistill.networks.layers import BatchNormAct2d
from codistill.networks.network import Network

Module = TypeVar("Module", bound=nn.Module)


def label(module: nn.Module) -> str:
    """Return what errors call a network: its spec, or its class where it has none."""
    return getattr(module, "spec", "") or type(module).__name__


def copied(module: Module) -> Module:
    """Copy a module with all that it holds.

    What it computed in an earlier pass and keeps as an attribute, as `weight_norm` does, is copied as a plain tensor.

    Raises:
        UsageError: It holds something that cannot be copied, such as a file, a lock or a generator.
    """
    beside = [getattr(each, "network", None) for each in vars(module).values()]  # a frozen teacher, which is no module
    wholes: list[nn.Module] = [module, *(each for each in beside if isinstance(each, nn.Module))]
    held = [leaf for whole in wholes for part in whole.modules() for leaf in tree_leaves(vars(part))]
    known = {id(each): each.detach().clone() for each in held if isinstance(each, Tensor) and not each.is_leaf}
    try:
        with torch.no_grad():  # TorchScript's copies would be results of the originals
            twin = copy.deepcopy(module, known)
    except Exception as error:
        raise UsageError(f"{label(module)} holds something that cannot be copied: {in_words(error)}") from error
    if any(map(is_lazy, twin.parameters())):
        raise UsageError(f"{label(module)} has lazy layers without weights: call it once on some images first")
    for parameter, original in zip(twin.parameters(), module.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return twin


@contextlib.contextmanager
def probing(module: Module, device: torch.device | None = None) -> Iterator[Module]:
    """Yield a copy of a module to try, on a device (None: its own); the module and all random numbers stay.

    Modules that were compiled run uncompiled: a compiler would take minutes for each size of a batch.
    """
    device = device or next((each.device for each in module.parameters()), CPU)
    with contextlib.ExitStack() as states:
        states.enter_context(draws_kept(device))
        if "torch._dynamo" in sys.modules:  # which takes seconds to import
            states.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            twin = copied(module).to(device)
        except NotImplementedError as error:
            raise UsageError(f"{label(module)} has no weights, only their shapes: {in_words(error)}") from error
        yield twin


def stage_maps(built: Network, images: Float[Tensor, "batch channel height width"]) -> list[Tensor]:
    """Run the stages in turn, and return the output of each.

    Raises:
        UsageError: A stage cannot take its input, or does not return a tensor with an entry for each image.
    """
    size = "x".join(map(str, images.shape[2:]))
    maps = []
    for index, stage in enumerate(built.stages):
        where = f"network {label(built)}: stage {index}"
        try:
            output = stage(images)
        except Exception as error:
            raise UsageError(f"{where} cannot take {size} images: {in_words(error)}{odd_types(built)}") from error
        images = one_tensor(output, len(images), where, "a feature map [batch, channels, height, width]")
        maps.append(images)
    return maps


def count_classes(module: nn.Module, images: Tensor, what: str) -> int:
    """Run a network on images, and return how many logits of an image it computes.

    Raises:
        UsageError: It cannot take them, or returns something else; the line begins with `what`.
    """
    try:
        output = module(images)
    except Exception as error:
        raise UsageError(f"{what} cannot take its input: {in_words(error)}{odd_types(module)}") from error
    logits = one_tensor(output, len(images), what, "logits [batch, classes]")
    if logits.ndim != 2:
        shape = ", ".join(map(str, logits.shape[1:]))
        raise UsageError(f"{what} returns [batch{shape and ', '}{shape}]; it must return logits [batch, classes]")
    return logits.shape[1]


def one_tensor(output: Any, batch: int, what: str, wanted: str) -> Tensor:
    """Return an output that is one tensor of numbers for each image of a batch, or raise `UsageError`."""
    if not isinstance(output, Tensor):
        inside = f" with {', '.join(map(repr, output))}" if isinstance(output, dict) else ""
        raise UsageError(f"{what} returns a {type(output).__name__}{inside}; it must return {wanted}, and no more")
    if output.ndim < 1 or len(output) != batch or not output.is_floating_point():
        shape = f"{list(output.shape)} of {str(output.dtype).removeprefix('torch.')}"
        raise UsageError(f"{what} returns {shape} for a batch of {batch}; it must return {wanted}")
    return output


def odd_types(module: nn.Module) -> str:
    """Return a remark on weights of another floating-point type than images, or nothing."""
    others = {each.dtype for each in module.parameters()} & {torch.float16, torch.bfloat16, torch.float64}
    types = " and ".join(sorted(str(each).removeprefix("torch.") for each in others))
    return f" (it has {types} weights, images are float32: .float() converts them)" if others else ""


def probe_shapes(built: Network, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Find the shape [channels, height, width] of each stage's output for images of a height and width.

    Runs a copy in evaluation mode: neither buffers nor random state change.

    Raises:
        UsageError: A stage cannot take them, or returns something else.
    """
    with probing(built) as probe, torch.no_grad():
        device = next((each.device for each in probe.parameters()), None)
        maps = stage_maps(probe.eval(), torch.zeros(2, 3, *image_size, device=device))
    shapes = []
    for index, each in enumerate(maps):
        if each.ndim != 4:
            has = ", ".join(map(str, ("batch", *each.shape[1:])))
            raise UsageError(
                f"network {label(built)}: stage {index} returns [{has}], but this method needs maps [batch, channels, "
                "height, width]: bring them into this form, or use a method on logits, such as dml"
            )
        shapes.append((each.shape[1], each.shape[2], each.shape[3]))
    return shapes


def activations(built: Network, image_size: tuple[int, int]) -> list[BatchNormAct2d | None]:
    """Find the layer with the ReLU that each stage ends in; or the one that its output meets next; None: neither is.

    Runs a copy in evaluation mode, as `probe_shapes`.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []  # held, or another tensor would get the identity

    def note(name: str, given: Tensor, result: Tensor) -> None:
        seen.append((name, given, result))

    with probing(built) as probe, torch.no_grad():
        for name, layer in probe.named_modules():
            if isinstance(layer, BatchNormAct2d) and layer.act:
                layer.register_forward_hook(lambda _, given, result, name=name: note(name, given[0], result))
        device = next((each.device for each in probe.parameters()), None)
        maps = stage_maps(probe.eval(), torch.zeros(2, 3, *image_size, device=device))
    found: list[BatchNormAct2d | None] = []
    for each in maps:
        names = [name for name, _, result in seen if result is each]
        names += [name for name, given, _ in seen if given is each]
        layer = built.get_submodule(names[0]) if names else None
        found.append(layer if isinstance(layer, BatchNormAct2d) else None)
    return found


def forward_flop(module: nn.Module, image_size: tuple[int, int], views: int = 1, channels: int = 3) -> int:
    """Count the floating-point operations of one image's forward pass; a multiplication and an addition are two.

    Runs a copy in the mode, training or evaluation, that the module is in, on a batch of two images of `views` views.
    Of a part of a network the image is a feature map of so many channels.
    """
    # It imports Triton, which takes a second and 75 MiB.
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.zeros(*([views] if views > 1 else []), 2, channels, *image_size)
    with probing(module, CPU) as probe, torch.no_grad(), FlopCounterMode(display=False) as counter:
        probe(images)
    return int(counter.get_total_flops()) // 2
