"""A folder of images: train/<class>/*, test/<class>/* and val/<class>/*, train/ alone, or <class>/* alone."""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from codistill.core.console import warn
from codistill.core.errors import DataError
from codistill.data.dataset import DATASETS, Dataset, Split
from codistill.data.images import SUFFIXES, Interpolation
from codistill.data.listing import LISTED, Listed, Part, Reading, Resize, part_called, read_listed, refuse_bad
from codistill.data.store import decoded
from codistill.data.untrusted import visible

LAYOUT = "images belong in train/<class>/ and test/<class>/, or in <class>/ alone"

Files = Mapping[str, list[Path]]


@DATASETS.register("folder")
def folder(
    root: Path,
    resize: Resize = 0,
    interpolation: Interpolation = "bilinear",
    skip_bad: bool = False,
    test: Part = None,
    split_seed: int = 0,
) -> Dataset:
    """Load images in one folder per class: train/<class>/* and test/<class>/*, or <class>/* alone.

    There may be val/<class>/*, too, which chooses epoch and student; without test/ it is the test set. Without both, or
    without any of the three, a part of the images is drawn for testing: of each class its share.

    The names of the folders in train, sorted, are the classes; names that differ only in their Unicode form are one.
    Images are PNG, JPEG, BMP, WEBP, GIF, TIFF, PPM, JPEG 2000, AVIF or (with pillow-heif) HEIC; grey, palette and
    transparent ones become RGB. Hidden files and those of operating systems (Thumbs.db, desktop.ini, __MACOSX) are
    skipped. A class may have no test images if its folder in test is there, and empty.

    Args:
        root: The folder that holds train and test, or the classes.
        resize: Height and width that every image becomes, as 48x64 or the side of a square, pixels: it is scaled until
            it covers them, and its centre is cropped. 0: all images must have one size, and keep it.
        interpolation: How images are scaled.
        skip_bad: Whether to leave out damaged images and files of other kinds, with a line that counts and names them.
        test: Number of images to draw for testing, or a percentage of all, where none are set apart. None: 20%.
        split_seed: Seed of that draw.

    Returns:
        The data set, its images in the order of the sorted class and file names.

    Raises:
        DataError: Folders missing or empty, other classes in test than in train, or, all in one line, files that are
            no images, damaged images, and images of another size where resize is 0.
        ResourceError: The images do not fit into memory.
        UsageError: An option has no meaning, or test is set where there are test images.
    """
    reading = Reading(
        name="folder", resize=resize, interpolation=interpolation, skip_bad=skip_bad, test=test, split_seed=split_seed
    )
    if os.path.isfile(root):
        raise DataError(f"{root}: is a file, no folder: {LAYOUT}; a table of images is read by --data table")
    bad: dict[str, str] = {}
    places = _places(root)
    files = {part: _class_files(root, place, bad) for part, place in places.items()}
    train = files["train"]
    for part, found in files.items():
        for name in sorted(train.keys() ^ found.keys()):
            here, there = (places[each].name for each in (("train", part) if name in train else (part, "train")))
            fix = "give both the same classes" + (f", or make an empty folder {there}/{name}" if name in train else "")
            raise DataError(f"{root}: class {name!r} is in {here} but not in {there}: {fix}")
    if len(train) == 1 and len(places) == 1:
        raise DataError(f"{places['train']}: holds one class folder, {next(iter(train))!r}: {LAYOUT}")
    parts = {part: _listed(root, found) for part, found in files.items()}

    def called(part: str, name: str) -> str:
        return str(places.get(part, places["train"]) / name)

    return read_listed(root, parts, tuple(train), bad, reading, called, LAYOUT)


