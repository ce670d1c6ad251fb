"""Images that are listed by name and class, in splits or not, become a data set."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from codistill.core.console import warn
from codistill.core.errors import DataError, UsageError
from codistill.core.torchrun import leads
from codistill.data.dataset import Dataset, Labels, Split
from codistill.data.images import FIX, MAX_FILE, Interpolation, decode_image
from codistill.data.splitting import checked_part, divided, part_of
from codistill.data.store import decoded
from codistill.data.untrusted import read_file

PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Splits, and how they are called in folders, tables and archives."""
LISTED = 20  # bad files that a line names
PROBED = 50  # images that are looked at to find the size of most
TEST = "20%"  # of the images are drawn for testing where none are set apart

Part = int | str | None
Resize = int | str


@dataclass(frozen=True)
class Listed:
    """The images of a split before they are decoded.

    Attributes:
        names: Path of each image relative to the root of the data set, or another name that tells it from the others.
        labels: int64 [images], class indices.
        read: Returns the contents of the file of an image, by its position; None: it is the file of that name.
        version: With `read`, a fingerprint of all contents.
    """

    names: tuple[str, ...]
    labels: Labels
    read: Callable[[int], bytes] | None = None
    version: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, positions: npt.NDArray[np.int64]) -> "Listed":
        """Return some of the images."""
        read, names = self.read, tuple(self.names[position] for position in positions)
        chosen = None if read is None else lambda position: read(int(positions[position]))
        return Listed(names, self.labels[positions], chosen, self.version)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How listed images become a data set: the options of every data set of image files.

    Attributes:
        name: Of the data set, as registered.
        resize: Height and width of every image, pixels, as "48x64", or the side of a square; 0: as they are.
        interpolation: How images are scaled.
        skip_bad: Whether to leave out what cannot be read.
        test: Number or percentage of images to draw for testing where none are set apart; None: 20%.
        split_seed: Seed of that draw.

    Raises:
        UsageError: An option has no meaning.
    """

    name: str
    resize: Resize
    interpolation: Interpolation
    skip_bad: bool
    test: Part
    split_seed: int

    def __post_init__(self) -> None:
        where = f"data set {self.name}: "
        text = str(self.resize)
        if not re.fullmatch(r"[0-9]{1,5}|[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", text):
            fix = "give the side of a square in pixels, or HEIGHTxWIDTH as 48x64, or 0 to keep the images' size"
            raise UsageError(f"{where}resize is {self.resize}: {fix}")
        if self.test is not None:
            checked_part(f"{where}test", self.test)
        if self.test == 0:
            raise UsageError(f"{where}test is 0: a run needs test images: give a number, or a percentage as 20%")
        if not 0 <= self.split_seed < 2**32:
            raise UsageError(f"{where}split_seed is {self.split_seed}; it must be from 0 to {2**32 - 1}")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that every image becomes, pixels; None: as it is."""
        sides = [int(side) for side in str(self.resize).split("x")]
        return (sides[0], sides[-1]) if sides[0] else None


class _Found(Exception):
    """Carries what a data set has listed past it, to whom `listed_by` returns it."""

    def __init__(self, root: Path, parts: Mapping[str, Listed]) -> None:
        super().__init__()
        self.root, self.parts = root, parts


_listing: ContextVar[bool] = ContextVar("whether images are listed only", default=False)


def listed_by(load: Callable[[], Dataset]) -> tuple[Path, Mapping[str, Listed]] | Dataset:
    """Return the images of each split that a data set of image files would decode, and the folder of their names.

    Of another one, which lists nothing, return the data set itself.
    """
    token = _listing.set(True)
    try:
        return load()
    except _Found as found:
        return found.root, found.parts
    finally:
        _listing.reset(token)


def in_order(classes: Iterable[str]) -> list[str]:
    """Return the names of classes sorted: as numbers, if all are whole numbers."""
    names = sorted(classes)
    return sorted(names, key=int) if all(re.fullmatch(r"-?[0-9]{1,18}", each) for each in names) else names


def part_called(name: str) -> str | None:
    """Return the split that goes by a name: train, validation or test; None: it is no name of a split."""
    found = [part for part, names in PARTS.items() if name.strip().lower() in names]
    return found[0] if found else None


