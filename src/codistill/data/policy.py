"""What is done to training images beyond crops and flips, and the numbers drawn for it: a function of (seed, epoch)."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from codistill.core.randomness import AUGMENT_STREAM, stream_seed

AutoAugment = Literal["none", "randaugment", "trivialaugment"]
Sampling = Literal["shuffled", "balanced", "class-pairs"]
Numbers = npt.NDArray[np.float32]
# Operations on colours, by their numbers in a table; 0 leaves an image as it is, and so do geometric ones there.
COLOURS = ("none", "brightness", "contrast", "posterize", "solarize", "autocontrast", "equalize", "color", "sharpness")
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
JITTER = ("brightness", "contrast", "color")
LEVELS = 30
"""The strongest magnitude, as in torchvision's 31 bins."""
TRIES = 10
"""Of a random rectangle, until one lies within the image."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Augmentation beyond crops and flips; all off by default."""

    auto_augment: AutoAugment = "none"
    """Random operations on each training image: randaugment (some, of one strength), trivialaugment (one, of any
    strength), or none."""
    randaugment_operations: int = 2
    """Operations on each image by randaugment."""
    randaugment_magnitude: int = 9
    """Strength of randaugment's operations, from 0 to 30."""
    resized_crop: float = 1.0
    """Cut out a random part of each training image and enlarge it: the smallest part of its area, such as 0.08; takes
    the place of padding. 1: off."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation of each training image by factors up to 1 - X and 1 + X; 0: off."""
    random_erasing: float = 0.0
    """Share of the training images in which a random rectangle is erased."""
    mixup: float = 0.0
    """Blend each training image and its label with another one of the batch: alpha of the Beta distribution of their
    shares, such as 0.2; 0: off. With cutmix, too, each image draws one of the two."""
    cutmix: float = 0.0
    """Paste a rectangle of another image of the batch into each training image, and mix the labels by area: alpha,
    such as 1; 0: off."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes, such as 0.1."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """A policy for images of one size and labels of so many classes."""

    policy: Policy
    size: tuple[int, int]  # height and width, pixels
    classes: int
    class_weights: tuple[float, ...] | None = None  # of the cross-entropy; None: all 1
    sampling: Sampling = "shuffled"  # which images an epoch has, and in which order
    batch_size: int = 0  # of sampling by class-pairs

    @property
    def softens(self) -> bool:
        """Whether labels become shares of classes."""
        return self.policy.mixes or self.policy.label_smoothing > 0 or self.class_weights is not None

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The operations on colours among which each image draws one, stage by stage."""
        jitter, policy = (JITTER,) * 3 if self.policy.color_jitter else (), self.policy
        random = {"none": 0, "trivialaugment": 1, "randaugment": policy.randaugment_operations}[policy.auto_augment]
        return jitter + (COLOURS[1:],) * random

    @functools.cached_property
    def rows(self) -> dict[str, slice]:
        """The rows of the table of drawn numbers, by their meaning."""
        policy, lengths = self.policy, dict[str, int]()
        if policy.auto_augment != "none":
            lengths["affine"] = 6
        if policy.resized_crop < 1:
            lengths["crop"] = 4
        lengths |= {f"{what}{stage}": 1 for stage in range(len(self.stages)) for what in ("operation", "factor")}
        if policy.random_erasing:
            lengths["erased"] = 4
        if policy.mixes:
            lengths |= {"share": 1, "blend": 1} | ({"pasted": 4} if policy.cutmix else {})
        ends = itertools.accumulate(lengths.values(), initial=0)
        return {name: slice(*ends) for name, ends in zip(lengths, itertools.pairwise(ends), strict=True)}

    def named(self, drawn: Float[Tensor, "number *some"] | None) -> dict[str, Float[Tensor, "row *some"]]:
        """Return the numbers that `draw` has drawn, or those of some images, by their meaning."""
        return {} if drawn is None else {name: drawn[rows] for name, rows in self.rows.items()}

    def draw(self, count: int, views: int, seed: int, epoch: int) -> Float[Tensor, "number *view image"] | None:
        """Draw the numbers of an epoch for so many images; None: no row is needed.

        Each view has its own, but for those of mixing: the label of an image is one for all students.
        """
        if not self.rows:
            return None
        found = np.empty((max(each.stop for each in self.rows.values()), views, count), np.float32)

        def source(part: int) -> np.random.Generator:
            """Make the generator of a part of the augmentation; what is drawn does not depend on other parts."""
            return np.random.default_rng(stream_seed(seed, AUGMENT_STREAM, epoch, part))

        shape, at = (views, count), self.rows
        if self.policy.resized_crop < 1:
            found[at["crop"]] = crops(source(0), shape, self.size, self.policy.resized_crop)
        stages: list[tuple[Numbers, Numbers]] = []
        if self.policy.color_jitter:
            stages += jitter(source(1), shape, self.policy.color_jitter)
        if self.policy.auto_augment != "none":
            operations, found[at["affine"]] = automatic(source(2), shape, self.size, self.policy)
            stages += operations
        for stage, (operation, factor) in enumerate(stages):
            found[at[f"operation{stage}"]], found[at[f"factor{stage}"]] = operation, factor
        if self.policy.random_erasing:
            found[at["erased"]] = erasures(source(3), shape, self.size, self.policy.random_erasing)
        if self.policy.mixes:
            mixed = mixtures(source(4), count, self.size, self.policy)
            for name, numbers in zip(("share", "blend", "pasted"), mixed, strict=True):
                if name in at:
                    found[at[name]] = numbers[..., None, :]
        return torch.from_numpy(found if views > 1 else found[:, 0])


