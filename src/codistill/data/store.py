"""Image files of a data set as one array of pixels: in memory, or decoded once into a file that is mapped.

A store is a folder of the cache. `pixels` holds the images, one after the other, and `rows` the position in the list of
files and the CRC-32 of each. While a store is made the first is called `pixels.part`, and whoever comes next continues
after the last row that is whole. `about.json` is written last, when all rows were read again: without it nobody trains.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import PIL

from codistill.core.console import duration, note, track, warn
from codistill.core.errors import DataError, ResourceError, reason
from codistill.core.files import PLACES, system_error, write_json
from codistill.core.host import cache_folder, cores, free_memory
from codistill.data.dataset import Pixels, size_of
from codistill.data.images import FIX, MAX_FILE, Interpolation, decode_image
from codistill.data.mapped import Facts, RowReader, begun_digest, digest, first_wrong, histogram
from codistill.data.untrusted import read_file

FORMAT = 1
ROW = np.dtype([("position", "<i8"), ("crc", "<u4")])
FEWEST_FILES, FEWEST_BYTES = 1000, 64 << 20  # with less of both, decoding takes no time worth a file, unless asked for
BATCH = 4 << 20  # bytes that one thread decodes at a time
SAMPLED = 32  # images that are compared with their checksums whenever a store is opened
UNUSED = 30 * 24 * 3600  # seconds after which a store may be removed

_place: ContextVar[str | None] = ContextVar("place of stores", default=None)


@contextlib.contextmanager
def stored_in(place: str | None) -> Iterator[None]:
    """Keep stores in a folder within a `with` block; None: in the user's cache folder; "off": make none."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


@dataclass(frozen=True)
class Decoded:
    """Image files that were decoded.

    Attributes:
        images: uint8 [kept, height, width, 3], RGB, in the order of the names; a read-only memory map, or in memory.
        kept: int64 [kept], the position in the names of each of these images.
        bad: A line about each file that cannot be read, by its position in the names.
        unlike: Likewise about each image of another size, where images are not resized; the caller adds the fix, once.
    """

    images: Pixels
    kept: npt.NDArray[np.int64]
    bad: Mapping[int, str]
    unlike: Mapping[int, str]


