"""Image files without their metadata: a picture is its pixels and its orientation, so nothing else can spoil it."""

import re
import zlib
from collections.abc import Iterator
from typing import Literal

PNG = b"\x89PNG\r\n\x1a\n"
WEBP_METADATA = 0x20 | 0x08 | 0x04  # flags of the header: ICC profile, EXIF, XMP
ORIENTATION, XMP = 0x112, 700
# Baseline tags of TIFF 6.0 that say how pixels are stored, and those of its compressions.
PIXEL_TAGS = {254, *range(256, 267), 273, 277, 278, 279, 284, 292, 293, 317, *range(320, 326), 332, 338, 339, 347}
PIXEL_TAGS |= {*range(512, 522), *range(529, 533)}


def only_pixels(content: bytes) -> tuple[bytes, int]:
    """Return an image file without metadata, and its orientation (1 to 8) by EXIF, or by XMP where EXIF has none.

    BMP, GIF, PPM and JPEG 2000 stay as they are; the orientation of AVIF and HEIC is for their decoders.

    Raises:
        ValueError: A PNG is cut, or a checksum of its pixels is wrong.
    """
    if content.startswith(PNG):
        return _png(content)
    if content.startswith(b"\xff\xd8"):
        return _jpeg(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _webp(content)
    if content[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(content)
    if content[4:8] == b"ftyp":  # AVIF and HEIC: decoders pass over items of other kinds than they know
        return re.sub(rb"(infe[\2\3].{7,9})(?:Exif|mime)", rb"\1skip", content, flags=re.DOTALL), 1
    return content, 1


def _png(content: bytes) -> tuple[bytes, int]:
    kept, orientation, xmp, place, name = [PNG], 0, 0, len(PNG), b""
    while name != b"IEND":
        length, name = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
        chunk = content[place : place + length + 12]
        if len(chunk) < length + 12:
            raise ValueError("image file is truncated")
        if not name[:1].islower() or name == b"tRNS":
            # Decoders skip the checksums of pixels: a flipped bit would become a wrong picture.
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
                raise ValueError(f"the checksum of {name.decode('latin-1')} at byte {place} is wrong")
            kept.append(chunk)
        elif name == b"eXIf":
            orientation = _orientation(chunk[8:-4])
        elif chunk[8:].startswith(b"XML:com.adobe.xmp\0"):
            xmp = _xmp_orientation(chunk)
        place += len(chunk)
    return b"".join(kept), orientation or xmp or 1


def _jpeg(content: bytes) -> tuple[bytes, int]:
    kept, orientation, xmp, place = [content[:2]], 0, 0, 2
    marker = re.compile(rb"\xff+([^\xff\0])", re.DOTALL)  # as decoders do, pass over bytes between segments
    while found := marker.search(content, place):
        code, place = found[1][0], found.end()
        if code in (0xD9, 0xDA):  # the end, or the pixels
            return b"".join((*kept, b"\xff", content[place - 1 :])), orientation or xmp or 1
        if code == 1 or 0xD0 <= code <= 0xD8:  # markers without content
            continue
        segment = content[place : place + max(2, int.from_bytes(content[place : place + 2]))]
        place += len(segment)
        # These two say which colours the numbers are.
        colours = (code, segment[2:7]) in ((0xE0, b"JFIF\0"), (0xEE, b"Adobe")) and len(segment) >= 14
        if colours or not (0xE0 <= code <= 0xEF or code == 0xFE):
            kept += [bytes((0xFF, code)), segment]
        elif code == 0xE1 and segment[2:8] == b"Exif\0\0":
            orientation = orientation or _orientation(segment[8:])
        elif code == 0xE1 and segment[2:].startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = _xmp_orientation(segment)
    return content, orientation or xmp or 1


def _webp(content: bytes) -> tuple[bytes, int]:
    kept, orientation, xmp, place = [b"WEBP"], 0, 0, 12
    end = min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    while place < end:
        name, length = content[place : place + 4], int.from_bytes(content[place + 4 : place + 8], "little")
        chunk = content[place : place + 8 + length + length % 2]
        place += len(chunk)
        if name == b"VP8X" and length:
            kept.append(chunk[:8] + bytes(each & ~WEBP_METADATA for each in chunk[8:9]) + chunk[9:])
        elif name == b"EXIF":
            orientation = _orientation(chunk[8:].removeprefix(b"Exif\0\0"))
        elif name == b"XMP ":
            xmp = _xmp_orientation(chunk)
        elif name != b"ICCP":
            kept.append(chunk)
    body = b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body, orientation or xmp or 1


def _tiff(content: bytes) -> tuple[bytes, int]:
    """Write the first directory again in its place, with fewer entries: no offset changes."""
    order, start, entries = _order(content), _number(content, 4, 4), list(_entries(content))
    kept = [entry for tag, entry in entries if tag in PIXEL_TAGS]
    packets = [
        (int.from_bytes(each[4:8], order), int.from_bytes(each[8:], order)) for tag, each in entries if tag == XMP
    ]
    xmp = [_xmp_orientation(content[place : place + length]) for length, place in packets]
    directory = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)
    stripped = (content[:start] + directory + content[start + len(directory) :])[: len(content)]
    return stripped, _orientation(content) or max(xmp, default=0) or 1


def _orientation(exif: bytes) -> int:
    """Return the orientation in EXIF; 0: it has none."""
    for tag, entry in _entries(exif):
        if tag == ORIENTATION:
            kind = int.from_bytes(entry[2:4], _order(exif))
            value = int.from_bytes(entry[8 : 8 + {1: 1, 4: 4}.get(kind, 2)], _order(exif))
            return value if 1 <= value <= 8 else 1
    return 0


def _xmp_orientation(packet: bytes) -> int:
    found = re.search(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\b", packet)
    return int(found[1]) if found else 0


def _entries(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Return tag and bytes of each entry in the first directory of a TIFF file, or of EXIF, as far as it goes."""
    start = _number(content, 4, 4)
    if content[:2] in (b"II", b"MM") and start >= 8:
        for place in range(start + 2, min(start + 2 + 12 * _number(content, start, 2), len(content) - 11), 12):
            yield _number(content, place, 2), content[place : place + 12]


def _number(content: bytes, place: int, length: int) -> int:
    return int.from_bytes(content[place : place + length], _order(content))


def _order(content: bytes) -> Literal["little", "big"]:
    return "little" if content[:2] == b"II" else "big"
