"""Images on the training device: epoch order, augmentation and normalisation of whole batches."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from codistill.core.randomness import EPOCH_STREAM, ORDER_STREAM, generator
from codistill.data.affine import Affine, Statistics
from codistill.data.colour import recolour
from codistill.data.dataset import Split
from codistill.data.mapped import in_memory
from codistill.data.mixing import erased, mixed, soft_labels
from codistill.data.policy import Transforms, balanced_order, paired_order
from codistill.data.warp import warped

PaddingMode = Literal["zeros", "reflect"]
CACHED = 1 << 18
"""Values of pixels that a core works on at a time."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops from a padded image and horizontal flips; padding 0 and flip False leave images as they are.

    `transforms` is what else is done to images and labels, if anything.
    """

    padding: int = 4
    padding_mode: PaddingMode = "zeros"
    flip: bool = True
    transforms: Transforms | None = None

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.transforms is not None and self.transforms.policy.mixes


class BatchIndices(NamedTuple):
    """Which images, where each is cropped and whether it is mirrored; index tables, no pixels."""

    image: Int[Tensor, " batch"]  # position in the training split
    top: Int[Tensor, " batch"]  # first row of the crop in the padded image, 0 to 2 * padding
    left: Int[Tensor, " batch"]  # first column, likewise
    mirror: Bool[Tensor, " batch"]
    drawn: Float[Tensor, "number batch"] | None = None  # see `Transforms.draw`

    def tables(self) -> tuple[Tensor, ...]:
        """Return the tables that are there."""
        return tuple(table for table in self if table is not None)

    def part(self, start: int, stop: int) -> "BatchIndices":
        """Return the indices of some of the images; tables may have a leading axis of views."""
        return BatchIndices(*(table[..., start:stop] for table in self.tables()))

    def partners(self) -> "BatchIndices":
        """Return the indices of the images with which those of a batch are mixed: the last with the first, and so on.

        They are a random pairing, for the order is random.
        """
        return BatchIndices(*(table.flip(-1) for table in self.tables()))


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
    labels: Int[Tensor, " image"] | None = None,
) -> BatchIndices:
    """Draw the order and the augmentation of one epoch, a pure function of (seed, epoch), equal on all devices.

    Args:
        images: Number of training images, or positions of those that are used, on the host.
        views: With more than one, each table gets a leading axis: the same images, other crops and flips.
        labels: Those of these images, on the host, for a sampling by classes; None: the order is shuffled.
    """
    source = generator(seed, EPOCH_STREAM, epoch)
    count = images if isinstance(images, int) else len(images)
    shape = (count,) if views == 1 else (views, count)
    order = torch.randperm(count, generator=source)
    transforms = augmentation.transforms
    if transforms is not None and labels is not None:
        if transforms.sampling == "balanced":
            order = torch.from_numpy(balanced_order(labels.numpy(), seed, epoch))
        elif transforms.sampling == "class-pairs":
            order = torch.from_numpy(paired_order(labels.numpy(), transforms.batch_size, seed, epoch))
    index = (order if isinstance(images, int) else images[order]).expand(shape).contiguous()
    offsets = torch.randint(0, 2 * augmentation.padding + 1, (2, *shape), generator=source)
    mirror = torch.rand(shape, generator=source) < 0.5 if augmentation.flip else torch.zeros(shape, dtype=torch.bool)
    drawn = transforms.draw(count, views, seed, epoch) if transforms is not None else None
    tables = (index, offsets[0], offsets[1], mirror, *([] if drawn is None else [drawn]))
    if device.type == "cuda":  # nothing waits for a copy from pinned memory
        return BatchIndices(*(table.pin_memory().to(device, non_blocking=True) for table in tables))
    return BatchIndices(*(table.to(device) for table in tables))


@dataclass(frozen=True)
class Tables:
    """Where each pixel of a crop comes from, for each offset of the crop; two lookups instead of their arithmetic."""

    offsets: int  # in one direction, 2 * padding + 1
    rows: Int[Tensor, "offset height"]  # the image's row of each row of the crop
    row_inside: Bool[Tensor, "offset height"] | None  # whether it is the image's own, not padding; None: show all
    columns: Int[Tensor, "mirrored_offset width"]  # the same of columns; then once more, for mirrored crops
    column_inside: Bool[Tensor, "mirrored_offset width"] | None
    class_weights: Float[Tensor, " class"] | None  # of the cross-entropy

    @classmethod
    def of(cls, height: int, width: int, augmentation: Augmentation, device: torch.device) -> "Tables":
        """Compute the tables for images of a size, in pixels, and put them on a device."""
        offsets = torch.arange(2 * augmentation.padding + 1)[:, None] - augmentation.padding
        rows, columns = torch.arange(height) + offsets, torch.arange(width) + offsets
        columns = torch.cat([columns, columns.flip(1)])
        weights = None if augmentation.transforms is None else augmentation.transforms.class_weights
        places = *_source(rows, augmentation, device), *_source(columns, augmentation, device)
        return cls(
            len(offsets), *places, None if weights is None else torch.tensor(weights, dtype=torch.float32).to(device)
        )


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

    streams = False  # whether the images stay in a file, and batches are read from it

    def __init__(self, split: Split, statistics: Statistics, device: torch.device) -> None:
        self.device = device
        self.images: UInt8[Tensor, "image height width 3"] = torch.from_numpy(in_memory(split.images)).to(device)
        self.labels: Int[Tensor, " image"] = torch.from_numpy(split.labels).to(device)
        self.files = split.files  # of all images of the split; empty where they are no files
        self.labels_on_host: Int[Tensor, " image"] = torch.from_numpy(split.labels)
        self.affine = Affine.normalise(statistics).to(device)
        self.positions: Int[Tensor, " used"] | None = None  # of the images used, on the host; None: all, in order
        self._places: Int[Tensor, " used"] | None = None  # the same, on the device
        self._tables: dict[Augmentation, Tables] = {}

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

    def batches(self, size: int) -> Iterator[tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]]:
        """Yield all used images in batches of a size, the last one smaller; see `batch`."""
        return (self.batch(start, start + size) for start in range(0, len(self), size))

    def for_steps(self, size: int) -> "DeviceImages":
        """Return the images for training steps with batches of at most that size."""
        return self

    def staged(self, indices: BatchIndices, steps: Sequence[tuple[int, int]]) -> Iterator[BatchIndices]:
        """Yield the indices of each batch of an epoch, from one place in it to before another, for a training step."""
        return (indices.part(start, stop) for start, stop in steps)

    def epoch(self, seed: int, epoch: int, augmentation: Augmentation, views: int) -> BatchIndices:
        """Draw the order and the augmentation of an epoch of the used images; see `epoch_indices`."""
        used = len(self) if self.positions is None else self.positions
        labels = self.labels_on_host if self.positions is None else self.labels_on_host[self.positions]
        return epoch_indices(used, seed, epoch, augmentation, self.device, views, labels)

    def augmented(
        self, indices: BatchIndices, augmentation: Augmentation, partners: BatchIndices | None = None
    ) -> tuple[Float[Tensor, "*view batch 3 height width"], Int[Tensor, " batch"] | Float[Tensor, "batch class"]]:
        """Return the augmented and normalised images of a batch, and their labels or, softened, shares of classes.

        Only static shapes and gathers: nothing is read back by the host. If the indices have a leading axis, the
        images have it too: one view of each image for each of its entries. `partners` are the images with which they
        are mixed, where the batch is a part of a larger one; None: as `BatchIndices.partners`.
        """
        images, targets = self.transformed(indices, augmentation)
        if augmentation.transforms is None or not augmentation.mixes:
            return images, targets
        others = (images.flip(-4), targets.flip(0)) if partners is None else self.transformed(partners, augmentation)
        drawn = augmentation.transforms.named(indices.drawn)
        share = drawn["share"].flatten()[: len(targets), None]
        return mixed(images, others[0], drawn["blend"][0], drawn.get("pasted")), torch.lerp(targets, others[1], share)

    def transformed(
        self, indices: BatchIndices, augmentation: Augmentation
    ) -> tuple[Float[Tensor, "*view batch 3 height width"], Int[Tensor, " batch"] | Float[Tensor, "batch class"]]:
        """Return the images and labels of a batch as `augmented` does, before they are mixed with each other."""
        tables, transforms = self.tables(augmentation), augmentation.transforms
        axes, labels = indices.image.shape, self.labels[indices.image.flatten()[: indices.image.shape[-1]]]
        indices = BatchIndices(*(table.flatten(-len(axes)) for table in indices.tables()))
        if transforms is None:
            images = self.normalised(self.cropped(indices, tables))
            return images.reshape(*axes, *images.shape[1:]), labels
        count = len(indices.image)
        # A CPU works on as many images at a time as stay in its cache, which also takes less memory.
        some = max(1, CACHED // self.images[0].numel()) if self.device.type == "cpu" else count
        parts = (indices.part(start, start + some) for start in range(0, count, some))
        images = self.normalised(torch.cat([self.redrawn(part, augmentation, transforms) for part in parts]))
        drawn = transforms.named(indices.drawn)
        if "erased" in drawn:
            images = erased(images, drawn["erased"])
        images = images.reshape(*axes, *images.shape[1:])
        if not transforms.softens:
            return images, labels
        smoothing = transforms.policy.label_smoothing
        return images, soft_labels(labels, transforms.classes, smoothing, tables.class_weights)

    def redrawn(
        self, indices: BatchIndices, augmentation: Augmentation, transforms: Transforms
    ) -> UInt8[Tensor, "batch height width 3"]:
        """Return the images of a batch after crops, flips and operations on places and colours."""
        drawn = transforms.named(indices.drawn)
        if {"affine", "crop"} & drawn.keys():
            shift = torch.stack([indices.top, indices.left]) - augmentation.padding
            places = drawn.get("affine"), drawn.get("crop"), shift, augmentation.padding_mode == "reflect"
            pixels = warped(self.images, indices.image, indices.mirror, *places)
        else:
            pixels = self.cropped(indices, self.tables(augmentation))
        for stage, kinds in enumerate(transforms.stages):
            pixels = recolour(pixels, drawn[f"operation{stage}"][0], drawn[f"factor{stage}"][0], kinds)
        return pixels

    def cropped(self, indices: BatchIndices, tables: Tables) -> UInt8[Tensor, "batch height width 3"]:
        """Return the cropped and flipped images of a batch.

        Equal to padding each image, cropping at (top, left) to the old size, then mirroring.
        """
        image, top, left, mirror, *_ = indices
        place = torch.add(left, mirror, alpha=tables.offsets)
        height, width, channels = self.images.shape[1:]
        # By one index for each pixel, which is four times as fast as by image, row and column.
        row = torch.add(tables.rows[top], image[:, None], alpha=height)
        index = torch.add(tables.columns[place][:, None, :], row[:, :, None], alpha=width)
        pixels = self.images.view(-1, channels).index_select(0, index.flatten()).view(*index.shape, channels)
        if tables.row_inside is not None and tables.column_inside is not None:
            inside = tables.row_inside[top][:, :, None] & tables.column_inside[place][:, None, :]
            pixels = pixels * inside[..., None]
        return pixels

    def normalised(self, pixels: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
        """Compute (pixels / 255 - mean) / std; the result is in channels_last memory format."""
        normalised: Tensor = self.affine(pixels.permute(0, 3, 1, 2))
        return normalised

    def tables(self, augmentation: Augmentation) -> Tables:
        """Return the tables of an augmentation, which are made once, on the stream that is current then."""
        if augmentation not in self._tables:
            height, width = self.images.shape[1:3]
            self._tables[augmentation] = Tables.of(height, width, augmentation, self.device)
        return self._tables[augmentation]
