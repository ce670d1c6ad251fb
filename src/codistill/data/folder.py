"""A folder of images: train/<class>/* and test/<class>/*."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from codistill.core.console import track
from codistill.core.errors import DataError, ResourceError, UsageError
from codistill.data.dataset import DATASETS, Dataset, Pixels, Split, size_of
from codistill.data.images import SUFFIXES, open_image
from codistill.data.untrusted import visible

LAYOUT = "images belong in train/<class>/ and test/<class>/"


@DATASETS.register("folder")
def folder(root: Path, resize: int = 0) -> Dataset:
    """Load images in one folder per class: train/<class>/* and test/<class>/*.

    The names of the folders in train, sorted, are the classes. Images are PNG, JPEG, BMP, WEBP or GIF; grey, palette
    and transparent ones become RGB. Hidden files are skipped, files of any other kind are refused.

    Args:
        root: The folder that holds train and test.
        resize: Side of the square that every image becomes, pixels: its shorter side is scaled to that length and
            the centre is cropped. 0: all images must have one size, and keep it.

    Returns:
        The data set, its images in the order of the sorted class and file names.

    Raises:
        DataError: Folders missing or empty, other classes in test than in train, a file that is no image, a damaged
            image, or one of another size where resize is 0.
        ResourceError: The images do not fit into memory.
        UsageError: resize is negative.
    """
    if resize < 0:
        raise UsageError(f"data set folder: resize is {resize}: give a number of pixels, or 0 to keep the images' size")
    train, test = (_class_files(root / part) for part in ("train", "test"))
    for name in sorted(train.keys() ^ test.keys()):
        here, there = ("train", "test") if name in train else ("test", "train")
        raise DataError(f"{root}: class {name!r} is in {here} but not in {there}: give both the same classes")
    size = (resize, resize) if resize else open_image(next(iter(train.values()))[0]).shape[:2]
    splits = [_read_split(root, files, (size[0], size[1]), resize > 0) for files in (train, test)]
    return Dataset("folder", splits[0], splits[1], tuple(train))


def _class_files(part: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, classes and files sorted."""
    files = {}
    for class_folder in visible(part, LAYOUT):
        if not class_folder.is_dir():
            raise DataError(f"{class_folder}: is not a folder: {LAYOUT}")
        images = files[class_folder.name] = visible(class_folder, LAYOUT)
        for file in images:
            if not file.is_file() or file.suffix.lower() not in SUFFIXES:
                raise DataError(f"{file}: is not an image file ({' '.join(SUFFIXES)}): remove it; {LAYOUT}")
        if not images:
            raise DataError(f"{class_folder}: holds no images: {LAYOUT}")
    if not files:
        raise DataError(f"{part}: holds no class folders: {LAYOUT}")
    return files


def _read_split(root: Path, files: Mapping[str, list[Path]], size: tuple[int, int], resize: bool) -> Split:
    paths = [path for class_files in files.values() for path in class_files]
    try:
        images = np.empty((len(paths), *size, 3), np.uint8)
    except MemoryError as error:
        found = f"{len(paths)} images of {size[0]}x{size[1]} pixels"
        raise ResourceError(f"{root}: {found} do not fit into memory: give a smaller resize") from error

    def read(path: Path) -> Pixels:
        image = open_image(path, size if resize else None)
        if image.shape[:2] != size:
            unlike = f"is {size_of(image[None])} pixels, but the first image is {size[0]}x{size[1]}"
            raise DataError(f"{path}: {unlike}: bring all images to one size with the option folder:resize=64")
        return image

    # Pillow decodes outside Python's global lock.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for index, image in enumerate(track(pool.map(read, paths), "folder: reading images", len(paths))):
            images[index] = image
    labels = np.repeat(np.arange(len(files)), [len(class_files) for class_files in files.values()])
    return Split(images, labels.astype(np.int64))
