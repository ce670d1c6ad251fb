"""A data set: two splits of uint8 images in memory, their labels and the names of the classes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codistill.core.errors import DataError, UsageError
from codistill.core.registry import Registry, write_spec
from codistill.data.mapped import facts_of, histogram

DATASETS: Registry[Callable[..., "Dataset"]] = Registry("data set", "codistill.data")

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

LEAST_DEVIATION = 0.05
"""Of a channel, in units of the full range: photos have 0.1 to 0.35, faint ones 0.05, and padding is 20 of it away."""

UNEVEN = 2.0
"""Ratio of the numbers of images of two classes from which on it is said."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Lists, tensors, and arrays with other strides or integer types are converted where no value changes. A memory map
    (np.load(.., mmap_mode="r")) stays one.

    Attributes:
        images: uint8 [images, height, width, 3], RGB.
        labels: int64 [images], class indices from 0.
        files: Path of each image relative to the root of its data set, with forward slashes; empty: no files.

    Raises:
        DataError: Something that is no array, such as images of several sizes.
    """

    images: Pixels
    labels: Labels
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, wanted in (("images", np.uint8), ("labels", np.int64)):
            object.__setattr__(self, name, _converted(name, getattr(self, name), wanted))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in memory, checked when it is made.

    Attributes:
        name: As registered.
        train: Training images and labels.
        test: Test images and labels.
        class_names: One per label, in order; numbers become texts.
        validation: Images that choose epoch and student, where the data set has a split of its own for it.
        flip: Whether a mirrored image keeps its label; the default of the augmentation.
        spec: Name and options given to `dataset`, so that a run can be repeated; empty for arrays of your own.
        root: Path of the files; empty for an embedded data set.
        left_out: Files in root that could not be used, where leaving them out was asked for.
        drawn: How test images were drawn where none are set apart; empty: they are.
        interpolation: How images were scaled to their size, as Pillow names it.
        own: Whether these are files of the user, whose classes and splits nobody has looked at: when a run begins, it
            says where classes are uneven, and which images of different splits are alike.

    Raises:
        DataError: Wrong array shapes or types, no images, a label out of range, or a class name that is no text.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    flip: bool = True
    spec: str = ""
    root: str = ""
    left_out: tuple[str, ...] = ()
    validation: Split | None = None
    drawn: str = ""
    interpolation: str = "bilinear"
    own: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", _class_names(self.class_names, f"data set {self.name}"))
        for part, split in self.splits.items():
            check_split(split, len(self.class_names), f"data set {self.name}, {part}")
            if self.train.images.shape[1:] != split.images.shape[1:]:
                sizes = f"train images are {size_of(self.train.images)} but {part} images are {size_of(split.images)}"
                raise DataError(f"data set {self.name}: {sizes}: give both one size")

    def __repr__(self) -> str:
        images = f"{len(self.train)} training and {len(self.test)} test images of {size_of(self.train.images)}"
        return f"Dataset({self.name!r}: {images}, {self.num_classes} classes)"

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name: train, validation where there is one, test."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, **validation, "test": self.test}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of every image, pixels."""
        height, width = self.train.images.shape[1:3]
        return int(height), int(width)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, as images are normalised: see `spread`.

        A deviation is at least `LEAST_DEVIATION`, or black padding beside a channel that is 255 nearly everywhere
        would be far outside of what networks can learn from.
        """
        mean, std = self.spread
        return mean, tuple(max(each, LEAST_DEVIATION) for each in std)

    @property
    def bounded(self) -> str:
        """A line about channels of which `statistics` bounds the deviation; empty: there are none."""
        few = [
            f"{name} (mean {255 * mean:.4g}, deviation {255 * std:.2g} of 255)"
            for name, mean, std in zip(("red", "green", "blue"), *self.spread, strict=True)
            if std < LEAST_DEVIATION
        ]
        words = f"normalisation divides by {255 * LEAST_DEVIATION:g} of 255 instead"
        return f"data set {self.name}: hardly any spread in {', '.join(few)}: {words}" if few else ""

    @property
    def class_counts(self) -> dict[str, list[int]]:
        """Number of images of each class, in the order of the class names, by split."""
        return {
            name: np.bincount(split.labels, minlength=self.num_classes).tolist() for name, split in self.splits.items()
        }

    @property
    def uneven(self) -> str:
        """A line about classes of which there are far more training images than of others; empty: there are none."""
        counts = self.class_counts["train"]
        few, many = min(counts), max(counts)
        if many < UNEVEN * few:
            return ""
        least, most = (f"{count} of {self.class_names[counts.index(count)]}" for count in (few, many))
        return f"data set {self.name}: classes are uneven, from {least} to {most} training images"

    @cached_property
    def spread(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all training pixels, in units of the full range (0..1).

        Exact: computed from a histogram of the pixel values, so it does not depend on the order of the images.
        """
        values = np.arange(256) / 255
        facts = facts_of(self.train.images)
        mean, std = [], []
        for channel in histogram(self.train.images) if facts is None else facts.histogram:
            counts = channel / channel.sum()
            centre = float(counts @ values)
            mean.append(centre)
            std.append(float(counts @ (values - centre) ** 2) ** 0.5)
        return tuple(mean), tuple(std)