def read_listed(
    root: Path,
    parts: Mapping[str, Listed],
    class_names: Sequence[str],
    bad: dict[str, str],
    reading: Reading,
    called: Callable[[str, str], str],
    fix: str,
) -> Dataset:
    """Decode listed images.

    Without a test split the validation images are the test set, and without both a part of the training images is drawn
    for it: of each class its share.

    Args:
        root: Folder that the names are relative to.
        parts: The images of each split; train is one.
        class_names: Names of the classes.
        bad: A line about each file that cannot be used, by its name; lines about images are added.
        reading: The options.
        called: Names the place of a class, given the split and the class, for errors.
        fix: How the files belong, for errors.

    Raises:
        DataError: A class has no training images, there are no test images, or, all in one line, files that cannot be
            used and images of another size.
        ResourceError: The images do not fit into memory.
        UsageError: Test images are to be drawn where there are some.
    """
    parts, drawn = _with_test(root, parts, reading)
    if _listing.get():
        raise _Found(root, parts)
    size = reading.size or _usual_size(root, parts["train"])
    unlike: dict[str, str] = {}
    splits: dict[str, Split] = {}
    for part, listed in parts.items():
        found = decoded(
            root,
            listed.names,
            size,
            resize=reading.size is not None,
            interpolation=reading.interpolation,
            read=listed.read,
            version=listed.version,
            title=f"{reading.name}: reading images",
        )
        bad |= {listed.names[position]: line for position, line in found.bad.items()}
        unlike |= {listed.names[position]: line for position, line in found.unlike.items()}
        names = tuple(listed.names[position] for position in found.kept)
        splits[part] = Split(found.images, listed.labels[found.kept], names)
    one_size = f"bring all to one size with --data {reading.name}:resize={min(64, max(size))}" if unlike else ""
    refuse_bad(root, (unlike if reading.skip_bad else bad | unlike).values(), reading, len(bad), one_size)
    for part, split in splits.items():
        counts = np.bincount(split.labels, minlength=len(class_names))
        empty = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
        if empty and (part == "train" or len(empty) == len(class_names)):
            raise DataError(f"{called(part, empty[0])}: holds no images: {fix}")
        if empty and leads():
            of = f"{len(empty)} of {len(class_names)} classes"
            warn(f"{root}: no {part} images of {', '.join(map(repr, empty[:LISTED]))} ({of})")
    left_out = tuple(sorted(bad))
    if bad and leads():
        more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        count = f"{len(bad)} bad files are" if len(bad) > 1 else "1 bad file is"
        warn(f"{root}: {count} left out: {', '.join(left_out[:LISTED])}{more}")
    return Dataset(
        reading.name,
        splits["train"],
        splits["test"],
        tuple(class_names),
        left_out=left_out,
        validation=splits.get("validation"),
        drawn=drawn,
        interpolation=reading.interpolation,
        own=True,
    )


def refuse_bad(root: Path, lines: Iterable[str], reading: Reading, bad: int, fix: str = "") -> None:
    """Raise `DataError` for lines about files that cannot be used, if there are any; `bad` of them can be left out.

    `fix` repairs those that say how to repair nothing.
    """
    if problems := list(lines):
        named: dict[str, list[str]] = {}
        for place, _, fault in (line.partition(": ") for line in problems[:LISTED]):
            named.setdefault(fault, []).append(place)
        faults = "; ".join(f"{', '.join(places)}: {fault}" for fault, places in named.items())
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        count = f"{root}: {len(problems)} files cannot be used: " if len(problems) > 1 else ""
        option = f"--data {reading.name}:skip_bad=true"
        skip = "" if reading.skip_bad or not bad else f" (to leave out bad files: --skip-bad, or {option})"
        raise DataError(f"{count}{faults}{more}{f': {fix}' * bool(fix)}{skip}")


def _with_test(root: Path, parts: Mapping[str, Listed], reading: Reading) -> tuple[dict[str, Listed], str]:
    """Return splits with test images, and how these were drawn; empty: they were there."""
    given = dict(parts)
    if "test" not in given and "validation" in given:
        given["test"] = given.pop("validation")
    if "test" in given:
        if reading.test is not None:
            there = f"test is {reading.test}, but {root} has {len(given['test'])} test images of its own"
            raise UsageError(f"data set {reading.name}: {there}: leave test out")
        return given, ""
    train = given["train"]
    spare = len(train) - len(set(train.labels.tolist()))  # of each class one is for training
    count = part_of(len(train), reading.test or TEST)
    if not 0 < count <= spare:
        wanted = f"{count} test images cannot be drawn of {len(train)} images, one of each class left for training"
        raise DataError(f"{root}: {wanted}: give more images, or test images of their own")
    kept, held_out = divided(train.labels, count, reading.split_seed)
    split = {"train": train.subset(np.sort(kept)), "test": train.subset(np.sort(held_out))}
    share = f"{count} of {len(train)} images, of each class its share"
    return split, f"{share}, drawn with seed {reading.split_seed}"


def _usual_size(root: Path, listed: Listed) -> tuple[int, int]:
    """Return the size of most images, found from some; of equally frequent ones the first."""
    sizes: Counter[tuple[int, int]] = Counter()
    for position in range(0, len(listed), len(listed) // PROBED + 1):
        path, read = root / listed.names[position], listed.read
        try:
            content = read_file(path, MAX_FILE, FIX) if read is None else read(position)
            image = decode_image(content, str(path))
        except DataError:  # it is named when all are read
            continue
        sizes[image.shape[0], image.shape[1]] += 1
    return sizes.most_common(1)[0][0] if sizes else (1, 1)
