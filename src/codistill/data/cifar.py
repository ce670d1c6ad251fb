"""CIFAR-10 and CIFAR-100, from the published archives or from the folders that they are extracted to."""

from io import BytesIO
from pathlib import Path

import numpy as np

from codistill.core.errors import DataError
from codistill.data.archive import members
from codistill.data.cifar_files import CIFAR10, CIFAR100, HOST, Release
from codistill.data.dataset import DATASETS, Dataset, Split, check_counts, check_split
from codistill.data.download import fetch
from codistill.data.untrusted import check_digest, check_file, read_file, reading

TRAIN_IMAGES = 50_000
TEST_IMAGES = 10_000
MEMBER_LIMIT = 200 << 20  # bytes; the largest file, CIFAR-100's pickle, has 155 MB
ARCHIVE_LIMIT = 256 << 20  # bytes, unpacked
FIX = "delete it and fetch it again (--data NAME:download=true), or give check=false for files of your own"


@DATASETS.register("cifar10")
def cifar10(root: Path, download: bool = False, url: str = "", check: bool = True) -> Dataset:
    """Load CIFAR-10: 50,000 training and 10,000 test images, 32x32, ten classes.

    Args:
        root: The folder that holds `cifar-10-batches-bin`, `cifar-10-binary.tar.gz`, `cifar-10-batches-py` or
            `cifar-10-python.tar.gz` (the first of these counts), or one of these itself. torchvision's folder will do.
        download: Fetch the binary archive into `root` when none of them is there.
        url: Address of that archive in place of the published one; its checksum is compared all the same.
        check: Insist on the published checksums and on the number of images of each class. False accepts files of the
            same layout with other content.

    Returns:
        The data set; images [50000, 32, 32, 3] and [10000, 32, 32, 3].

    Raises:
        DataError: Files missing, damaged, or not the published ones.
        ResourceError: A downloaded archive cannot be written.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html
    """
    return _load("cifar10", CIFAR10, 10, root, download, url, check)


@DATASETS.register("cifar100")
def cifar100(root: Path, download: bool = False, url: str = "", check: bool = True) -> Dataset:
    """Load CIFAR-100 with its fine labels: 50,000 training and 10,000 test images, 32x32, 100 classes.

    Args:
        root: The folder that holds `cifar-100-binary`, `cifar-100-binary.tar.gz`, `cifar-100-python` or
            `cifar-100-python.tar.gz` (the first of these counts), or one of these itself. torchvision's folder will do.
        download, url, check: As in `cifar10`.

    Returns:
        The data set; images [50000, 32, 32, 3] and [10000, 32, 32, 3]. Ten images are in both parts, as published.

    Raises:
        DataError: Files missing, damaged, or not the published ones.
        ResourceError: A downloaded archive cannot be written.

    Source: as `cifar10`.
    """
    return _load("cifar100", CIFAR100, 100, root, download, url, check)


def _load(
    name: str, releases: tuple[Release, ...], num_classes: int, root: Path, download: bool, url: str, check: bool
) -> Dataset:
    release, place = _find(name, releases, root, download, url)
    contents = _read(release, place, check)
    class_names = release.decode_names(contents.pop(release.names), str(place / release.names), FIX)
    if len(set(class_names)) != num_classes or len(class_names) != num_classes:
        names = place / release.names
        raise DataError(f"{names}: has {len(class_names)} class names, not {num_classes} distinct ones: {FIX}")
    parts = []
    for file in (*release.train, release.test):
        # Popped, so that a file's bytes are freed as soon as they are decoded.
        parts.append(Split(*release.decode(contents.pop(file), str(place / file), FIX)))
        check_split(parts[-1], num_classes, str(place / file))
    *parts, test = parts
    train = Split(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]))
    if check:
        check_counts(train.labels, class_names, TRAIN_IMAGES // num_classes, f"{place}, training images", FIX)
        check_counts(test.labels, class_names, TEST_IMAGES // num_classes, f"{place}, test images", FIX)
    return Dataset(name, train, test, class_names)


def _find(name: str, releases: tuple[Release, ...], root: Path, download: bool, url: str) -> tuple[Release, Path]:
    """Find an extracted folder or an archive, the binary release first, or fetch it."""
    with reading(root, "make it readable"):
        for release in releases:
            if root.is_file() and root.name == release.archive:
                return release, root
            for place in (root, root / release.folder):
                if (place / release.train[0]).is_file():
                    return release, place
            if (root / release.archive).is_file():
                return release, root / release.archive
    binary = releases[0]
    address = url or HOST + binary.archive
    if download and not root.is_file():
        fetch(address, root / binary.archive, binary.size, binary.digest)
        return binary, root / binary.archive
    wanted = " or ".join(f"{release.archive} or its folder {release.folder}" for release in releases)
    if root.is_file():
        raise DataError(f"{root}: is not known as an archive of {name}: give {wanted}")
    raise DataError(f"{root}: holds no {name}: expected {wanted}; get {address}, or give --data {name}:download=true")


def _read(release: Release, place: Path, check: bool) -> dict[str, bytes]:
    """Read the files of a release from an extracted folder or an archive."""
    files = (release.names, *release.train, release.test)
    if place.is_dir():
        contents = {file: read_file(place / file, MEMBER_LIMIT, FIX) for file in files}
        for file, digest in release.digests.items() if check else ():
            check_digest(place / file, BytesIO(contents[file]), digest, FIX)
        return contents
    if check:
        check_file(place, release.size, release.digest, FIX)
    wanted = {f"{release.folder}/{file}": file for file in files}
    found = members(place, wanted.__contains__, FIX, MEMBER_LIMIT, ARCHIVE_LIMIT)
    contents = {wanted[member]: content for member, content in found}
    for member, file in wanted.items():
        if file not in contents:
            raise DataError(f"{place}: has no {member}: {FIX}")
    return contents
