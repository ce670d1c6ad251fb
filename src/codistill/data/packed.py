"""Arrays in one .npz file: the quickest way to use data of your own."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from codistill.core.errors import DataError
from codistill.data.dataset import DATASETS, Dataset, Split, check_split
from codistill.data.untrusted import reading

NEEDED = ("train_images", "train_labels", "test_images", "test_labels")
VALIDATION = ("validation_images", "validation_labels")
SMALL = 64 << 20  # bytes that any array may unpack to
MOST_COMPRESSED = 200  # times; a file of zeros is a thousand times its compressed size
LAYOUT = "uint8 [images, height, width, 3], or without the 3 for grey ones"
FIX = f"make it with numpy.savez(path, {'=, '.join(NEEDED)}=, class_names=), images {LAYOUT}"


@DATASETS.register("packed")
def packed(root: Path) -> Dataset:
    """Load a .npz file of train_images, train_labels, test_images, test_labels and, optionally, class_names.

    It may also have validation_images and validation_labels, which choose epoch and student.

    Args:
        root: The file, or a folder that holds no other .npz file. Images are uint8 [images, height, width, 3], RGB, or
            grey: [images, height, width], also with a last axis of 1; labels are of any integer type [images];
            class_names are texts, by default "0", "1" and so on. It may be compressed.

    Raises:
        DataError: File missing or damaged, an array missing or of a wrong type or shape, a label out of range.
    """
    with reading(root, "make it readable"):
        found = sorted(root.glob("*.npz")) if root.is_dir() else [root]
    if len(found) != 1:
        raise DataError(f"{root}: holds {len(found)} .npz files: name the file itself, or {FIX}")
    path = found[0]
    with reading(path, FIX), zipfile.ZipFile(path) as archive:
        present = {name.removesuffix(".npy") for name in archive.namelist()}
        needed = NEEDED + (VALIDATION if present & set(VALIDATION) else ())
        if missing := [name for name in needed if name not in present]:
            raise DataError(f"{path}: has no array {missing[0]} (it has {', '.join(sorted(present))}): {FIX}")
        arrays = {name: read_array(archive, path, name, FIX) for name in (*needed, "class_names") if name in present}
    parts = ("train", "validation", "test") if len(needed) > len(NEEDED) else ("train", "test")
    splits = {part: _split(path, part, arrays) for part in parts}
    class_names = _class_names(path, arrays, list(splits.values()))
    for part, split in splits.items():
        check_split(split, len(class_names), f"{path}, {part}")
    train = splits["train"]
    absent = np.flatnonzero(np.bincount(train.labels, minlength=len(class_names)) == 0)
    if len(absent):
        missed = f"no image has label {absent[0]} (class {class_names[absent[0]]})"
        raise DataError(f"{path}, train: {missed}: give every class training images, and number the classes from 0")
    return Dataset("packed", train, splits["test"], class_names, validation=splits.get("validation"), own=True)


def read_array(archive: zipfile.ZipFile, path: Path, name: str, fix: str) -> npt.NDArray[Any]:
    """Read one array after its header was checked: nothing is unpickled, and no more allocated than the file holds.

    Raises:
        DataError: Its header lies, or it is of Python objects; other damage raises what zipfile and NumPy raise.
    """
    member = f"{name}.npy"
    about = archive.getinfo(member)
    if about.file_size > SMALL and about.file_size > MOST_COMPRESSED * about.compress_size:
        found = f"unpacks to {about.file_size} bytes from {about.compress_size}"
        raise DataError(f"{path}: {name} {found}, more than images can: {fix}")
    with archive.open(member) as file:
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
        shape, _, dtype = read_header(file)
        found = f"{path}: {name} is {dtype} {list(shape)}"
        if dtype.hasobject or dtype.itemsize == 0:
            raise DataError(f"{found}; it must be an array of numbers or texts: {fix}")
        size = about.file_size - file.tell()
        if size != math.prod(shape) * dtype.itemsize:
            raise DataError(f"{found} but has {size} bytes: {fix}")
    with archive.open(member) as file:
        return np.asarray(npy.read_array(file, allow_pickle=False))


def _split(path: Path, part: str, arrays: dict[str, npt.NDArray[Any]]) -> Split:
    images, labels = (arrays[f"{part}_{kind}"] for kind in ("images", "labels"))
    if images.ndim == 3 or images.shape[3:] == (1,):
        images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        found = f"{part}_images is {images.dtype} {list(images.shape)}"
        raise DataError(f"{path}: {found}; it must be {LAYOUT}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        found = f"{part}_labels is {labels.dtype} {list(labels.shape)}"
        raise DataError(f"{path}: {found}; it must be whole numbers [{len(images)}]")
    return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def _class_names(path: Path, arrays: dict[str, npt.NDArray[Any]], splits: list[Split]) -> tuple[str, ...]:
    if "class_names" not in arrays:
        highest = int(max(split.labels.max(initial=0) for split in splits))
        if highest >= sum(map(len, splits)):
            raise DataError(f"{path}: a label is {highest}, more than there are images: number the classes from 0")
        return tuple(str(index) for index in range(highest + 1))
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind not in "SU":
        raise DataError(f"{path}: class_names is {names.dtype} {list(names.shape)}; it must be texts [classes]")
    with reading(f"{path}: class_names", FIX):
        texts = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    if len(set(texts)) != len(texts):
        raise DataError(f"{path}: class_names has a name twice: give each class a name of its own")
    return texts
