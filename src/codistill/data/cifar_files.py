"""The four published CIFAR archives: names, sizes, digests, and how to decode their records or pickled batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from codistill.core.errors import DataError
from codistill.data.dataset import Labels, Pixels
from codistill.data.unpickle import read_pickle
from codistill.data.untrusted import reading

HOST = "https://www.cs.toronto.edu/~kriz/"
IMAGE_BYTES = 3 * 32 * 32
NAMES_LIMIT = 1 << 16  # bytes of a file with class names


def decode_records(content: bytes, where: str, fix: str, label_bytes: int) -> tuple[Pixels, Labels]:
    """Return images uint8 [images, 32, 32, 3] and labels int64 [images] of a binary file.

    Its records are one label, or in CIFAR-100 a coarse and a fine one, then 3072 pixel bytes: planes R, G, B.
    """
    record = label_bytes + IMAGE_BYTES
    if len(content) % record or not content:
        cut = f"record {len(content) // record} (of {record} bytes) is cut"
        raise DataError(f"{where}: has {len(content)} bytes, so {cut}: {fix}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _planes_last(records[:, label_bytes:]), records[:, label_bytes - 1].astype(np.int64)


def decode_batch(content: bytes, where: str, fix: str, label_key: str) -> tuple[Pixels, Labels]:
    """Return images and labels, as `decode_records` does, of a pickle: `data` uint8 [images, 3072] and a label list."""
    batch = read_pickle(content, where, fix)
    images, labels = (_entry(batch, key, where, fix) for key in ("data", label_key))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (IMAGE_BYTES,):
        raise DataError(f"{where}: data is {_describe(images)}; it must be uint8 [images, {IMAGE_BYTES}]: {fix}")
    if not all(isinstance(label, int | np.integer) and -(2**62) < int(label) < 2**62 for label in labels):
        raise DataError(f"{where}: {label_key} is not a list of class indices: {fix}")
    if len(labels) != len(images):
        raise DataError(f"{where}: has {len(images)} images but {len(labels)} labels: {fix}")
    return _planes_last(images), np.array(labels, dtype=np.int64)


def decode_lines(content: bytes, where: str, fix: str) -> tuple[str, ...]:
    """Return class names, one a line of a text."""
    if len(content) > NAMES_LIMIT:
        raise DataError(f"{where}: has {len(content)} bytes, more than class names can have: {fix}")
    with reading(where, fix):
        return tuple(line.strip() for line in content.decode().splitlines() if line.strip())


def decode_meta(content: bytes, where: str, fix: str, key: str) -> tuple[str, ...]:
    """Return the class names in a pickle."""
    names = _entry(read_pickle(content, where, fix), key, where, fix)
    if not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{where}: {key} is not a list of names: {fix}")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)


def _entry(batch: Mapping[str, Any], key: str, where: str, fix: str) -> Any:
    value = batch.get(key)
    if not isinstance(value, list | tuple | np.ndarray) or (isinstance(value, np.ndarray) and value.ndim == 0):
        raise DataError(f"{where}: has no list or array {key!r}: {fix}")
    return value


def _planes_last(planes: np.ndarray[Any, np.dtype[np.uint8]]) -> Pixels:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _describe(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"


@dataclass(frozen=True)
class Release:
    """One published archive of one data set."""

    archive: str
    size: int  # of the archive, bytes
    digest: str  # of the archive
    folder: str  # inside the archive, and the one that it is extracted to
    train: tuple[str, ...]
    test: str
    names: str  # file of class names
    digests: Mapping[str, str]  # of the files inside, as far as published
    decode: Callable[[bytes, str, str], tuple[Pixels, Labels]]
    decode_names: Callable[[bytes, str, str], tuple[str, ...]]


# Sizes and digests: torchvision's and Keras' loaders (python archives and their files), torchvision for Ruby (binary).
CIFAR10 = (
    Release(
        archive="cifar-10-binary.tar.gz",
        size=170_052_171,
        digest="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{index}.bin" for index in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        digests={
            "data_batch_1.bin": "sha256:cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "sha256:a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "sha256:bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "sha256:014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "sha256:755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "sha256:8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        decode=partial(decode_records, label_bytes=1),
        decode_names=decode_lines,
    ),
    Release(
        archive="cifar-10-python.tar.gz",
        size=170_498_071,
        digest="sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{index}" for index in range(1, 6)),
        test="test_batch",
        names="batches.meta",
        digests={
            "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
            "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
            "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "md5:40351d587109b95175f43aff81a1287e",
            "batches.meta": "md5:5ff9c542aee3614f3951f8cda6e48888",
        },
        decode=partial(decode_batch, label_key="labels"),
        decode_names=partial(decode_meta, key="label_names"),
    ),
)
CIFAR100 = (
    Release(
        archive="cifar-100-binary.tar.gz",
        size=168_513_733,
        digest="sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        digests={
            "train.bin": "sha256:f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
            "test.bin": "sha256:d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
        },
        decode=partial(decode_records, label_bytes=2),
        decode_names=decode_lines,
    ),
    Release(
        archive="cifar-100-python.tar.gz",
        size=169_001_437,
        digest="sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        names="meta",
        digests={
            "train": "md5:16019d7e3df5f24257cddd939b257f8d",
            "test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "md5:7973b15100ade9c7d40fb424638fde48",
        },
        decode=partial(decode_batch, label_key="fine_labels"),
        decode_names=partial(decode_meta, key="fine_label_names"),
    ),
)
