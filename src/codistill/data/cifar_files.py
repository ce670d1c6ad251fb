"""The two layouts of CIFAR's files: records of fixed size, and pickled batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from codistill.core.errors import DataError
from codistill.data.dataset import Labels, Pixels
from codistill.data.unpickle import read_pickle

IMAGE_BYTES = 3 * 32 * 32
NAMES_LIMIT = 1 << 16  # bytes of a file with class names


def decode_records(content: bytes, where: str, mend: str, label_bytes: int) -> tuple[Pixels, Labels]:
    """Split the fixed-size records of a binary file.

    Args:
        content: Records of `label_bytes` labels, the last of which counts, then 3072 pixel bytes: planes R, G, B.
        where: The file, for the error line.
        mend: What the user can do, for the error line.
        label_bytes: 1 in CIFAR-10; 2 in CIFAR-100, where the coarse label comes first.

    Returns:
        uint8 [images, 32, 32, 3] and int64 [images].

    Raises:
        DataError: The last record is cut.
    """
    record = label_bytes + IMAGE_BYTES
    if len(content) % record or not content:
        raise DataError(
            f"{where}: has {len(content)} bytes, so record {len(content) // record} (of {record} bytes) is cut: {mend}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _planes_last(records[:, label_bytes:]), records[:, label_bytes - 1].astype(np.int64)


def decode_batch(content: bytes, where: str, mend: str, label_key: str) -> tuple[Pixels, Labels]:
    """Read a pickled batch: `data` uint8 [images, 3072], planes R, G, B, and a list of labels.

    Args:
        content: The pickle.
        where: The file, for the error line.
        mend: What the user can do, for the error line.
        label_key: Which entry has the labels.

    Returns:
        uint8 [images, 32, 32, 3] and int64 [images].

    Raises:
        DataError: Damaged, forbidden content, or not such arrays.
    """
    batch = read_pickle(content, where, mend)
    images, labels = (_entry(batch, key, where, mend) for key in ("data", label_key))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (IMAGE_BYTES,):
        raise DataError(f"{where}: data is {_describe(images)}; it must be uint8 [images, {IMAGE_BYTES}]: {mend}")
    if not all(isinstance(label, int | np.integer) and -(2**62) < int(label) < 2**62 for label in labels):
        raise DataError(f"{where}: {label_key} is not a list of class indices: {mend}")
    if len(labels) != len(images):
        raise DataError(f"{where}: has {len(images)} images but {len(labels)} labels: {mend}")
    return _planes_last(images), np.array(labels, dtype=np.int64)


def decode_lines(content: bytes, where: str, mend: str) -> tuple[str, ...]:
    """Read class names, one a line.

    Raises:
        DataError: Not a text, or a long one.
    """
    if len(content) > NAMES_LIMIT:
        raise DataError(f"{where}: has {len(content)} bytes, more than class names can have: {mend}")
    try:
        return tuple(line.strip() for line in content.decode().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not a text: {mend}") from error


def decode_meta(content: bytes, where: str, mend: str, key: str) -> tuple[str, ...]:
    """Read class names from a pickle.

    Raises:
        DataError: Damaged, forbidden content, or no list of names.
    """
    names = _entry(read_pickle(content, where, mend), key, where, mend)
    if not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{where}: {key} is not a list of names: {mend}")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)


def _entry(batch: Mapping[str, Any], key: str, where: str, mend: str) -> Any:
    value = batch.get(key)
    if not isinstance(value, list | tuple | np.ndarray) or (isinstance(value, np.ndarray) and value.ndim == 0):
        raise DataError(f"{where}: has no list or array {key!r}: {mend}")
    return value


def _planes_last(planes: np.ndarray[Any, np.dtype[np.uint8]]) -> Pixels:
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _describe(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
