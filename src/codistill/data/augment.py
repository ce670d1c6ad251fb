"""Images on the training device: epoch order, random crops and flips, and normalisation of whole batches."""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from codistill.core.randomness import EPOCH_STREAM, ORDER_STREAM, generator
from codistill.data.affine import Affine, Statistics
from codistill.data.dataset import Split

PaddingMode = Literal["zeros", "reflect"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops from a padded image and horizontal flips; padding 0 and flip False leave images as they are."""

    padding: int = 4
    padding_mode: PaddingMode = "zeros"
    flip: bool = True


class BatchIndices(NamedTuple):
    """Which images, where each is cropped and whether it is mirrored; index tables, no pixels."""

    image: Int[Tensor, " batch"]  # position in the training split
    top: Int[Tensor, " batch"]  # first row of the crop in the padded image, 0 to 2 * padding
    left: Int[Tensor, " batch"]  # first column, likewise
    mirror: Bool[Tensor, " batch"]

    def part(self, start: int, stop: int) -> "BatchIndices":
        """Return the indices of some of the images; tables may have a leading axis of views."""
        return BatchIndices(*(table[..., start:stop] for table in self))


def seeded_order(count: int, seed: int) -> Int[Tensor, " count"]:
    """Return the order of the training images from which limits and validation splits are taken."""
    return torch.randperm(count, generator=generator(seed, ORDER_STREAM))


def epoch_indices(
    images: int | Int[Tensor, " image"],
    seed: int,
    epoch: int,
    augmentation: Augmentation,
    device: torch.device,
    views: int = 1,
) -> BatchIndices:
    """Draw the order, crops and flips of one epoch, a pure function of (seed, epoch), equal on all devices.

    Args:
        images: Number of training images, or positions of those that are used, on the host.
        views: With more than one, each table gets a leading axis: the same images, other crops and flips.
    """
    source = generator(seed, EPOCH_STREAM, epoch)
    count = images if isinstance(images, int) else len(images)
    shape = (count,) if views == 1 else (views, count)
    order = torch.randperm(count, generator=source)
    index = (order if isinstance(images, int) else images[order]).expand(shape).contiguous()
    offsets = torch.randint(0, 2 * augmentation.padding + 1, (2, *shape), generator=source)
    mirror = torch.rand(shape, generator=source) < 0.5 if augmentation.flip else torch.zeros(shape, dtype=torch.bool)
    tables = (index, offsets[0], offsets[1], mirror)
    if device.type == "cuda":  # nothing waits for a copy from pinned memory
        return BatchIndices(*(table.pin_memory().to(device, non_blocking=True) for table in tables))
    return BatchIndices(*(table.to(device) for table in tables))


@dataclass(frozen=True)
class Crops:
    """Where each pixel of a crop comes from, for each offset of the crop; two lookups instead of their arithmetic."""

    offsets: int  # in one direction, 2 * padding + 1
    rows: Int[Tensor, "offset height"]  # the image's row of each row of the crop
    row_inside: Bool[Tensor, "offset height"] | None  # whether it is the image's own, not padding; None: show all
    columns: Int[Tensor, "mirrored_offset width"]  # the same of columns; then once more, for mirrored crops
    column_inside: Bool[Tensor, "mirrored_offset width"] | None

    @classmethod
    def tables(cls, height: int, width: int, augmentation: Augmentation, device: torch.device) -> "Crops":
        """Compute the tables for images of a size, in pixels, and put them on a device."""
        offsets = torch.arange(2 * augmentation.padding + 1)[:, None] - augmentation.padding
        rows, columns = torch.arange(height) + offsets, torch.arange(width) + offsets
        columns = torch.cat([columns, columns.flip(1)])
        return cls(len(offsets), *_source(rows, augmentation, device), *_source(columns, augmentation, device))


def _source(
    place: Int[Tensor, "offset length"], augmentation: Augmentation, device: torch.device
) -> tuple[Int[Tensor, "offset length"], Bool[Tensor, "offset length"] | None]:
    """Return places in the image of places relative to it, which may lie in the padding, and which are to be shown."""
    last = place.shape[1] - 1
    if augmentation.padding_mode == "reflect":
        place = last - (last - place.abs()).abs()
    clamped = place.clamp(0, last)
    black = augmentation.padding > 0 and augmentation.padding_mode == "zeros"
    return clamped.to(device), (clamped == place).to(device) if black else None


class DeviceImages:
    """A split as uint8 tensors on a device, with the normalisation of its data set."""

    def __init__(self, split: Split, statistics: Statistics, device: torch.device) -> None:
        self.device = device
        self.images: UInt8[Tensor, "image height width 3"] = torch.from_numpy(split.images).to(device)
        self.labels: Int[Tensor, " image"] = torch.from_numpy(split.labels).to(device)
        self.files = split.files  # of all images of the split; empty where they are no files
        self.affine = Affine.normalise(statistics).to(device)
        self.positions: Int[Tensor, " used"] | None = None  # of the images used, on the host; None: all, in order
        self._places: Int[Tensor, " used"] | None = None  # the same, on the device
        self._crops: dict[Augmentation, Crops] = {}

    def subset(self, positions: Int[Tensor, " used"]) -> "DeviceImages":
        """Return the images at positions (on the host) of the split; pixels and labels are shared, not copied."""
        part = copy.copy(self)
        part.positions, part._places = positions, positions.to(self.device)
        return part

    def __len__(self) -> int:
        return len(self.labels if self.positions is None else self.positions)

    def batch(self, start: int, stop: int) -> tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Return used images from `start` to before `stop`, normalised and otherwise as they are, and their labels."""
        chosen = slice(start, stop) if self._places is None else self._places[start:stop]
        return self.normalised(self.images[chosen]), self.labels[chosen]

    def augmented(
        self, indices: BatchIndices, augmentation: Augmentation
    ) -> tuple[Float[Tensor, "*view batch 3 height width"], Int[Tensor, " batch"]]:
        """Return the cropped, flipped and normalised images of a batch, and their labels.

        Equal to padding each image (before normalisation), cropping at (top, left) to the old size, then mirroring.
        Only static shapes and gathers: nothing is read back by the host. If the indices have a leading axis, the
        images have it too: one view of each image for each of its entries.
        """
        crops = self.crops(augmentation)
        image, top, left, mirror = (table.flatten() for table in indices)
        place = torch.add(left, mirror, alpha=crops.offsets)
        height, width, channels = self.images.shape[1:]
        # By one index for each pixel, which is four times as fast as by image, row and column.
        row = torch.add(crops.rows[top], image[:, None], alpha=height)
        index = torch.add(crops.columns[place][:, None, :], row[:, :, None], alpha=width)
        pixels = self.images.view(-1, channels).index_select(0, index.flatten()).view(*index.shape, channels)
        if crops.row_inside is not None and crops.column_inside is not None:
            inside = crops.row_inside[top][:, :, None] & crops.column_inside[place][:, None, :]
            pixels = pixels * inside[..., None]
        images = self.normalised(pixels)
        labels = self.labels[image[: indices.image.shape[-1]]]
        return images.reshape(*indices.image.shape, *images.shape[1:]), labels

    def normalised(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
        """Compute (pixels / 255 - mean) / std; the result is in channels_last memory format."""
        normalised: Tensor = self.affine(pixels.permute(0, 3, 1, 2))
        return normalised

    def crops(self, augmentation: Augmentation) -> Crops:
        """Return the tables of an augmentation, which are made once, on the stream that is current then."""
        if augmentation not in self._crops:
            height, width = self.images.shape[1:3]
            self._crops[augmentation] = Crops.tables(height, width, augmentation, self.device)
        return self._crops[augmentation]
