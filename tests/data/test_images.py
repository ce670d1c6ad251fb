import contextlib
import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from codistill.core.errors import DataError, ResourceError
from codistill.data.images import decode_image, open_image

from .writers import encode

SMOOTH = np.mgrid[0:200:10, 0:210:7].transpose(1, 2, 0)[..., [0, 1, 1]].astype(np.uint8)
RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_kinds_come_back_as_they_were(tmp_path, kind):
    path = tmp_path / "image"
    path.write_bytes(encode(RGB, kind))
    image = open_image(path)
    np.testing.assert_array_equal(image, RGB)
    assert image.dtype == np.uint8 and image.flags.writeable


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("GIF", {})])
def test_other_kinds_come_back_nearly(kind, options):
    smooth = np.broadcast_to(np.linspace(50, 200, 30).astype(np.uint8)[:, None], (20, 30, 3))
    image = decode_image(encode(smooth, kind, **options), "x")
    assert image.shape == (20, 30, 3) and np.abs(image.astype(int) - smooth).max() <= 8


def test_the_first_frame_of_an_animation_counts():
    red, blue = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    content = encode(red, "GIF", save_all=True, append_images=[blue])
    np.testing.assert_array_equal(decode_image(content, "x"), np.asarray(red))


def test_grey_palette_and_one_bit():
    grey = RGB[:, :, 0]
    np.testing.assert_array_equal(decode_image(encode(grey), "x"), np.repeat(grey[:, :, None], 3, axis=2))
    palette = Image.fromarray(RGB).convert("P")
    np.testing.assert_array_equal(decode_image(encode(palette), "x"), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(grey > 100)
    np.testing.assert_array_equal(decode_image(encode(bits), "x"), np.asarray(bits.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 255, 256], [1000, 40000, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(decode_image(encode(values), "x")[:, :, 1], values >> 8)


def test_a_transparent_value_of_sixteen_bits_is_white():
    values = np.array([[0, 255, 256], [1000, 40000, 65535]], dtype=np.uint16)
    image = decode_image(encode(values, transparency=1000), "x")[:, :, 1]
    assert image.tolist() == [[0, 0, 1], [255, 40000 >> 8, 255]]


def test_transparency_lies_on_white():
    alpha = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    alpha[:5, :, 3] = 0
    image = decode_image(encode(alpha), "x")
    assert (image[:5] == 255).all() and (image[5:] == RGB[5:]).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 1)
    image = decode_image(encode(palette, transparency=0), "x")
    assert image[0, 0].tolist() == [40, 50, 60] and image[1, 1].tolist() == [255, 255, 255]


def test_cmyk_and_orientation_of_photos():
    assert decode_image(encode(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "x").shape == RGB.shape
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    image = decode_image(encode(RGB, "JPEG", exif=exif, quality=100, subsampling=0), "x")
    assert image.shape == (30, 20, 3)
    assert np.abs(image.astype(int) - np.rot90(RGB, -1)).mean() < 3


def test_resize_scales_the_shorter_side_and_keeps_the_middle():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    wide[:, 20:30, 0] = 100
    image = decode_image(encode(wide), "x", (10, 10))
    assert image.shape == (10, 10, 3)
    assert (image[:, 1:-1, 1] == 200).all() and (image[:, [0, -1], 1] > 150).all(), "the middle third"
    assert (image[:, 1:4, 0] == 100).all() and (image[:, 6:-1, 0] == 200).all()
    assert decode_image(encode(wide), "x", (7, 31)).shape == (7, 31, 3)
    np.testing.assert_array_equal(decode_image(encode(RGB), "x", (20, 30)), RGB)


def test_exact_size_and_formats():
    assert decode_image(encode(RGB), "x", exact=(20, 30)).shape == RGB.shape
    with pytest.raises(DataError, match=r"^x: is 20x30 pixels instead of 30x20: repair"):
        decode_image(encode(RGB), "x", exact=(30, 20))
    with pytest.raises(DataError, match=r"^x: is not a PNG image"):
        decode_image(encode(RGB, "BMP"), "x", formats=("PNG",))


@pytest.mark.parametrize("content", [b"", b"hello", encode(RGB, "PCX")])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.png: is not a PNG, JPEG, .*, AVIF image: repair or remove it"):
        open_image(path)
    with pytest.raises(DataError, match="no such file"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.8])
def test_truncated(kind, kept):
    content = encode(RGB, kind)
    with pytest.raises(DataError, match=r"^x: "):
        decode_image(content[: int(len(content) * kept)], "x")


def test_a_flipped_byte_in_a_png_is_never_a_wrong_picture():
    content = encode(RGB)
    for place in range(8, len(content), 13):
        flipped = bytearray(content)
        flipped[place] ^= 1
        with pytest.raises(DataError):
            decode_image(bytes(flipped), "x")


def test_floating_point_pixels_have_no_range():
    content = io.BytesIO()
    Image.new("F", (4, 4)).save(content, "TIFF")
    with pytest.raises(DataError, match="no known range"):
        decode_image(content.getvalue(), "x", formats=("TIFF",))


def odd_exif(orientation: int) -> bytes:
    """A resolution written as text, a date of no length, and a pointer to nowhere: Pillow cannot write this again."""
    tags = [(0x112, 3, 1, struct.pack("<HH", orientation, 0)), (0x11A, 2, 3, b"72\0\0"), (0x132, 2, 0, bytes(4))]
    tags.append((0x8769, 4, 1, b"\xff\xff\xff\x7f"))
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries


def chunk(name: bytes, content: bytes, damage: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content) ^ damage)


def with_metadata(kind: str, orientation: int) -> bytes:
    """An image with sound pixels and metadata of which hardly anything is right."""
    exif = odd_exif(orientation)
    if kind == "JPEG":
        content = encode(RGB, kind, quality=100, subsampling=0)
        junk = b"\xff\xe2\0\x10ICC_PROFILE\0\x07\x02" + b"\xff\xe1\0\x0bhttp://" + b"\xff\xfe\0\4\xff\xfe" + b"\0\0"
        body = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
        return content[:2] + body + junk + b"\xff\xe0\0\x09JFIF\0\1" + content[2:]
    if kind == "WEBP":
        return encode(RGB, kind, lossless=True, exif=b"Exif\0\0" + exif, icc_profile=b"no", xmp=b"<")
    content = encode(RGB)
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(4 << 20)))
    odd = chunk(b"iCCP", b"x\0\0junk") + bomb + chunk(b"tEXt", b"a\0b", damage=1) + chunk(b"pHYs", b"1")
    return content[:33] + chunk(b"eXIf", exif) + odd + content[33:] + b"behind the end"