def automatic(
    source: np.random.Generator, shape: tuple[int, ...], size: tuple[int, int], policy: Policy
) -> tuple[list[tuple[Numbers, Numbers]], Numbers]:
    """Draw the operations of RandAugment or TrivialAugment.

    Returns:
        The number of the operation on colours and its factor, stage by stage; and what the geometric ones amount to,
        six entries of a matrix that maps (row, column, 1) of the augmented image, from its centre, to a place before.

    Source: Cubuk et al., "RandAugment", arXiv 1909.13719; Müller and Hutter, "TrivialAugment", ICCV 2021, arXiv
        2103.10158, the wide space; operations and strengths of torchvision 0.29, RandAugment and TrivialAugmentWide.
    Differs: in one image geometric operations are done before those on colours, by one map, with black outside.
    """
    wide = policy.auto_augment == "trivialaugment"
    height, width = size
    total = np.broadcast_to(np.eye(3, dtype=np.float64), (*shape, 3, 3))
    stages = []
    for _ in range(1 if wide else policy.randaugment_operations):
        number = source.integers(0, len(COLOURS) + len(GEOMETRY), shape)
        level = source.integers(0, LEVELS + 1, shape) if wide else np.full(shape, policy.randaugment_magnitude)
        strength, sign = level / LEVELS, source.integers(0, 2, shape) * 2.0 - 1
        factor = 1 + sign * strength * (0.99 if wide else 0.9)
        factor = np.where(number == COLOURS.index("posterize"), 8 - np.round(strength * (6 if wide else 4)), factor)
        factor = np.where(number == COLOURS.index("solarize"), 255 * (1 - strength), factor)
        stages.append((np.where(number < len(COLOURS), number, 0).astype(np.float32), factor.astype(np.float32)))
        shear = sign * strength * (0.99 if wide else 0.3)
        far = (32.0, 32.0) if wide else (150 / 331 * height, 150 / 331 * width)
        down, right = (np.trunc(sign * strength * each) for each in far)
        angle = np.radians(sign * strength * (135 if wide else 30))
        this = np.zeros((*shape, 3, 3))
        this[..., range(3), range(3)] = 1
        kind = [number == len(COLOURS) + index for index in range(len(GEOMETRY))]
        # Shears leave the first row or column of pixels, whose outer edge is half an image from the centre.
        this[..., 1, 0] = np.where(kind[0], shear, 0)
        this[..., 1, 2] = np.where(kind[0], shear * height / 2, 0) - np.where(kind[2], right, 0)
        this[..., 0, 1] = np.where(kind[1], shear, 0)
        this[..., 0, 2] = np.where(kind[1], shear * width / 2, 0) - np.where(kind[3], down, 0)
        turn = np.where(kind[4], angle, 0)
        this[..., 0, 0], this[..., 1, 1] = np.cos(turn), np.cos(turn)
        this[..., 0, 1] += np.sin(turn)
        this[..., 1, 0] -= np.sin(turn)
        total = total @ this
    return stages, np.moveaxis(total[..., :2, :].reshape(*shape, 6), -1, 0).astype(np.float32)


