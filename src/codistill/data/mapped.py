"""Arrays of images in memory-mapped files, read so that they do not fill the memory of the process."""

import errno
import hashlib
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from codistill.core.errors import DataError

PIECE = 8 << 20  # bytes that are looked at together; a larger block the C library takes from the kernel each time


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
        return RowReader(images).read(range(len(images)))
    return np.require(images, requirements=["C", "W"])


def pieces(images: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield the images a piece at a time; of a mapped file the map itself stays untouched."""
    count = max(1, PIECE // max(1, images[:1].nbytes))
    reader = RowReader(images) if is_mapped(images) else None
    for start in range(0, len(images), count):
        if reader is None:
            yield np.ascontiguousarray(images[start : start + count])
        else:
            yield reader.read(range(start, min(start + count, len(images))))


def histogram(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Count each value of each channel of images [image, height, width, 3]; Pillow takes a third of NumPy's time."""
    return sum((_counts(piece) for piece in pieces(images)), np.zeros((3, 256), np.int64))


def _counts(piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    if not piece.size:
        return np.zeros((3, 256), np.int64)
    shape = piece.shape[2], piece.size // piece.shape[2] // 3
    return np.array(Image.frombuffer("RGB", shape, piece, "raw", "RGB", 0, 1).histogram(), np.int64).reshape(3, 256)


def facts(images: npt.NDArray[np.uint8], sums: npt.NDArray[np.uint32]) -> Facts:
    """Read images once, compute what is known of them, and compare each with its CRC-32.

    Raises:
        ValueError: An image has another checksum.
    """

    def look(piece: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        if [zlib.crc32(each.data) for each in piece] != wanted.tolist():
            raise ValueError("an image has another checksum")
        return _counts(piece)

    found, counts, start = _begun(images), np.zeros((3, 256), np.int64), 0
    with ThreadPoolExecutor(1) as pool:
        for piece in pieces(images):
            looked = pool.submit(look, piece, sums[start : start + len(piece)])
            found.update(piece.data)
            counts += looked.result()
            start += len(piece)
    return Facts(found.hexdigest(), counts)


def digest(array: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of type, shape and contents."""
    found = _begun(array)
    for piece in pieces(array):
        found.update(piece.data)
    return found.hexdigest()


def _begun(array: npt.NDArray[Any]) -> "hashlib._Hash":
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode())


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
