"""RandAugment's operations on the colours of a batch, each image with an operation and a factor of its own."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from codistill.data.policy import COLOURS

Pixels = UInt8[Tensor, "image height width 3"]
# What maps each value of a channel by itself, and what looks at other channels or pixels.
BY_VALUE = ("brightness", "contrast", "posterize", "solarize", "autocontrast", "equalize")
BY_PLACE = ("color", "sharpness")


def recolour(
    pixels: Pixels,
    operation: Float[Tensor, " image"],
    factor: Float[Tensor, " image"],
    kinds: Sequence[str],
    dense: bool | None = None,
) -> Pixels:
    """Do one operation of `COLOURS` on each image, by its number, with its factor.

    Args:
        pixels: The images; they may be overwritten.
        operation: Numbers of operations.
        factor: Their factors.
        kinds: All operations that may be among them.
        dense: Whether all images go through all operations among `kinds`, so that no shape depends on what was drawn
            and nothing is read by the host, or only those that have one. None: on all but a CPU.
    """
    dense = pixels.device.type != "cpu" if dense is None else dense
    for names, function in ((BY_VALUE, by_value), (BY_PLACE, by_place)):
        used = [each for each in names if each in kinds]
        if not used:
            continue
        if dense:
            pixels = function(pixels, operation, factor, used)
            continue
        here = torch.zeros_like(operation, dtype=torch.bool)
        for each in used:
            here |= is_one(operation, each)
        some = here.nonzero()[:, 0]
        if len(some):
            pixels[some] = function(pixels[some], operation[some], factor[some], used)
    return pixels


def is_one(operation: Float[Tensor, " image"], name: str) -> Bool[Tensor, " image"]:
    """Whether the operation of each image is the named one."""
    return operation == COLOURS.index(name)


def by_value(
    pixels: Pixels, operation: Float[Tensor, " image"], factor: Float[Tensor, " image"], kinds: Sequence[str]
) -> Pixels:
    """Map the values of each channel of each image by a table of its own, which may depend on all of its pixels."""
    count, height, width, _ = pixels.shape
    values = torch.arange(256, dtype=torch.float32, device=pixels.device)
    table = values.expand(count, 3, 256)
    factor = factor[:, None, None]
    # Each channel of each image has its own 256 places in one table.
    channel = 256 * torch.arange(3 * count, device=pixels.device).view(count, 1, 3)
    place = (pixels.view(count, -1, 3) + channel).flatten()
    if "autocontrast" in kinds or "equalize" in kinds:
        counts = torch.zeros(3 * count * 256, dtype=torch.int32, device=pixels.device)
        counts.scatter_add_(0, place, torch.ones_like(place, dtype=torch.int32))
        counts = counts.view(count, 3, 256)
    tables: dict[str, Callable[[], Tensor]] = {
        "brightness": lambda: values * factor,
        "contrast": lambda: values * factor + mean_grey(pixels)[:, None, None] * (1 - factor),
        "posterize": lambda: torch.floor(values / 2 ** (8 - factor)) * 2 ** (8 - factor),
        "solarize": lambda: torch.where(values >= factor, 255 - values, values),
        "autocontrast": lambda: autocontrast(counts),
        "equalize": lambda: equalize(counts),
    }
    for name in kinds:
        table = torch.where(is_one(operation, name)[:, None, None], tables[name](), table)
    mapped = table.clamp(0, 255).to(torch.uint8).flatten().index_select(0, place)
    return mapped.view(count, height, width, 3)


def grey(pixels: Pixels) -> Float[Tensor, "image height width"]:
    """Compute the brightness of each pixel, 0 to 255, whole numbers: 0.299 red + 0.587 green + 0.114 blue."""
    red, green, blue = pixels.float().unbind(-1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def mean_grey(pixels: Pixels) -> Float[Tensor, " image"]:
    """Compute the mean brightness of each image."""
    return grey(pixels).mean(dim=(1, 2))


def autocontrast(counts: Int[Tensor, "image 3 256"]) -> Float[Tensor, "image 3 256"]:
    """Return tables that map the darkest value of each channel to 0 and the brightest to 255, from its histogram."""
    values = torch.arange(256, dtype=torch.float32, device=counts.device)
    there = counts > 0
    dark = torch.where(there, values, 255.0).amin(dim=2, keepdim=True)
    bright = torch.where(there, values, 0.0).amax(dim=2, keepdim=True)
    scaled = (values - dark) / ((bright - dark) / 255).clamp(min=1e-6)
    return torch.where(bright > dark, scaled, values)


def equalize(counts: Int[Tensor, "image 3 256"]) -> Float[Tensor, "image 3 256"]:
    """Return tables that spread the values of each channel evenly, from its histogram.

    Source: Pillow 12, ImageOps.equalize, in whole numbers.
    """
    counts = counts.float()  # whole numbers below 2^24
    pixels, values = counts.sum(dim=2, keepdim=True), torch.arange(256, dtype=torch.float32, device=counts.device)
    last = torch.where(counts > 0, values, 0.0).amax(dim=2, keepdim=True)
    step = torch.floor((pixels - counts.gather(2, last.long())) / 255)
    below = counts.cumsum(dim=2) - counts
    spread = torch.floor((below + torch.floor(step / 2)) / step.clamp(min=1))
    return torch.where(step > 0, spread, values)


def by_place(
    pixels: Pixels, operation: Float[Tensor, " image"], factor: Float[Tensor, " image"], kinds: Sequence[str]
) -> Pixels:
    """Move each image towards its grey version (color) or its blurred one (sharpness), or away from it."""
    own, weight = pixels.float(), torch.zeros_like(factor)[:, None, None, None]
    other = own
    others: dict[str, Callable[[], Tensor]] = {
        "color": lambda: grey(pixels)[..., None],
        "sharpness": lambda: blurred(own),
    }
    for name in kinds:
        chosen = is_one(operation, name)[:, None, None, None]
        other = torch.where(chosen, others[name](), other)
        weight = torch.where(chosen, 1 - factor[:, None, None, None], weight)
    return (own * (1 - weight) + other * weight).clamp_(0, 255).to(torch.uint8)


def blurred(pixels: Float[Tensor, "image height width 3"]) -> Float[Tensor, "image height width 3"]:
    """Compute the mean of each pixel, 5 times, and its 8 neighbours, rounded; those at the border stay as they are."""
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = pixels.clone()
    smooth[:, 1:-1, 1:-1] = total.add_(pixels[:, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return smooth