def jitter(source: np.random.Generator, shape: tuple[int, ...], strength: float) -> list[tuple[Numbers, Numbers]]:
    """Draw brightness, contrast and saturation, in an order of its own for each image.

    Source: torchvision 0.29, ColorJitter. Differs: the hue stays as it is.
    """
    order = source.permuted(np.broadcast_to(np.arange(3), (*shape, 3)).copy(), axis=-1)
    numbers = np.array([COLOURS.index(each) for each in JITTER], np.float32)[order]
    factors = source.uniform(max(0.0, 1 - strength), 1 + strength, (*shape, 3)).astype(np.float32)
    return [(numbers[..., stage], factors[..., stage]) for stage in range(3)]


def rectangles(
    source: np.random.Generator,
    shape: tuple[int, ...],
    size: tuple[int, int],
    areas: tuple[float, float],
    ratios: tuple[float, float],
) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """Draw rectangles of an area (a share of the image) and a ratio of width to height that lie within an image.

    Returns:
        First row and column, height and width, and whether one of ten tries lay within.
    """
    height, width = size
    area = source.uniform(*areas, (*shape, TRIES)) * height * width
    ratio = np.exp(source.uniform(math.log(ratios[0]), math.log(ratios[1]), (*shape, TRIES)))
    rows, columns = np.round(np.sqrt(area / ratio)), np.round(np.sqrt(area * ratio))
    fits = (rows > 0) & (columns > 0) & (rows <= height) & (columns <= width)
    first = fits.argmax(axis=-1)[..., None]
    rows, columns = (np.take_along_axis(each, first, -1)[..., 0] for each in (rows, columns))
    place = source.random((2, *shape))
    top, left = np.floor(place[0] * (height - rows + 1)), np.floor(place[1] * (width - columns + 1))
    return np.stack([top, left, rows, columns]).astype(np.float32), np.asarray(fits.any(axis=-1))


