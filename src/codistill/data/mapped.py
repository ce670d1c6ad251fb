"""Arrays of images in memory-mapped files, read so that they do not fill the memory of the process."""

import errno
import hashlib
import mmap
import os
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from codistill.core.errors import DataError
from codistill.core.host import cores

PIECE = 8 << 20  # bytes that are looked at together; a larger block the C library takes from the kernel each time
COUNTED = 256 << 10  # bytes whose values are counted together

T = TypeVar("T")


class Facts(NamedTuple):
    """What is known of images without reading them, an attribute `facts` of a memory map.

    Attributes:
        sha256: Of type, shape and contents, as `digest` computes it.
        histogram: int64 [3, 256], how often each channel has each value.
    """

    sha256: str
    histogram: npt.NDArray[np.int64]


def is_mapped(images: npt.NDArray[Any]) -> TypeGuard["np.memmap[Any, Any]"]:
    """Whether an array is, or is a part without gaps of, a file that was mapped to be read only."""
    mapped = isinstance(images, np.memmap) and images.mode == "r" and images.filename is not None
    return mapped and bool(images.flags.c_contiguous) and isinstance(images.base, np.memmap | mmap.mmap)


def facts_of(images: npt.NDArray[Any]) -> Facts | None:
    """Return the facts that came with images; None: they are to be computed."""
    facts: Facts | None = getattr(images, "facts", None)
    return facts


def in_memory(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return images that are in memory and can be written to, as torch wants; a file is read without its map."""
    if is_mapped(images):
        reader, out = RowReader(images), np.empty(images.shape, images.dtype)
        deque(_by_all_cores(images, lambda start, stop: reader.read(range(start, stop), out[start:stop])), maxlen=0)
        return out
    return np.require(images, requirements=["C", "W"])


def pieces(images: npt.NDArray[Any], count: int | None = None) -> Iterator[npt.NDArray[Any]]:
    """Yield the images some at a time, None: 8 MiB of them; of a mapped file the map itself stays untouched."""
    count, reader = count or _in_a_piece(images), RowReader(images) if is_mapped(images) else None
    for start in range(0, len(images), count):
        if reader is None:
            yield np.ascontiguousarray(images[start : start + count])
        else:
            yield reader.read(range(start, min(start + count, len(images))))


def histogram(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Count each value of each channel of images [image, height, width, 3]; Pillow takes a third of NumPy's time."""
    found = np.zeros((3, 256), np.int64)
    for piece in pieces(images):
        # What Pillow copies is to stay in the processor's cache: a larger block takes three times as long.
        for part in np.array_split(piece, max(1, min(len(piece), piece.nbytes // COUNTED))):
            if part.size:
                shape = part.shape[2], part.size // part.shape[2] // 3
                image = Image.frombuffer("RGB", shape, part, "raw", "RGB", 0, 1)
                found += np.array(image.histogram(), np.int64).reshape(3, 256)
    return found


def first_wrong(images: npt.NDArray[np.uint8], sums: npt.NDArray[np.uint32]) -> int:
    """Read images, by all cores, and return the position of the first whose CRC-32 is not its own; their number."""
    reader = RowReader(images) if is_mapped(images) else None

    def wrong(start: int, stop: int) -> int | None:
        piece = images[start:stop] if reader is None else reader.read(range(start, stop))
        found = np.array([zlib.crc32(each.data) for each in piece], np.uint32) != sums[start:stop]
        return start + int(np.argmax(found)) if found.any() else None

    return next((each for each in _by_all_cores(images, wrong) if each is not None), len(images))


def _by_all_cores(images: npt.NDArray[Any], look: Callable[[int, int], T]) -> Iterator[T]:
    """Yield in order what a function returns of each piece of images, from a position to before another."""
    count = _in_a_piece(images)
    with ThreadPoolExecutor(min(32, cores())) as pool:
        yield from pool.map(lambda start: look(start, min(start + count, len(images))), range(0, len(images), count))


def _in_a_piece(images: npt.NDArray[Any]) -> int:
    return max(1, PIECE // max(1, images[:1].nbytes))


def digest(array: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of type, shape and contents."""
    found = begun_digest(array.dtype, array.shape)
    for piece in pieces(array):
        found.update(piece.data)
    return found.hexdigest()


def begun_digest(dtype: npt.DTypeLike, shape: tuple[int, ...]) -> "hashlib._Hash":
    """Return the SHA-256 of a type and shape alone, which the contents are still to be put into; see `digest`."""
    return hashlib.sha256(f"{np.dtype(dtype)} {shape}".encode())


class RowReader:
    """Reads rows of a mapped array from its file: pages that are read so do not count as memory of the process.

    Raises:
        DataError: The file is gone, cannot be read, or was cut.
    """

    def __init__(self, images: "np.memmap[Any, Any]") -> None:
        # A part of a map has its offset from the whole, so that of its first row is found by addresses.
        start = np.frombuffer(images._mmap, np.uint8).__array_interface__["data"][0]  # type: ignore[attr-defined]
        assert images.filename is not None
        self.path = os.fspath(images.filename)
        self.shape, self.dtype, self.bytes = images.shape[1:], images.dtype, images[:1].nbytes
        self.offset = images.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self.offset += images.__array_interface__["data"][0] - start
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._lost(error) from None
        weakref.finalize(self, os.close, self._file)

    def read(self, rows: Sequence[int] | range, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return some rows, in `out` if it is given."""
        out = np.empty((len(rows), *self.shape), self.dtype) if out is None else out
        if isinstance(rows, range) and rows.step == 1:
            self._fill(out[: len(rows)], rows.start)
        else:
            for place, row in enumerate(rows):
                self._fill(out[place : place + 1], row)
        return out

    def _fill(self, out: npt.NDArray[Any], row: int) -> None:
        view, offset = (
            memoryview(out.data).cast("B") if out.size else memoryview(b""),
            self.offset + int(row) * self.bytes,
        )
        while view:
            try:
                count = os.preadv(self._file, [view], offset)
            except OSError as error:
                raise self._lost(error) from None
            if count == 0:
                raise self._lost(OSError(errno.EIO, "the file was cut"))
            view, offset = view[count:], offset + count

    def _lost(self, error: OSError) -> DataError:
        return DataError(f"{self.path}: cannot be read ({error.strerror}): start again, and it is made again")