def labelled_images(
    root: Path,
    class_names: Sequence[str],
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    skip_bad: bool = False,
) -> Split:
    """Load all images of a folder of class folders, as images of a data set that has these classes already.

    Args:
        root: The folder of the class folders; there may be fewer than there are classes.
        class_names: Names of the classes, in the order of the labels.
        size: Height and width that every image becomes, as with resize in `folder`.
        interpolation: How images are scaled.
        skip_bad: Whether to leave out damaged images and files of other kinds.

    Raises:
        DataError: A folder that is none of the classes, no images, or, all in one line, files that cannot be used.
    """
    reading = Reading(name="folder", resize=0, interpolation=interpolation, skip_bad=skip_bad, test=None, split_seed=0)
    bad: dict[str, str] = {}
    files = _class_files(root, root, bad)
    places = {unicodedata.normalize("NFC", name): index for index, name in enumerate(class_names)}
    if strange := [name for name in files if name not in places]:
        known = ", ".join(map(repr, class_names[:LISTED])) + (", .." if len(class_names) > LISTED else "")
        raise DataError(f"{root}: folder {strange[0]!r} is none of the {len(class_names)} classes: {known}")
    listed = _listed(root, files)
    found = decoded(root, listed.names, size, resize=True, interpolation=interpolation, title="folder: reading images")
    bad |= {listed.names[position]: line for position, line in found.bad.items()}
    refuse_bad(root, () if skip_bad else bad.values(), reading, len(bad))
    if len(found.kept) == 0:
        raise DataError(f"{root}: holds no images: they belong in <class>/")
    if bad:
        warn(f"{root}: {len(bad)} bad files are left out: {', '.join(sorted(bad)[:LISTED])}")
    labels = np.array([places[name] for name in files])[listed.labels]
    return Split(found.images, labels[found.kept], tuple(listed.names[position] for position in found.kept))


def class_folders(root: Path) -> tuple[str, ...] | None:
    """Return the names of the image files of a folder of class folders alone, relative to it; None: it is no such."""
    try:
        if not root.is_dir() or _places(root) != {"train": root}:
            return None
        return _listed(root, _class_files(root, root, {})).names
    except DataError:
        return None


def _places(root: Path) -> dict[str, Path]:
    """Return the folder of each split; where there are none, that of the classes, for training."""
    found: dict[str, Path] = {}
    split = False
    for place in visible(root, LAYOUT):
        part = part_called(place.name)
        if part is None or not place.is_dir():
            continue
        if part in found:
            raise DataError(f"{root}: {found[part].name} and {place.name} are both there: leave one of them")
        found[part] = place
        inside = visible(place, LAYOUT)
        split = split or not inside or any(each.is_dir() for each in inside)  # else it is a class of that name
    if not split:
        return {"train": root}
    if "train" not in found:
        there = " and ".join(sorted(place.name for place in found.values()))
        raise DataError(f"{root}: has {there}, but no train: {LAYOUT}")
    return {part: found[part] for part in ("train", "validation", "test") if part in found}


def _class_files(root: Path, place: Path, bad: dict[str, str]) -> Files:
    """Return the image files of each class, classes and files sorted; lines about other files go to `bad`."""
    files: dict[str, list[Path]] = {}
    for class_folder in visible(place, LAYOUT):
        if not class_folder.is_dir():
            # Beside class folders there may be a licence or a table.
            if place != root or class_folder.suffix.lower() in SUFFIXES:
                bad[_name(root, class_folder)] = f"{class_folder}: is not a folder: {LAYOUT}"
            continue
        images = files.setdefault(unicodedata.normalize("NFC", class_folder.name), [])
        for file in visible(class_folder, LAYOUT):
            if file.is_file() and file.suffix.lower() in SUFFIXES:
                images.append(file)
            else:
                what = "is a folder in a class" if file.is_dir() else "is not an image file by its name"
                broken = file.is_symlink() and not file.exists()
                bad[_name(root, file)] = f"{file}: {'is a broken link' if broken else what}: remove it"
    if not files:
        raise DataError(f"{place}: holds no class folders: {LAYOUT}; with a table of labels, name it: --data table")
    return dict(sorted(files.items()))


def _listed(root: Path, files: Files) -> Listed:
    names = tuple(_name(root, path) for class_files in files.values() for path in class_files)
    labels = np.repeat(np.arange(len(files)), [len(class_files) for class_files in files.values()])
    return Listed(names, labels)


def _name(root: Path, path: Path) -> str:
    return os.fspath(path).removeprefix(os.path.join(root, ""))