def crops(source: np.random.Generator, shape: tuple[int, ...], size: tuple[int, int], smallest: float) -> Numbers:
    """Draw the part of each image that is cut out; as a last resort it is the centre.

    Source: torchvision 0.29, RandomResizedCrop, ratios from 3/4 to 4/3.
    """
    height, width = size
    found, fits = rectangles(source, shape, size, (smallest, 1.0), (3 / 4, 4 / 3))
    rows, columns = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    centre = np.array([(height - rows) // 2, (width - columns) // 2, rows, columns], np.float32)
    return np.where(fits, found, centre.reshape(4, *(1 for _ in shape)))


def erasures(source: np.random.Generator, shape: tuple[int, ...], size: tuple[int, int], share: float) -> Numbers:
    """Draw a rectangle for a share of the images, and an empty one for the others: top, left, bottom, right.

    Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, arXiv 1708.04896; areas from 0.02 to 0.33 and
        ratios from 0.3 to 3.3 as in torchvision 0.29, RandomErasing.
    """
    found, fits = rectangles(source, shape, size, (0.02, 0.33), (0.3, 3.3))
    chosen = (source.random(shape) < share) & fits
    top, left, rows, columns = found
    return np.where(chosen, np.stack([top, left, top + rows, left + columns]), np.float32(0))


def mixtures(
    source: np.random.Generator, count: int, size: tuple[int, int], policy: Policy
) -> tuple[Numbers, Numbers, Numbers]:
    """Draw how much of its partner each image gets.

    Returns:
        The partner's share of the label; its share of each pixel; and the rectangle in which it has all of them, top,
        left, bottom, right, empty in mixup.

    Source: Zhang et al., "mixup", ICLR 2018, arXiv 1710.09412; Yun et al., "CutMix", ICCV 2019, arXiv 1905.04899.
    Differs: each image draws its own share, not each batch.
    """
    height, width = size
    blend = 1 - source.beta(policy.mixup, policy.mixup, count) if policy.mixup else np.zeros(count)
    pasted, area = np.zeros((4, count)), np.zeros(count)
    if policy.cutmix:
        side = np.sqrt(1 - source.beta(policy.cutmix, policy.cutmix, count))
        rows, columns = np.floor(height * side), np.floor(width * side)
        row, column = source.integers(0, height, count), source.integers(0, width, count)
        top, left = row - rows // 2, column - columns // 2
        pasted = np.stack([top.clip(0), left.clip(0), (top + rows).clip(max=height), (left + columns).clip(max=width)])
        area = (pasted[2] - pasted[0]) * (pasted[3] - pasted[1]) / (height * width)
    cut = source.random(count) < (0.5 if policy.mixup and policy.cutmix else float(policy.cutmix > 0))
    share, blend, pasted = np.where(cut, area, blend), np.where(cut, 0, blend), np.where(cut, pasted, 0)
    return share.astype(np.float32)[None], blend.astype(np.float32)[None], pasted.astype(np.float32)


def by_class(labels: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Return the places of the images of each class that has any."""
    places = np.argsort(labels, kind="stable")
    return np.split(places, np.unique(labels[places], return_index=True)[1][1:])


def in_rounds(
    source: np.random.Generator, members: npt.NDArray[np.int64], wanted: int, whole: int
) -> npt.NDArray[np.int64]:
    """Draw so many members, in rounds of `whole` different ones, so that all come equally often or once more."""
    rounds = range(math.ceil(wanted / whole))
    return np.concatenate([source.permutation(members)[:whole] for _ in rounds])[:wanted]


def balanced_order(labels: npt.NDArray[np.int64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Draw the order of an epoch with equally many images of each class, as many as there are images in all.

    Of a large class some are left out, other ones in each epoch, and those of a small class come several times, each
    as often as the others or once more. Which classes have an image more than others is drawn, too.
    """
    source = np.random.default_rng(stream_seed(seed, AUGMENT_STREAM, epoch, 5))
    members, chosen = by_class(labels), []
    for index, own in enumerate(source.permutation(len(members)).tolist()):
        wanted = len(labels) // len(members) + (index < len(labels) % len(members))
        chosen.append(in_rounds(source, members[own], wanted, len(members[own])))
    return source.permutation(np.concatenate(chosen))


def paired_order(labels: npt.NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Draw the order of an epoch whose batches have two different images of each of their classes.

    Each batch draws its classes: different ones, or, where it has more pairs than there are classes, all of them before
    one comes again. Of a class all images come equally often but for one, as far as that goes. A last batch of an odd
    size has a single image of one class.

    Args:
        labels: Those of the training images; their number is that of the images in an epoch.
        batch_size: Even.

    Source: the sampler of mutual contrastive learning, authors' code winycg/MCL at 61f20d1, dataset/class_sampler.py.
    Differs: there each batch draws images anew, so that in an epoch some come several times and others not at all, more
        classes than half of a batch are required, and a last batch that is smaller is left out.
    """
    source = np.random.default_rng(stream_seed(seed, AUGMENT_STREAM, epoch, 6))
    members, count = by_class(labels), len(labels)
    batches = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    owners = np.empty(count, np.int64)
    for batch in batches:
        pairs = math.ceil((batch.stop - batch.start) / 2)
        rounds = [source.permutation(len(members)) for _ in range(math.ceil(pairs / len(members)))]
        owners[batch] = np.repeat(np.concatenate(rounds)[:pairs], 2)[: batch.stop - batch.start]
    order = np.empty(count, np.int64)
    for own, places in zip(np.unique(owners).tolist(), by_class(owners), strict=True):
        # An odd image is left out of a round, or it would be paired with itself.
        whole = max(1, len(members[own]) // 2 * 2)
        order[places] = in_rounds(source, members[own], len(places), whole)
    return np.concatenate([source.permutation(order[batch]) for batch in batches])


def balanced_weights(labels: npt.NDArray[np.int64], classes: int) -> tuple[float, ...]:
    """Compute the weight n / (k n_c) of each class from the n labels of its k classes; their mean over the images is 1.

    A class without an image has the weight 0.
    """
    counts = np.bincount(labels, minlength=classes).tolist()
    present = sum(count > 0 for count in counts)
    return tuple(len(labels) / (present * count) if count else 0.0 for count in counts)
