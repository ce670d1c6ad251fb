"""A folder of images: train/<class>/* and test/<class>/*."""

import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from codistill.core.console import warn
from codistill.core.errors import DataError, UsageError
from codistill.core.torchrun import leads
from codistill.data.dataset import DATASETS, Dataset, Pixels, Split
from codistill.data.images import SUFFIXES, open_image
from codistill.data.store import decoded
from codistill.data.untrusted import visible

LAYOUT = "images belong in train/<class>/ and test/<class>/"
LISTED = 20  # bad files that a line names
PROBED = 50  # images that are looked at to find the size of most

Files = Mapping[str, list[Path]]


@DATASETS.register("folder")
def folder(root: Path, resize: int = 0, skip_bad: bool = False) -> Dataset:
    """Load images in one folder per class: train/<class>/* and test/<class>/*.

    The names of the folders in train, sorted, are the classes; names that differ only in their Unicode form are one.
    Images are PNG, JPEG, BMP, WEBP, GIF, TIFF, PPM, JPEG 2000, AVIF or (with pillow-heif) HEIC; grey, palette and
    transparent ones become RGB. Hidden files and those of operating systems (Thumbs.db, desktop.ini, __MACOSX) are
    skipped. A class may have no test images if its folder in test is there, and empty.

    Args:
        root: The folder that holds train and test.
        resize: Side of the square that every image becomes, pixels: its shorter side is scaled to that length and
            the centre is cropped. 0: all images must have one size, and keep it.
        skip_bad: Whether to leave out damaged images and files of other kinds, with a line that counts and names them.

    Returns:
        The data set, its images in the order of the sorted class and file names.

    Raises:
        DataError: Folders missing or empty, other classes in test than in train, or, all in one line, files that are
            no images, damaged images, and images of another size where resize is 0.
        ResourceError: The images do not fit into memory.
        UsageError: resize is negative.
    """
    if resize < 0:
        raise UsageError(f"data set folder: resize is {resize}: give a number of pixels, or 0 to keep the images' size")
    bad: dict[Path, str] = {}
    train, test = (_class_files(root / part, bad) for part in ("train", "test"))
    for name in sorted(train.keys() ^ test.keys()):
        here, there = ("train", "test") if name in train else ("test", "train")
        fix = "give both the same classes" + (f", or make an empty folder test/{name}" if name in train else "")
        raise DataError(f"{root}: class {name!r} is in {here} but not in {there}: {fix}")
    size = (resize, resize) if resize else _usual_size(train)
    unlike: dict[Path, str] = {}
    splits = [_read_split(root, files, size, resize > 0, bad, unlike) for files in (train, test)]
    if problems := list((unlike if skip_bad else bad | unlike).values()):
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        count = f"{root}: {len(problems)} files cannot be used: " if len(problems) > 1 else ""
        skip = "" if skip_bad or not bad else " (to leave out bad files: --skip-bad, or --data folder:skip_bad=true)"
        raise DataError(f"{count}{'; '.join(problems[:LISTED])}{more}{skip}")
    for part, split in zip(("train", "test"), splits, strict=True):
        counts = np.bincount(split.labels, minlength=len(train))
        empty = [name for name, count in zip(train, counts, strict=True) if count == 0]
        if empty and (part == "train" or len(empty) == len(train)):
            raise DataError(f"{root / part / empty[0]}: holds no images: {LAYOUT}")
        if empty and leads():
            warn(f"{root}: no test images of {', '.join(map(repr, empty[:LISTED]))} ({len(empty)} classes)")
    left_out = tuple(sorted(str(path.relative_to(root)) for path in bad))
    if bad and leads():
        more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        count = f"{len(bad)} bad files are" if len(bad) > 1 else "1 bad file is"
        warn(f"{root}: {count} left out: {', '.join(left_out[:LISTED])}{more}")
    return Dataset("folder", splits[0], splits[1], tuple(train), left_out=left_out)


def _class_files(part: Path, bad: dict[Path, str]) -> Files:
    """Return the image files of each class, classes and files sorted; lines about other files go to `bad`."""
    files: dict[str, list[Path]] = {}
    for class_folder in visible(part, LAYOUT):
        if not class_folder.is_dir():
            bad[class_folder] = f"{class_folder}: is not a folder: {LAYOUT}"
            continue
        images = files.setdefault(unicodedata.normalize("NFC", class_folder.name), [])
        for file in visible(class_folder, LAYOUT):
            if file.is_file() and file.suffix.lower() in SUFFIXES:
                images.append(file)
            else:
                what = "is a folder in a class" if file.is_dir() else "is not an image file by its name"
                broken = file.is_symlink() and not file.exists()
                bad[file] = f"{file}: {'is a broken link' if broken else what}: remove it"
    if not files:
        raise DataError(f"{part}: holds no class folders: {LAYOUT}")
    return dict(sorted(files.items()))


def _usual_size(files: Files) -> tuple[int, int]:
    """Return the size of most images, found from some; of equally frequent ones the first."""
    paths = [path for class_files in files.values() for path in class_files]
    images = map(_read, paths[:: len(paths) // PROBED + 1])
    sizes = Counter(image.shape[:2] for image in images if not isinstance(image, str))
    height, width = sizes.most_common(1)[0][0] if sizes else (1, 1)
    return height, width


def _read(path: Path, size: tuple[int, int] | None = None) -> Pixels | str:
    """Return an image, or a line about what is wrong with it."""
    try:
        return open_image(path, size)
    except DataError as error:
        return str(error)


def _read_split(
    root: Path, files: Files, size: tuple[int, int], resize: bool, bad: dict[Path, str], unlike: dict[Path, str]
) -> Split:
    """Read the images that can be read; lines about the others go to `bad`, about those of other sizes to `unlike`."""
    paths = [path for class_files in files.values() for path in class_files]
    names = [path.relative_to(root).as_posix() for path in paths]
    read = decoded(root, names, size, resize=resize, title="folder: reading images")
    bad |= {paths[position]: line for position, line in read.bad.items()}
    fix = "bring all to one size with --data folder:resize=64"
    unlike |= {paths[position]: f"{line}: {fix}" for position, line in read.unlike.items()}
    labels = np.repeat(np.arange(len(files)), [len(class_files) for class_files in files.values()])
    return Split(read.images, labels[read.kept], tuple(names[position] for position in read.kept))
