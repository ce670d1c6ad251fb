"""CINIC-10: CIFAR-10 and down-scaled ImageNet images of the same ten classes, 90,000 in each of three parts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from codistill.core.errors import DataError
from codistill.data.cache import Arrays, cached
from codistill.data.cinic10_files import (
    CLASSES,
    FILE_LIMIT,
    MEND,
    PARTS,
    Entry,
    archive_files,
    find,
    folder_files,
    identity,
)
from codistill.data.dataset import DATASETS, Dataset, Pixels, Split
from codistill.data.images import decode_image
from codistill.data.progress import track
from codistill.data.reading import check_file, read_file

IMAGES_PER_CLASS = 9_000  # in each part
SIZE = (32, 32)  # pixels
ARCHIVE_SIZE = 687_544_992  # bytes
ARCHIVE_DIGEST = "md5:6ee4d0c996905fe93221de577967a372"
CACHE = "cinic10.cache.npz"


@DATASETS.register("cinic10")
def cinic10(root: Path, train_on: Literal["train", "train+valid"] = "train", check: bool = True) -> Dataset:
    """Load CINIC-10, 32x32, ten classes; tested on its test part.

    The 270,000 PNG files are decoded once, into `cinic10.cache.npz` beside them; later loads take seconds. Duplicates
    and placeholder images that the published files hold are kept, as everybody does.

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
    place = find(root)
    beside = place / CACHE if place.is_dir() else place.with_name(CACHE)
    train_parts = train_on.split("+")
    names = [f"{part}_{kind}" for part in (*train_parts, "test") for kind in ("images", "labels")]
    arrays = cached(beside, f"{identity(place)} check={check}", names, lambda: _decode(place, check))
    if check:
        for part in (*train_parts, "test"):
            _check_counts(f"{place}, {part}", arrays[f"{part}_labels"])
    return Dataset(name="cinic10", train=_join(arrays, train_parts), test=_join(arrays, ["test"]), class_names=CLASSES)


def _decode(place: Path, check: bool) -> Arrays:
    """Decode all images of all parts."""
    if check and place.is_file():
        check_file(place, ARCHIVE_SIZE, ARCHIVE_DIGEST, MEND)
    entries: Iterable[Entry] = folder_files(place) if place.is_dir() else archive_files(place)
    total = len(PARTS) * len(CLASSES) * IMAGES_PER_CLASS if check else None
    found: dict[str, list[tuple[str, str, Pixels]]] = {part: [] for part in PARTS}
    for entry in track(entries, "cinic10: decoding", total):
        where = f"{place}/{entry.part}/{entry.class_name}/{entry.file}"
        content = read_file(entry.content, FILE_LIMIT, MEND) if isinstance(entry.content, Path) else entry.content
        pixels = decode_image(content, where, formats=("PNG",), exact=SIZE)
        found[entry.part].append((entry.class_name, entry.file, pixels))
    arrays: Arrays = {}
    for part in PARTS:
        images = sorted(found.pop(part), key=lambda image: image[:2])
        if not images:
            raise DataError(f"{place}: has no images in {part}: {MEND}")
        arrays[f"{part}_images"] = np.stack([pixels for _, _, pixels in images])
        arrays[f"{part}_labels"] = np.array([CLASSES.index(name) for name, _, _ in images], dtype=np.int64)
    return arrays


def _check_counts(where: str, labels: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
    counts = np.bincount(labels, minlength=len(CLASSES))
    for name, count in zip(CLASSES, counts, strict=True):
        if count != IMAGES_PER_CLASS:
            raise DataError(f"{where}: class {name} has {count} images instead of {IMAGES_PER_CLASS}: {MEND}")


def _join(arrays: Arrays, parts: list[str]) -> Split:
    images, labels = ([arrays[f"{part}_{kind}"] for part in parts] for kind in ("images", "labels"))
    return Split(*(one[0] if len(one) == 1 else np.concatenate(one) for one in (images, labels)))
