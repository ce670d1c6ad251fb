"""Decode one image file into RGB pixels; used by data sets and by `codistill predict`."""

import io
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from codistill.core.errors import DataError
from codistill.data.dataset import Pixels
from codistill.data.untrusted import read_file, reading

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")

MAX_FILE = 256 << 20  # bytes
MAX_PIXELS = 64 << 20  # a bomb of a few kB can claim billions
FIX = "repair or remove it"

PNG_END = b"IEND\xaeB`\x82"  # name and checksum of the last chunk, which are always the same

_opening = threading.Lock()


def open_image(path: Path, size: tuple[int, int] | None = None) -> Pixels:
    """Read an image file: PNG, JPEG, BMP, WEBP or GIF (its first frame); see `decode_image`."""
    return decode_image(read_file(path, MAX_FILE, FIX), str(path), size)


def decode_image(
    content: bytes,
    where: str,
    size: tuple[int, int] | None = None,
    *,
    formats: tuple[str, ...] = FORMATS,
    exact: tuple[int, int] | None = None,
) -> Pixels:
    """Decode the bytes of an image file.

    Args:
        size: Height and width wanted, pixels: the image is scaled until it covers them, keeping its aspect ratio, and
            its centre is cropped. None: as it is.
        formats: Formats to accept, as Pillow names them.
        exact: Height and width that it must have, pixels; checked before anything is decoded.

    Returns:
        uint8 [height, width, 3], RGB; transparent parts become white, a photo's EXIF orientation is applied.

    Raises:
        DataError: Not one of these formats, damaged, larger than 64 million pixels, or not of the exact size.
    """
    with reading(where, FIX):
        # Pillow warns of large images, and all threads share one list of warning filters.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _open(content, where, formats)
        with image:
            found = f"{where}: is {image.height}x{image.width} pixels"
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{found}, more than {MAX_PIXELS} in all: {FIX}")
            if exact is not None and (image.height, image.width) != exact:
                raise DataError(f"{found} instead of {exact[0]}x{exact[1]}: {FIX}")
            rgb = _to_rgb(ImageOps.exif_transpose(image))
            if size is not None:
                rgb = ImageOps.fit(rgb, (size[1], size[0]), Image.Resampling.BILINEAR)
            return np.array(rgb)


def _open(content: bytes, where: str, formats: tuple[str, ...]) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
        if image.format == "PNG":
            # Decoding skips the checksums of the pixel data: a flipped bit would become a wrong picture.
            if PNG_END not in content:
                raise ValueError("image file is truncated")
            image.verify()
            image = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError as error:
        raise DataError(f"{where}: is not a {', '.join(formats)} image: {FIX}") from error
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of type {image.mode} have no known range")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture)
        return ground.convert("RGB")
    return image.convert("RGB")