def _converted(name: str, values: Any, wanted: type[np.integer[Any]]) -> npt.NDArray[Any]:
    """Return an array of the wanted type if its values fit, else as it is, contiguous and writeable as torch wants."""
    try:
        array = values if isinstance(values, np.memmap) else np.asarray(values)
    except Exception as error:  # whatever the object's own conversion raises
        found = " ".join(str(error).split())
        raise DataError(f"{name} cannot be made an array ({found}): give a NumPy array of {wanted.__name__}") from error
    if isinstance(array, np.memmap) and array.dtype == wanted and array.flags.c_contiguous:
        return array  # it may be larger than memory, so it is neither read nor copied
    bounds = np.iinfo(wanted)
    kinds = "ui" if wanted is np.uint8 else "bui"  # images of 0 and 1 would be black
    if array.dtype.kind in kinds and (array.size == 0 or bounds.min <= array.min() <= array.max() <= bounds.max):
        array = array.astype(wanted, copy=False)
    return np.require(array, requirements=["C", "W"])


def _class_names(names: Any, where: str) -> tuple[str, ...]:
    if isinstance(names, str | bytes | set | frozenset | Mapping) or not np.iterable(names):
        raise DataError(f"{where}: class_names is {names!r}: give a list of texts, one a class")
    names, texts = list(names), []
    for index, name in enumerate(names):
        text = name.decode(errors="replace") if isinstance(name, bytes) else name
        if not isinstance(text, str | int | float | np.number):
            raise DataError(f"{where}: class name {index} is {name!r}: give a text")
        texts.append(str(text))
    if len(set(texts)) < len(set(names)):
        raise DataError(f"{where}: class_names are alike when written as texts: give each class a text of its own")
    return tuple(texts)


def size_of(images: Pixels) -> str:
    """Return the size of images as text, height x width."""
    return "x".join(str(length) for length in images.shape[1:3])


def check_split(split: Split, num_classes: int, where: str) -> None:
    """Raise an error, with type and shape or the first bad label, for arrays that are not images and labels."""
    images, labels = split.images, split.labels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        found = f"{images.dtype} {list(images.shape)}"
        raise DataError(f"{where}: images are {found}; they must be uint8 [images, height, width, 3]")
    if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise DataError(f"{where}: labels are {found}; they must be int64 [{len(images)}], one an image")
    if split.files and len(split.files) != len(images):
        raise DataError(f"{where}: {len(split.files)} files for {len(images)} images: name one file an image, or none")
    if len(images) == 0:
        raise DataError(f"{where}: no images")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        known = f"{num_classes} classes (labels 0 to {num_classes - 1})"
        raise DataError(f"{where}: image {bad[0]} has label {labels[bad[0]]}, but there are {known}")


def check_counts(labels: Labels, class_names: Sequence[str], images: int, where: str, fix: str) -> None:
    """Raise an error unless every class has so many images."""
    for name, count in zip(class_names, np.bincount(labels, minlength=len(class_names)), strict=True):
        if count != images:
            raise DataError(f"{where}: class {name} has {count} images instead of {images}: {fix}")


def dataset(spec: str, root: str | Path | None = None, **options: Any) -> Dataset:
    """Load a registered data set into memory.

    Args:
        spec: A registered name (`codistill list`), with options behind a colon: `folder:resize=64`.
        root: Folder, archive or file that holds it; not needed by embedded data sets.
        **options: The same options by keyword.

    Returns:
        The data set, checked; `dataset(spec, root)` with its `spec` and `root` loads it again.

    Raises:
        UsageError: Unknown name or option, or no root where one is needed.
        DataError: Files missing or damaged.
    """
    name, load, chosen = DATASETS.find(spec, options)
    if "root" not in inspect.signature(load).parameters:
        loaded = load(**chosen)
    elif root is None:
        raise UsageError(
            f"data set {name}: needs the path of its files: give --data-dir (in Python data_dir= or root=)"
        )
    else:
        loaded = load(root=Path(root), **chosen)
    return replace(loaded, spec=write_spec(name, chosen), root="" if root is None else str(Path(root).resolve()))