@pytest.mark.fault(41)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_only_pixels_and_orientation_of_a_picture_matter(kind, orientation):
    turned = {2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1), 6: np.rot90(RGB, -1)}
    turned |= {7: RGB[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(RGB)}
    expected = turned.get(orientation, RGB)
    image = decode_image(with_metadata(kind, orientation), "x")
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < (3 if kind == "JPEG" else 1e-9)


@pytest.mark.fault(88)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("form", [b'<x tiff:Orientation="6"/>', b"<tiff:Orientation>6</tiff:Orientation>"])
def test_orientation_in_xmp_counts_where_exif_has_none(kind, form):
    if kind == "PNG":
        content = encode(RGB)
        contents = [content[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + form) + content[33:]]
    elif kind == "TIFF":
        contents = [encode(RGB, kind, tiffinfo={700: form})]
    else:
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0}
        contents = [encode(RGB, kind, xmp=form, **options)]
        contents.append(encode(RGB, kind, xmp=form.replace(b"6", b"3"), exif=b"Exif\0\0" + odd_exif(6), **options))
    for content in contents:
        image = decode_image(content, "x")
        assert image.shape == (30, 20, 3) and np.abs(image.astype(int) - np.rot90(RGB, -1)).mean() < 3


@pytest.mark.fault(88)
@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM"])
def test_further_kinds_are_read_or_refused_whole(tmp_path, kind):
    content = encode(SMOOTH, kind, **({"quality": 100} if kind == "AVIF" else {}))
    (tmp_path / "image.png").write_bytes(content)  # its name does not matter
    assert np.abs(open_image(tmp_path / "image.png").astype(int) - SMOOTH).mean() <= 4
    for kept in (0.3, 0.6, 0.95):
        with pytest.raises(DataError):
            decode_image(content[: int(kept * len(content))], "x")
    grey, bits = np.asarray(SMOOTH[..., 0]), Image.fromarray(SMOOTH[..., 0] > 100)
    assert np.abs(decode_image(encode(grey, kind), "x").astype(int) - grey[..., None]).max() <= 12
    if kind == "PPM":
        np.testing.assert_array_equal(decode_image(encode(bits, kind), "x"), np.asarray(bits.convert("RGB")))
        wide = decode_image(encode(grey.astype(np.uint16) << 8, kind), "x")
        np.testing.assert_array_equal(wide[..., 0], grey)


