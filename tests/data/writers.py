"""Write small data sets in their true layouts."""

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

CINIC_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass
class Arrays:
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]


def random_arrays(classes: int, per_class: int = 2, size: tuple[int, int] = (32, 32), seed: int = 0) -> Arrays:
    """As many images of each class in train as asked for, and one in test, in random order."""
    rng = np.random.default_rng(seed)
    train, test = (rng.permutation(np.repeat(np.arange(classes), count)) for count in (per_class, 1))
    images = [rng.integers(0, 256, (len(labels), *size, 3), dtype=np.uint8) for labels in (train, test)]
    return Arrays(images[0], train, images[1], test, tuple(f"class{index:03d}" for index in range(classes)))


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def records(images: np.ndarray, labels: np.ndarray, coarse: bool) -> bytes:
    columns = [labels[:, None].astype(np.uint8), planes(images)]
    if coarse:
        columns.insert(0, (labels[:, None] // 5).astype(np.uint8))
    return np.concatenate(columns, axis=1).tobytes()


def cifar_binary(name: str, arrays: Arrays) -> dict[str, bytes]:
    names = ("\n".join(arrays.class_names) + "\n\n").encode()
    test = records(arrays.test_images, arrays.test_labels, coarse=name == "cifar100")
    if name == "cifar100":
        train = records(arrays.train_images, arrays.train_labels, coarse=True)
        return {"fine_label_names.txt": names, "train.bin": train, "test.bin": test}
    files = {"batches.meta.txt": names, "test_batch.bin": test}
    for index, (images, labels) in enumerate(fifths(arrays), start=1):
        files[f"data_batch_{index}.bin"] = records(images, labels, coarse=False)
    return files


def cifar_python(name: str, arrays: Arrays) -> dict[str, bytes]:
    def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
        if name == "cifar100":
            coarse = [int(label) // 5 for label in labels]
            return python2_pickle({b"data": planes(images), b"fine_labels": labels.tolist(), b"coarse_labels": coarse})
        return python2_pickle({b"batch_label": b"x", b"data": planes(images), b"labels": labels.tolist()})

    names = [text.encode() for text in arrays.class_names]
    test = batch(arrays.test_images, arrays.test_labels)
    if name == "cifar100":
        meta = python2_pickle({b"fine_label_names": names, b"coarse_label_names": [b"c"]})
        return {"meta": meta, "train": batch(arrays.train_images, arrays.train_labels), "test": test}
    files = {"batches.meta": python2_pickle({b"label_names": names, b"num_vis": 3072}), "test_batch": test}
    for index, (images, labels) in enumerate(fifths(arrays), start=1):
        files[f"data_batch_{index}"] = batch(images, labels)
    return files


def fifths(arrays: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    cuts = np.array_split(np.arange(len(arrays.train_labels)), 5)
    return [(arrays.train_images[cut], arrays.train_labels[cut]) for cut in cuts]


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its texts, as in the published files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        if len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    # NumPy 1 was all there was.
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tar_gz(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Write an archive of any entries, also bad ones."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    path.write_bytes(gzip.compress(file.getvalue(), 1, mtime=0))
    return path


def tar_info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def write_archive(path: Path, folder: str, files: Mapping[str, bytes]) -> Path:
    entries = [(tar_info(folder, kind=tarfile.DIRTYPE), b"")] if folder else []
    prefix = f"{folder}/" if folder else ""
    return tar_gz(path, entries + [(tar_info(prefix + name, len(data)), data) for name, data in files.items()])


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def cinic_files(per_class: int = 2) -> tuple[dict[str, bytes], dict[str, Arrays]]:
    """Files of the three parts, and the arrays of each part in the order of class and file name (as `train`)."""
    files, expected = {}, {}
    for seed, part in enumerate(("train", "valid", "test")):
        arrays = random_arrays(10, per_class, seed=seed)
        order = np.argsort(arrays.train_labels, kind="stable")
        arrays.train_images, arrays.train_labels = arrays.train_images[order], arrays.train_labels[order]
        expected[part] = arrays
        for index, (image, label) in enumerate(zip(arrays.train_images, arrays.train_labels, strict=True)):
            files[f"{part}/{CINIC_CLASSES[label]}/cifar10-{part}-{index:05d}.png"] = encode(image)
    return files, expected


def image_folder_files(size: tuple[int, int] = (12, 10), kind: str = "PNG") -> tuple[dict[str, bytes], Arrays]:
    arrays = random_arrays(3, size=size)
    arrays.class_names = ("ant", "bee", "cat")
    files = {}
    for part in ("train", "test"):
        images, labels = getattr(arrays, f"{part}_images"), getattr(arrays, f"{part}_labels")
        order = np.argsort(labels, kind="stable")
        setattr(arrays, f"{part}_images", images[order])
        setattr(arrays, f"{part}_labels", labels[order])
        for index, place in enumerate(order):
            files[f"{part}/{arrays.class_names[labels[place]]}/{index:03d}.{kind.lower()}"] = encode(
                images[place], kind
            )
    return files, arrays


def write_npz(path: Path, arrays: Arrays, **changes: Any) -> Path:
    """Write a packed file; a change to None leaves an array out."""
    content = {**vars(arrays), "class_names": np.array(arrays.class_names), **changes}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def listing(folder: Path) -> dict[str, bytes]:
    """All files below a folder and their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
