"""Image files of a data set as one array of pixels."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from codistill.core.console import track
from codistill.core.errors import DataError, ResourceError
from codistill.data.dataset import Pixels, size_of
from codistill.data.images import FIX, MAX_FILE, Interpolation, decode_image
from codistill.data.untrusted import read_file


@dataclass(frozen=True)
class Decoded:
    """Image files that were decoded.

    Attributes:
        images: uint8 [kept, height, width, 3], RGB, in the order of the names; read-only where it is a memory map.
        kept: int64 [kept], the position in the names of each of these images.
        bad: A line about each file that cannot be read, by its position in the names.
        unlike: Likewise about each image of another size, where images are not resized; the caller adds how to fix it.
    """

    images: Pixels
    kept: npt.NDArray[np.int64]
    bad: Mapping[int, str]
    unlike: Mapping[int, str]


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
        ResourceError: The images do not fit into memory.
    """

    def image(position: int) -> Pixels | str:
        path = root / names[position]
        try:
            content = read_file(path, MAX_FILE, FIX) if read is None else read(position)
            return decode_image(content, str(path), size if resize else None, interpolation=interpolation)
        except DataError as error:
            return str(error)

    try:
        images = np.empty((len(names), *size, 3), np.uint8)
    except MemoryError as error:
        wanted = f"{len(names)} images of {size[0]}x{size[1]} pixels"
        raise ResourceError(f"{root}: {wanted} do not fit into memory: give a smaller resize") from error
    kept: list[int] = []
    bad: dict[int, str] = {}
    unlike: dict[int, str] = {}
    # Pillow decodes outside Python's global lock.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for position, found in enumerate(track(pool.map(image, range(len(names))), title, len(names))):
            if isinstance(found, str):
                bad[position] = found
            elif found.shape[:2] != size:
                other = f"is {size_of(found[None])} pixels, but most images are {size_of(images)}"
                unlike[position] = f"{root / names[position]}: {other}"
            else:
                images[len(kept)] = found
                kept.append(position)
    return Decoded(images[: len(kept)], np.array(kept, np.int64), bad, unlike)
