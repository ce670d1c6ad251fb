"""CINIC-10: CIFAR-10 and down-scaled ImageNet images of the same ten classes, 90,000 in each of three parts."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from codistill.core.console import track
from codistill.core.errors import DataError
from codistill.data.archive import members
from codistill.data.cache import Arrays, cached
from codistill.data.dataset import DATASETS, Dataset, Pixels, Split, check_counts
from codistill.data.images import decode_image
from codistill.data.untrusted import check_file, read_file, reading, visible

PARTS = ("train", "valid", "test")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE = "CINIC-10.tar.gz"
ADDRESS = "https://datashare.ed.ac.uk/handle/10283/3192"
FILE_LIMIT = 1 << 20  # bytes; a 32x32 PNG has about 2 kB
ARCHIVE_LIMIT = 4 << 30  # bytes, unpacked
MAX_DEPTH = 4  # folders below the root in which train, valid and test are searched
FIX = f"fetch {ARCHIVE} again from {ADDRESS}, or give the option check=false for files of your own"
IMAGES_PER_CLASS = 9_000  # in each part
SIZE = (32, 32)  # pixels
ARCHIVE_SIZE = 687_544_992  # bytes
ARCHIVE_DIGEST = "md5:6ee4d0c996905fe93221de577967a372"
CACHE = "cinic10.cache.npz"


@DATASETS.register("cinic10")
def cinic10(root: Path, train_on: Literal["train", "train+valid"] = "train", check: bool = True) -> Dataset:
    """Load CINIC-10, 32x32, ten classes; tested on its test part.

    The 270,000 PNG files are decoded once, into `cinic10.cache.npz` beside them; later loads take seconds. Duplicates
    and placeholder images that the published files hold are kept, as in all published results.

    Args:
        root: The folder that holds train, valid and test, at most four folders down, or `CINIC-10.tar.gz`; or the
            archive itself.
        train_on: The train part alone (90,000 images) or together with the valid part (180,000).
        check: Insist on the archive's published checksum and on 9,000 images of each class in each part. False
            accepts files of the same layout with other content.

    Returns:
        The data set, its images in the order of the sorted class and file names.

    Raises:
        DataError: Files missing, damaged, not PNG or not 32x32.

    Source: L. Darlow et al., CINIC-10 Is Not ImageNet or CIFAR-10, 2018, arXiv 1810.03505.
    """
    place = _find(root)
    beside = place / CACHE if place.is_dir() else place.with_name(CACHE)
    parts = [*train_on.split("+"), "test"]
    names = [f"{part}_{kind}" for part in parts for kind in ("images", "labels")]
    arrays = cached(beside, f"{_identity(place)} check={check}", names, lambda: _decode(place, check))
    for part in parts if check else ():
        check_counts(arrays[f"{part}_labels"], CLASSES, IMAGES_PER_CLASS, f"{place}, {part}", FIX)
    return Dataset("cinic10", _join(arrays, parts[:-1]), _join(arrays, ["test"]), CLASSES)


def _decode(place: Path, check: bool) -> Arrays:
    if check and place.is_file():
        check_file(place, ARCHIVE_SIZE, ARCHIVE_DIGEST, FIX)
    in_folder = (("/".join(path.parts[-3:]), read_file(path, FILE_LIMIT, FIX)) for path in _paths(place))
    files = in_folder if place.is_dir() else _archive_files(place)
    total = len(PARTS) * len(CLASSES) * IMAGES_PER_CLASS if check else None
    found: dict[str, list[tuple[str, str, Pixels]]] = {part: [] for part in PARTS}
    for name, content in track(files, "cinic10: decoding", total):
        part, class_name, file = name.split("/")
        if class_name not in CLASSES:
            raise DataError(f"{place}/{name}: {class_name} is not a class of cinic10 ({' '.join(CLASSES)}): {FIX}")
        if not file.lower().endswith(".png"):
            raise DataError(f"{place}/{name}: is not a PNG file: {FIX}")
        found[part].append((class_name, file, decode_image(content, f"{place}/{name}", formats=("PNG",), exact=SIZE)))
    arrays: Arrays = {}
    for part in PARTS:
        images = sorted(found.pop(part), key=lambda image: image[:2])
        if not images:
            raise DataError(f"{place}: has no images in {part}: {FIX}")
        arrays[f"{part}_images"] = np.stack([pixels for _, _, pixels in images])
        arrays[f"{part}_labels"] = np.array([CLASSES.index(name) for name, _, _ in images], dtype=np.int64)
    return arrays


def _join(arrays: Arrays, parts: list[str]) -> Split:
    several = ([arrays[f"{part}_{kind}"] for part in parts] for kind in ("images", "labels"))
    images, labels = (one[0] if len(one) == 1 else np.concatenate(one) for one in several)
    return Split(images, labels)


def _find(root: Path) -> Path:
    """Return the folder that holds train, valid and test, or the archive."""
    with reading(root, "make it readable"):
        if root.is_file():
            return root
        if (root / ARCHIVE).is_file() and not _holds_parts(root):
            return root / ARCHIVE
        level = [root] if root.is_dir() else []
        for _ in range(MAX_DEPTH + 1):
            if found := next(filter(_holds_parts, level), None):
                return found
            level = [child for folder in level for child in _folders(folder)]
    raise DataError(f"{root}: holds no cinic10: expected {ARCHIVE} or train, valid and test; get it from {ADDRESS}")


def _holds_parts(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in PARTS)


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _identity(place: Path) -> str:
    """Return a digest of the names, sizes and modification times of the files, which tells when they change."""
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else _paths(place):
        with reading(path, FIX):
            about = path.stat()
        digest.update(f"{'/'.join(path.parts[-3:])} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _paths(folder: Path) -> Iterator[Path]:
    """Yield all files of all classes of all parts, sorted."""
    for part in PARTS:
        for class_folder in visible(folder / part, FIX):
            yield from visible(class_folder, FIX)


def _archive_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name (PART/CLASS/FILE) and content of each image file of the archive, in its order."""

    def is_image(name: str) -> bool:
        parts = name.split("/")
        return len(parts) >= 3 and parts[-3] in PARTS and not parts[-1].startswith(".")

    prefixes = set()
    for name, content in members(archive, is_image, FIX, FILE_LIMIT, ARCHIVE_LIMIT):
        *prefix, part, class_name, file = name.split("/")
        prefixes.add("/".join(prefix))
        if len(prefixes) > 1:
            raise DataError(f"{archive}: holds train, valid and test twice, in {' and '.join(sorted(prefixes))}: {FIX}")
        yield f"{part}/{class_name}/{file}", content
