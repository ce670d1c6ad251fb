"""Decode one image file into RGB pixels; used by data sets and by `codistill predict`."""

import importlib
import io
import logging
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from codistill.core.errors import DataError
from codistill.data.dataset import Pixels
from codistill.data.metadata import ORIENTATION, only_pixels
from codistill.data.untrusted import read_file, reading

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")  # as Pillow names them
SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".webp", ".gif", ".tif")
SUFFIXES += (".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".heic", ".heif")

MAX_FILE = 256 << 20  # bytes
MAX_PIXELS = 64 << 20  # a bomb of a few kB can claim billions
FIX = "repair or remove it"
HEIC = {b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")}

Interpolation = Literal["bilinear", "bicubic", "lanczos"]
"""How images are scaled, as Pillow names it; all of them smooth an image that shrinks (antialias)."""

TURNS = {  # to undo each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_opening = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it would print of a bad file is in the error


def preprocessing(interpolation: str) -> dict[str, Any]:
    """Return what `decode_image` does to an image file, for records and model cards."""
    return {
        "orientation": "EXIF",
        "colour": "RGB, transparent parts on white",
        "resize": "cover",  # scaled, its aspect ratio kept, until it covers the size
        "crop": "centre",
        "interpolation": interpolation,
        "antialias": True,
        "library": f"Pillow {PIL.__version__}",
    }


def open_image(path: Path, size: tuple[int, int] | None = None, interpolation: Interpolation = "bilinear") -> Pixels:
    """Read an image file of one of `FORMATS`, or HEIC (the first frame), whatever its name; see `decode_image`."""
    return decode_image(read_file(path, MAX_FILE, FIX), str(path), size, interpolation=interpolation)


def decode_image(
    content: bytes,
    where: str,
    size: tuple[int, int] | None = None,
    *,
    interpolation: Interpolation = "bilinear",
    formats: tuple[str, ...] = FORMATS,
    exact: tuple[int, int] | None = None,
) -> Pixels:
    """Decode the bytes of an image file.

    Args:
        size: Height and width wanted, pixels: the image is scaled until it covers them, keeping its aspect ratio, and
            its centre is cropped. None: as it is.
        interpolation: How it is scaled.
        formats: Formats to accept, as Pillow names them.
        exact: Height and width that it must have, pixels; checked before anything is decoded.

    Returns:
        uint8 [height, width, 3], RGB; transparent parts become white, a photo's EXIF orientation is applied; other
        metadata are not looked at.

    Raises:
        DataError: Not one of these formats, damaged, larger than 64 million pixels, or not of the exact size.
    """
    with reading(where, FIX):
        content, orientation = only_pixels(content)
        # Pillow warns of large images and odd headers, and all threads share one list of warning filters.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _open(content, where, formats)
        with image:
            found = f"{where}: is {image.height}x{image.width} pixels"
            if image.format == "AVIF":  # its decoder leaves turning to others
                orientation = image.getexif().get(ORIENTATION, 1)
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{found}, more than {MAX_PIXELS} in all: {FIX}")
            if exact is not None and (image.height, image.width) != exact:
                raise DataError(f"{found} instead of {exact[0]}x{exact[1]}: {FIX}")
            rgb = _to_rgb(image)
            if orientation in TURNS:
                rgb = rgb.transpose(TURNS[orientation])
            if size is not None:
                rgb = ImageOps.fit(rgb, (size[1], size[0]), Image.Resampling[interpolation.upper()])
            return np.array(rgb)


def _open(content: bytes, where: str, formats: tuple[str, ...]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError as error:
        if content[4:12] in HEIC and formats is FORMATS:
            return _open_heic(content, where)
        raise DataError(f"{where}: is not a {', '.join(formats)} image: {FIX}") from error


def _open_heic(content: bytes, where: str) -> Image.Image:
    try:
        pillow_heif = importlib.import_module("pillow_heif")
    except ImportError:
        fix = f"{sys.executable} -m pip install pillow-heif"
        raise DataError(f"{where}: a HEIC picture, which takes a package more to read: {fix}") from None
    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(content), formats=("HEIF",))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PPM: scaled to all 16 bits
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of type {image.mode} have no known range")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture)
        return ground.convert("RGB")
    if image.mode == "RGB":  # to convert it would copy it
        image.load()
        return image
    return image.convert("RGB")