@pytest.mark.fault(88)
@pytest.mark.parametrize("orientation", [1, 3, 5, 6])
def test_avif_is_turned_whatever_its_metadata_are(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    content = encode(SMOOTH, "AVIF", quality=100, exif=exif, xmp=b"<")
    turned = {3: SMOOTH[::-1, ::-1], 5: SMOOTH.swapaxes(0, 1), 6: np.rot90(SMOOTH, -1)}
    for each in (content, content.replace(b"MM\0*\0\0\0\x08\0", b"MM\0*\xff\0\0\x08\xff")):
        image, expected = decode_image(each, "x"), turned.get(orientation, SMOOTH)
        assert image.shape == expected.shape and np.abs(image.astype(int) - expected).mean() < 6


@pytest.mark.fault(88)
def test_heic_needs_a_package_more(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match=r"x: a HEIC picture, .*: \S+ -m pip install pillow-heif"):
        decode_image(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "x")
    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = lambda: Image.register_open(
        "HEIF", lambda file, name: Image.open(io.BytesIO(encode(RGB))), lambda start: start[4:12] == b"ftypheic"
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    np.testing.assert_array_equal(decode_image(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "x"), RGB)


@pytest.mark.fault(88)
def test_the_first_picture_of_several_counts():
    for kind, most in (("MPO", 8), ("TIFF", 0), ("AVIF", 8)):
        first, second = (Image.fromarray(each) for each in (SMOOTH, SMOOTH[::-1]))
        image = decode_image(encode(first, kind, save_all=True, append_images=[second]), "x")
        assert image.shape == SMOOTH.shape and np.abs(image.astype(int) - SMOOTH).mean() <= most


@pytest.mark.fault(41)
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_tiff_with_odd_tags(compression, orientation):
    content = encode(RGB, "TIFF", compression=compression, tiffinfo={274: orientation, 305: "me", 34665: 2**31 - 1})
    np.testing.assert_array_equal(decode_image(content, "x"), np.rot90(RGB, 0 if orientation == 1 else -1))


@pytest.mark.fault(41)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_kind_of_pixels_of_a_tiff(mode):
    grey = Image.fromarray(RGB[:, :, 0])
    picture = Image.fromarray(RGB[:, :, 0].astype(np.uint16) << 8) if mode == "I;16" else grey.convert(mode)
    image = decode_image(encode(picture, "TIFF"), "x")
    expected = np.asarray(picture.convert("RGB")) if mode in ("1", "P", "PA") else RGB
    assert image.shape == RGB.shape and np.abs(image[:, :, 0].astype(int) - expected[:, :, 0]).max() <= 2


@pytest.mark.fault(41)
def test_damage_anywhere_is_one_error_and_decoders_print_nothing(capfd):
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM"):
        odd = kind in ("PNG", "JPEG", "WEBP")
        content = np.frombuffer(with_metadata(kind, 1) if odd else encode(RGB, kind), np.uint8)
        for _ in range(100):
            damaged = content.copy()
            damaged[random.integers(0, 300, 3)] = random.integers(0, 256, 3)
            with contextlib.suppress(DataError, ResourceError):
                assert decode_image(damaged[: random.integers(0, 2 * len(damaged))].tobytes(), "x").dtype == np.uint8
    assert capfd.readouterr() == ("", "")
