"""Gathering, cropping, flipping and normalising a batch of images in one Triton kernel."""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,misc"

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from codistill.data.augment import Augmentation, Batch, DeviceImages

BLOCK = 1024
"""Values of one image that a program computes."""
WARPS = 4
TABLES = ("image_in", "top_in", "left_in", "mirror_in")


@triton.jit
def _source(place, LENGTH: tl.constexpr, REFLECTED: tl.constexpr):
    """Turn places relative to the unpadded image into places in it, and say which lay inside."""
    if REFLECTED:
        place = (LENGTH - 1) - tl.abs((LENGTH - 1) - tl.abs(place))
    inside = (place >= 0) & (place < LENGTH)
    return tl.minimum(tl.maximum(place, 0), LENGTH - 1), inside


# Tables are parts of an epoch's: whether they are aligned differs from step to step, and is not to compile a second
# kernel, perhaps while a graph is being captured.
@triton.jit(do_not_specialize_on_alignment=TABLES)
def crop(
    images,
    labels,
    scale,
    shift,
    image_in,
    top_in,
    left_in,
    mirror_in,
    result,
    labels_out,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    REFLECTED: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """Store some values of a crop, height by width by channel as in memory; the first program of it, its label."""
    image = tl.load(image_in + tl.program_id(0)).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(labels_out + tl.program_id(0), tl.load(labels + image))
    top = tl.load(top_in + tl.program_id(0)).to(tl.int32)
    left = tl.load(left_in + tl.program_id(0)).to(tl.int32)
    mirrored = tl.load(mirror_in + tl.program_id(0)).to(tl.int32) != 0
    value = tl.program_id(1) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    exists = value < HEIGHT * WIDTH * 3
    channel, pixel = value % 3, value // 3
    column = pixel % WIDTH
    row, row_inside = _source(pixel // WIDTH + top - PADDING, HEIGHT, REFLECTED)
    column = tl.where(mirrored, WIDTH - 1 - column, column)
    column, column_inside = _source(column + left - PADDING, WIDTH, REFLECTED)
    shown = exists
    if not REFLECTED:
        # What lies outside is black, before it is normalised.
        shown = exists & row_inside & column_inside
    offset = image * (HEIGHT * WIDTH * 3) + (row * WIDTH + column) * 3 + channel
    product = tl.load(images + offset, shown, 0).to(tl.float32) * tl.load(scale + channel, exists, 0.0)
    first = tl.program_id(0).to(tl.int64) * (HEIGHT * WIDTH * 3)
    tl.store(result + first + value, product + tl.load(shift + channel, exists, 0.0), exists)


def augmented(
    images: DeviceImages, batch: Batch, augmentation: Augmentation
) -> tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
    """Compute what `DeviceImages.augmented` computes, to the same bits and in the same memory layout, in one launch.

    No host read and nothing random: it may be captured in a CUDA graph. Places are computed, not looked up.

    Args:
        images: A split on a CUDA device (or on a CPU, in Triton's interpreter).
        batch: Tables of one axis; integers, and booleans for `mirror`. They are not checked: an image or an offset that
            is out of range reads what it should not.
        augmentation: The same as the batch was drawn with.

    Returns:
        The cropped, flipped and normalised images in float32 and channels_last, and their labels.
    """
    image, top, left, mirror = (table.contiguous() for table in batch)
    count, (height, width) = len(image), images.images.shape[1:3]
    result = images.scale.new_empty(count, height, width, 3)
    labels = torch.empty_like(image, dtype=images.labels.dtype)
    with torch.cuda.device_of(images.images):
        # Stock kernels round the product before they add to it: multiplication and addition must not become one.
        crop[(count, triton.cdiv(height * width * 3, BLOCK))](
            images.images,
            images.labels,
            images.scale,
            images.shift,
            image,
            top,
            left,
            mirror.view(torch.uint8),
            result,
            labels,
            HEIGHT=height,
            WIDTH=width,
            PADDING=augmentation.padding,
            REFLECTED=augmentation.padding_mode == "reflect",
            BLOCK_VALUES=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return result.permute(0, 3, 1, 2), labels