@dataclass(frozen=True)
class _Files:
    """What is to be decoded, and how."""

    root: Path
    names: Sequence[str]
    size: tuple[int, int]
    resize: bool
    interpolation: Interpolation
    read: Callable[[int], bytes] | None
    title: str

    @property
    def row(self) -> int:
        """Bytes of an image."""
        return self.size[0] * self.size[1] * 3

    def decode(self, positions: Sequence[int]) -> "_Batch":
        """Decode some of the files."""
        pixels, rows = np.empty((len(positions), *self.size, 3), np.uint8), np.empty(len(positions), ROW)
        bad: dict[int, str] = {}
        unlike: dict[int, str] = {}
        kept = 0
        for position in positions:
            path = self.root / self.names[position]
            try:
                content = read_file(path, MAX_FILE, FIX) if self.read is None else self.read(position)
                size = self.size if self.resize else None
                image = decode_image(content, str(path), size, interpolation=self.interpolation)
            except DataError as error:
                bad[position] = str(error)
                continue
            if image.shape[:2] != self.size:
                usual = f"{self.size[0]}x{self.size[1]}"
                unlike[position] = f"{path}: is {size_of(image[None])} pixels, not {usual}"
                continue
            pixels[kept] = image
            rows[kept] = position, zlib.crc32(pixels[kept].data)
            kept += 1
        return _Batch(pixels[:kept], rows[:kept], histogram(pixels[:kept]), bad, unlike)

    def batches(self, positions: Sequence[int]) -> "Iterator[_Batch]":
        """Decode files by all cores, in order; Pillow works outside Python's global lock.

        A few batches at a time, so that a slow disk does not fill the memory with what it has to write.
        """
        size = max(1, min(64, BATCH // max(1, self.row)))
        parts = iter(positions[start : start + size] for start in range(0, len(positions), size))
        waiting: deque[Future[_Batch]] = deque()
        pool = ThreadPoolExecutor(count := min(32, cores()), "decoding")
        try:
            for _ in track(range(-(-len(positions) // size)), self.title, -(-len(positions) // size)):
                while len(waiting) < 2 * count and (part := next(parts, None)) is not None:
                    waiting.append(pool.submit(self.decode, part))
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Batch:
    pixels: Pixels
    rows: npt.NDArray[Any]
    histogram: npt.NDArray[np.int64]
    bad: dict[int, str]
    unlike: dict[int, str]


def decoded(
    root: Path,
    names: Sequence[str],
    size: tuple[int, int],
    *,
    resize: bool,
    interpolation: Interpolation = "bilinear",
    read: Callable[[int], bytes] | None = None,
    version: str = "",
    title: str = "reading images",
) -> Decoded:
    """Decode image files; those that cannot be used are left out, with a line each, and nothing is raised for them.

    A thousand images or more, or 64 MiB of pixels, and all where a place was named (see `stored_in`), are decoded once
    into a file there, which is found again as long as names, sizes and times of the files, `size`, `interpolation` and
    the version of Pillow are the same. Of several processes one makes the file, and the others wait for it.

    Args:
        root: Folder that names are relative to; for lines about a file, and for data that hold the images.
        names: Path of each image relative to `root`, or another name that tells it from the others.
        size: Height and width of the images, pixels.
        resize: Whether each image is scaled until it covers `size`, and its centre cropped; else all must have it.
        interpolation: How images are scaled; see `decode_image`.
        read: Returns the contents of the file at a position in the names; None: read the file `root / name`. It is
            called by several threads.
        version: With `read`, what changes when any of the contents do: a fingerprint.
        title: Of the progress bar.

    Returns:
        The images that can be used, and lines about the others.

    Raises:
        ResourceError: The images fit neither into the cache nor into memory; the disk is full.
        UsageError: The place of the cache that was named cannot be written.
    """
    files = _Files(root, names, size, resize, interpolation, read, title)
    place = _place.get()
    small = len(names) < FEWEST_FILES and len(names) * files.row < FEWEST_BYTES
    if place == "off" or (place is None and small):
        return _in_memory(files)
    try:
        folder = (cache_folder() if place is None else Path(place).expanduser()) / "images"
        return _Store(folder, files, version).opened()
    except OSError as error:
        if place is not None or (error.errno not in PLACES and not isinstance(error, _NoRoom)):
            raise system_error(error, fix="name another folder with --data-cache") from error
        warn(f"{error.filename or folder}: {reason(error)}: the images are decoded again next time")
        return _in_memory(files)


def _in_memory(files: _Files) -> Decoded:
    count = len(files.names)
    wanted = f"{files.root}: {count} images of {files.size[0]}x{files.size[1]} pixels"
    fix = "give a smaller resize, or a folder for the decoded images with --data-cache"
    if count * files.row > free_memory():
        raise ResourceError(f"{wanted} do not fit into memory: {fix}")
    try:
        images, rows = np.empty((count, *files.size, 3), np.uint8), np.empty(count, ROW)
    except MemoryError as error:
        raise ResourceError(f"{wanted} do not fit into memory: {fix}") from error
    bad: dict[int, str] = {}
    unlike: dict[int, str] = {}
    kept = 0
    for batch in files.batches(range(count)):
        end = kept + len(batch.rows)
        images[kept:end], rows[kept:end] = batch.pixels, batch.rows
        bad.update(batch.bad)
        unlike.update(batch.unlike)
        kept = end
    return Decoded(images[:kept], rows["position"][:kept].astype(np.int64), bad, unlike)


class _NoRoom(OSError):
    """The disk has no room for a store that was not asked for."""


class _Damaged(Exception):
    """A store that is there, but is not to be trained on."""


class _Store:
    """The folder of one set of files in one preparation."""

    def __init__(self, folder: Path, files: _Files, version: str) -> None:
        self.files = files
        how = (FORMAT, PIL.__version__, *files.size, files.resize, files.interpolation if files.resize else "")
        key = hashlib.sha256(repr((how, os.fspath(files.root.resolve()), version)).encode())
        for name in files.names:
            about: object = None
            if files.read is None:
                with contextlib.suppress(OSError):  # a file that is gone becomes a line about it
                    found = os.stat(os.path.join(files.root, name))
                    about = (found.st_size, found.st_mtime_ns)
            key.update(repr((name, about)).encode("utf-8", "surrogateescape"))
        self.key = key.hexdigest()
        self.path = folder / f"{files.root.resolve().name[:40]}-{files.size[0]}x{files.size[1]}-{self.key[:16]}"
        self.about, self.pixels, self.part = (self.path / name for name in ("about.json", "pixels", "pixels.part"))
        self.rows = self.path / "rows"

    def opened(self) -> Decoded:
        """Return the images of the store, which is made or finished if it is not whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not self.about.exists():
                    note(f"{self.files.title}: another process decodes them into {self.path}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if self.about.exists():
                    return self._read()
            except (_Damaged, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                warn(f"{self.path}: damaged ({reason(error)}): the images are decoded again")
                for path in (self.about, self.pixels, self.part, self.rows):
                    path.unlink(missing_ok=True)
            self._make()
            return self._read()

    def _make(self) -> None:
        """Decode what is missing, read it all again, and write about.json."""
        files, started = self.files, time.monotonic()
        # Of what is decoded now, in passing; it is that of all images if all files are, and can be used.
        digested, counts = begun_digest(np.uint8, (len(files.names), *files.size, 3)), np.zeros((3, 256), np.int64)
        if self.pixels.exists() and not self.part.exists():  # it was killed between the last two steps
            self.pixels.rename(self.part)
        with (
            open(self.part, "ab") as pixels,
            open(self.rows, "ab") as rows,
            ThreadPoolExecutor(1, "flushing") as flusher,  # the disk writes while the cores decode
        ):
            flushed = flusher.submit(os.fsync, pixels.fileno())
            kept = self._whole(pixels, rows)
            done = set(kept["position"].tolist())
            missing = [position for position in range(len(files.names)) if position not in done]
            # Whatever comes before the last row was refused before, and is again.
            first = int(kept["position"][-1]) if len(kept) else -1
            self._refuse_without_room(sum(position > first for position in missing) * files.row)
            remove_unused(self.path.parent)
            total = f"{len(files.names):,} images, {len(files.names) * files.row / 1e6:,.1f} MB"
            begun = f"{len(kept):,} are there already; " if len(kept) else ""
            note(f"{files.title}: decoding {total}, once, into {self.path} ({begun}--data-cache names another place)")
            bad: dict[int, str] = {}
            unlike: dict[int, str] = {}
            shown = started
            for batch in files.batches(missing):
                late = batch.rows["position"] > first
                pixels.write(batch.pixels[late].data)
                pixels.flush()  # first, so that no row is without its pixels
                rows.write(batch.rows[late].tobytes())
                rows.flush()
                if flushed.done():
                    flushed.result()
                    flushed = flusher.submit(os.fsync, pixels.fileno())
                digested.update(batch.pixels.data)
                counts += batch.histogram
                bad.update(batch.bad)
                unlike.update(batch.unlike)
                for position in batch.rows["position"][~late].tolist():
                    path = files.root / files.names[position]
                    bad[position] = f"{path}: could not be read a while ago, and now it can: change its time (touch)"
                if time.monotonic() - shown > 60 and len(batch.rows):
                    shown, position = time.monotonic(), int(batch.rows["position"][-1]) + 1
                    note(f"{files.title}: {position:,} of {len(files.names):,} after {duration(shown - started)}")
            flushed.result()
            for file in (pixels, rows):
                os.fsync(file.fileno())
        records = np.fromfile(self.rows, ROW)
        images = self._map(self.part, len(records))
        if first_wrong(images, records["crc"]) < len(records):
            fix = "repair or replace the disk, or name another folder with --data-cache"
            raise ResourceError(f"{self.part}: does not hold what was written to it: {fix}")
        if len(kept) or len(records) < len(files.names):
            sha256, counts = digest(images), histogram(images)
        else:
            sha256 = digested.hexdigest()
        about = {"format": FORMAT, "key": self.key, "root": os.fspath(files.root), "size": list(files.size)}
        about |= {"images": len(records), "rows_crc": zlib.crc32(records.tobytes())}
        about |= {"sha256": sha256, "histogram": counts.tolist()}
        about |= {"bad": {str(each): line for each, line in bad.items()}}
        about |= {"unlike": {str(each): line for each, line in unlike.items()}}
        self.part.rename(self.pixels)
        write_json(self.about, about)
        note(f"{files.title}: {len(records):,} images decoded and checked in {duration(time.monotonic() - started)}")

    def _whole(self, pixels: IO[bytes], rows: IO[bytes]) -> npt.NDArray[Any]:
        """Return the rows that a process before has written, cut where they are not those of whole images."""
        records = np.fromfile(self.rows, ROW)
        records = records[: os.path.getsize(self.part) // max(1, self.files.row)]
        within = (records["position"] >= 0) & (records["position"] < len(self.files.names))
        risen = np.diff(records["position"], prepend=-1) > 0
        records = records[: int(np.argmin(np.append(within & risen, False)))]
        records = records[: first_wrong(self._map(self.part, len(records)), records["crc"])]
        pixels.truncate(len(records) * self.files.row)
        rows.truncate(len(records) * ROW.itemsize)
        return records

    def _map(self, path: Path, count: int) -> Pixels:
        if count * self.files.row == 0:  # nothing can be mapped
            return np.empty((count, *self.files.size, 3), np.uint8)
        return np.memmap(path, np.uint8, "r", shape=(count, *self.files.size, 3))

    def _read(self) -> Decoded:
        """Return the images of a whole store, some of which are compared with their checksums."""
        about, records = json.loads(self.about.read_text("utf-8")), np.fromfile(self.rows, ROW)
        if (about["format"], about["key"]) != (FORMAT, self.key):
            raise _Damaged("about.json is of another store")
        count, wanted = about["images"], about["images"] * self.files.row
        if len(records) != count or zlib.crc32(records.tobytes()) != about["rows_crc"]:
            raise _Damaged("rows are not those that were written")
        if (found := os.path.getsize(self.pixels)) != wanted:
            raise _Damaged(f"pixels has {found} bytes instead of {wanted}")
        images = self._map(self.pixels, count)
        if isinstance(images, np.memmap):
            reader = RowReader(images)
            # Other ones each time: what is wrong for long is found.
            for row in np.random.default_rng().integers(0, count, SAMPLED):
                if zlib.crc32(reader.read([row]).data) != records["crc"][row]:
                    raise _Damaged(f"image {row} has a wrong checksum")
            images.facts = Facts(about["sha256"], np.array(about["histogram"], np.int64))  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # it may be another user's
            os.utime(self.about)  # it is in use
        bad, unlike = ({int(position): line for position, line in about[kind].items()} for kind in ("bad", "unlike"))
        return Decoded(images, records["position"].astype(np.int64), bad, unlike)

    def _refuse_without_room(self, wanted: int) -> None:
        free = shutil.disk_usage(self.path).free
        if wanted > free:
            needs = f"{wanted / 1e9:.1f} GB of decoded images, but the disk has {free / 1e9:.1f} GB free"
            fix = "free some space, or name another folder with --data-cache"
            if _place.get() is None and len(self.files.names) * self.files.row < free_memory() / 2:
                raise _NoRoom(0, needs, os.fspath(self.path))
            raise ResourceError(f"{self.path}: {needs}: {fix}")


def remove_unused(folder: Path) -> None:
    """Remove stores that nothing has opened for a month; one that is being made is kept, and so is what is no store."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if not is_store(path):
                continue
            newest = max(each.stat().st_mtime for each in path.iterdir())
            with open(path / "lock", "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - newest > UNUSED:
                    shutil.rmtree(path)


def is_store(path: Path) -> bool:
    """Return whether a folder has the name of a store and holds its files, and no others."""
    if not re.fullmatch(r".*-\d+x\d+-[0-9a-f]{16}", path.name, re.DOTALL):
        return False
    names = {each.name.split(".")[0].split("-")[0] for each in path.iterdir()} if path.is_dir() else set()
    return "lock" in names and names <= {"lock", "about", "pixels", "rows", "thumbnails"}
