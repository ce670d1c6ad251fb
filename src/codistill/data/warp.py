"""Crops, flips and RandAugment's geometric operations of a batch, together in one sampling of each image."""

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Places = Float[Tensor, "image #height #width"]


def warped(
    images: UInt8[Tensor, "_ height width 3"],
    image: Int[Tensor, " image"],
    mirror: Bool[Tensor, " image"],
    affine: Float[Tensor, "6 image"] | None,
    crop: Float[Tensor, "4 image"] | None,
    shift: Int[Tensor, "2 image"],
    reflect: bool,
) -> UInt8[Tensor, "image height width 3"]:
    """Return chosen images, each cropped or enlarged, mirrored, then moved by a map of its own, in one sampling.

    Pixels from outside of the cropped image are black. Without `crop` the nearest pixel is taken, else four are
    interpolated.

    Args:
        images: All images.
        image: Which of them.
        mirror: Whether it is mirrored after the crop.
        affine: The first two rows of a matrix that maps (row, column, 1) of the result, from the centre, to the place
            in the cropped image; None: they are the same.
        crop: Part of the image that is enlarged to its size: first row and column, height and width; None: none is.
        shift: First row and column of a crop of the image's size, beside the image where it is padded.
        reflect: Whether padding mirrors the image instead of being black.
    """
    height, width = images.shape[1:3]
    row: Places = torch.arange(height, device=images.device, dtype=torch.float32)[None, :, None]
    column: Places = torch.arange(width, device=images.device, dtype=torch.float32)[None, None, :]
    inside: Tensor | None = None
    if affine is not None:
        down, right = row - (height - 1) / 2, column - (width - 1) / 2
        entries = affine[:, :, None, None]
        row = (entries[0] * down + entries[1] * right).add_(entries[2] + (height - 1) / 2)
        column = (entries[3] * down + entries[4] * right).add_(entries[5] + (width - 1) / 2)
        if crop is None:
            row, column = row.add_(0.5).floor_(), column.add_(0.5).floor_()
        inside = (row > -0.5) & (row < height - 0.5) & (column > -0.5) & (column < width - 0.5)
    column = torch.where(mirror[:, None, None], width - 1 - column, column)
    if crop is not None:
        top, left, rows, columns = crop[:, :, None, None]
        row = torch.minimum(torch.maximum(top + (row + 0.5) * (rows / height) - 0.5, top), top + rows - 1)
        column = torch.minimum(torch.maximum(left + (column + 0.5) * (columns / width) - 0.5, left), left + columns - 1)
        pixels = interpolated(images, image, row, column)
    else:
        row, seen_rows = shifted(row, shift[0], height, reflect)
        column, seen_columns = shifted(column, shift[1], width, reflect)
        seen = seen_rows & seen_columns
        inside = seen if inside is None else inside & seen
        pixels = taken(images, image, row.long(), column.long())
    return pixels if inside is None else pixels * inside[..., None]


def shifted(place: Places, shift: Int[Tensor, " image"], length: int, reflect: bool) -> tuple[Places, Tensor]:
    """Return places in an image of places in a crop from it, and whether they lie in the image or its reflection."""
    place = place + shift[:, None, None]
    last = length - 1
    if reflect:
        place = last - (last - place.abs()).abs()
    clamped = place.clamp(0, last)
    return clamped, torch.ones_like(place, dtype=torch.bool) if reflect else clamped == place


def taken(
    images: UInt8[Tensor, "_ height width 3"],
    image: Int[Tensor, " image"],
    row: Int[Tensor, "image #height #width"],
    column: Int[Tensor, "image #height #width"],
) -> UInt8[Tensor, "image height width 3"]:
    """Gather the pixels at whole places."""
    height, width, channels = images.shape[1:]
    place = (image[:, None, None] * height + row) * width + column
    return images.view(-1, channels).index_select(0, place.flatten()).view(*place.shape, channels)


def interpolated(
    images: UInt8[Tensor, "_ height width 3"], image: Int[Tensor, " image"], row: Places, column: Places
) -> UInt8[Tensor, "image height width 3"]:
    """Interpolate linearly between the four pixels around each place within an image, and round."""
    height, width = images.shape[1:3]
    top, left = row.floor(), column.floor()
    down, right = (row - top)[..., None], (column - left)[..., None]
    lower, further = ((each + 1).clamp(max=length - 1).long() for each, length in ((top, height), (left, width)))
    corners = [
        taken(images, image, each, side).float() for each in (top.long(), lower) for side in (left.long(), further)
    ]
    upper_line, lower_line = torch.lerp(corners[0], corners[1], right), torch.lerp(corners[2], corners[3], right)
    return torch.lerp(upper_line, lower_line, down).add_(0.5).to(torch.uint8)
