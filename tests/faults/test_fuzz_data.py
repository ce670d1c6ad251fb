"""Fuzzing of all that reads data files: whatever the bytes, the result is data or one line of refusal.

Continuous integration tries a fixed set of examples. For a longer, random search by hand:

    CODISTILL_FUZZ_EXAMPLES=100000 .venv/bin/python -m pytest --timeout 0 tests/faults/test_fuzz_data.py

A failure is shown as its smallest example and belongs, once fixed, into a test of its own.
"""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from codistill.core.errors import DataError
from codistill.data import dataset
from codistill.data.archive import members
from codistill.data.cifar_files import decode_batch, decode_lines, decode_meta, decode_records
from codistill.data.images import decode_image
from codistill.data.unpickle import _STAND_INS

from ..data.writers import encode, planes, python2_pickle, random_arrays, records, tar_info
from .fuzzing import budget

ARRAYS = random_arrays(3, size=(32, 32))


@st.composite
def damaged(draw, *seeds: bytes, most: int = 4) -> bytes:
    """Take a good file and flip, cut, insert, swap and overwrite; or any bytes at all."""
    if draw(st.integers(0, 15)) == 0:
        return draw(st.binary(max_size=300))
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, most))):
        place, other = (draw(st.integers(0, max(0, len(content) - 1))) for _ in range(2))
        length = draw(st.integers(1, 16))
        match draw(st.sampled_from(("flip", "cut", "drop", "insert", "swap", "set", "number", "repeat"))):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place:]
            case "drop":
                del content[place : place + length]
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=16))
            case "swap":
                one, two = content[place : place + length], content[other : other + length]
                content[place : place + length], content[other : other + length] = two, one
            case "set":
                content[place : place + length] = draw(st.binary(min_size=length, max_size=length))
            case "number":
                wide = draw(st.sampled_from((0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)))
                content[place : place + 4] = wide.to_bytes(4, draw(st.sampled_from(("little", "big"))))
            case "repeat":
                content[place:place] = content[other : other + 64 * length]
    return bytes(content)


def refuses_or(read) -> object:
    """Read; a refusal must be one line that names the file and a fix."""
    try:
        return read()
    except DataError as error:
        line = str(error)
        assert line.startswith("where") and line.isprintable(), repr(line)
        return None


def check_images(images: np.ndarray, labels: np.ndarray) -> None:
    assert images.dtype == np.uint8 and images.shape == (len(labels), 32, 32, 3) and labels.dtype == np.int64


RECORDS = records(ARRAYS.train_images[:3], ARRAYS.train_labels[:3], coarse=True)


@budget(100)
@given(damaged(RECORDS[:3074], RECORDS), st.sampled_from((1, 2)))
def test_records_of_cifar(content, label_bytes):
    if (result := refuses_or(lambda: decode_records(content, "where", "fix", label_bytes))) is not None:
        check_images(*result)
        assert len(result[1]) == len(content) / (3072 + label_bytes)


@budget(100)
@given(damaged(b"cat\ndog\n", "größe\n".encode()))
def test_class_names_of_cifar(content):
    if (names := refuses_or(lambda: decode_lines(content, "where", "fix"))) is not None:
        assert all(isinstance(name, str) and name.strip() for name in names)


SENTINEL = Path(tempfile.gettempdir()) / f"codistill-fuzz-{os.getpid()}"
EVIL = f"cos\nsystem\n(S'touch {SENTINEL}'\ntR.".encode()
BATCH = {b"data": planes(ARRAYS.train_images[:2]), b"labels": [0, 1], b"label_names": [b"cat", b"dog"]}
FEW = {b"data": np.zeros((0, 3072), np.uint8), b"labels": np.arange(3), b"label_names": ["cat", "dog"]}
PICKLES = [python2_pickle(BATCH), *(pickle.dumps(FEW, protocol=protocol) for protocol in range(6)), EVIL]


@st.composite
def programs(draw) -> bytes:
    """Write a program for the unpickler of instructions in any order, with what they need for arguments."""
    text = st.sampled_from((b"data", b"labels", b"label_names", b"numpy", b"ndarray", b"latin1", b"u1", b"x" * 40))
    index = st.integers(0, 6)
    piece = st.one_of(
        st.sampled_from([b"N", b"(", b"}", b"]", b")", b"\x85", b"\x86", b"\x87", b"t", b"l", b"d", b"a", b"e", b"s"]),
        st.sampled_from([b"u", b"b", b"R", b"\x93", b"\x94", b"\x88", b"\x89", b".", b"2", b"0", b"1", b"\x81", b"o"]),
        st.sampled_from([b"c%s\n%s\n" % tuple(each.encode() for each in name) for name in _STAND_INS]),
        st.sampled_from([b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nload\n", b"\x95" + bytes(8), b"\x80\x04"]),
        text.map(lambda value: b"U" + bytes([len(value)]) + value),
        text.map(lambda value: b"X" + len(value).to_bytes(4, "little") + value),
        st.integers(-(1 << 31), (1 << 31) - 1).map(lambda value: b"J" + value.to_bytes(4, "little", signed=True)),
        index.map(lambda value: b"K" + bytes([value])),
        index.map(lambda value: b"q" + bytes([value])),
        index.map(lambda value: b"h" + bytes([value])),
    )
    return b"\x80\x02" + b"".join(draw(st.lists(piece, max_size=25))) + b"."


def stand_ins() -> list[dict[str, object]]:
    return [dict(vars(each)) for each in _STAND_INS.values()]


def check_pickle(content: bytes) -> None:
    before = stand_ins()
    if (result := refuses_or(lambda: decode_batch(content, "where", "fix", "labels"))) is not None:
        check_images(*result)
    if (names := refuses_or(lambda: decode_meta(content, "where", "fix", "label_names"))) is not None:
        assert all(isinstance(name, str) for name in names)
    assert stand_ins() == before and not SENTINEL.exists()


@budget(250)
@given(damaged(*PICKLES))
def test_pickles_of_cifar(content):
    check_pickle(content)


@budget(250)
@given(programs())
def test_programs_for_the_unpickler(content):
    check_pickle(content)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMBS = [chunk(kind, b"x\0\0" + zlib.compress(bytes(4 << 20))) for kind in (b"iCCP", b"zTXt", b"iTXt")]


@st.composite
def pngs(draw) -> bytes:
    """Write a PNG of any chunks with right checksums."""
    side = st.sampled_from((0, 1, 8, 32, 33, 8191, 60000, 0x7FFFFFFF, 0xFFFFFFFF))
    few = st.integers(0, 8)
    header = struct.pack(
        ">IIBBBBB", draw(side), draw(side), draw(st.sampled_from((1, 2, 4, 8, 16, 3))), draw(few), 0, 0, draw(few)
    )
    kinds = (b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"IHDR", b"sRGB")
    some = st.builds(chunk, st.sampled_from(kinds), st.binary(max_size=40))
    bomb = st.sampled_from(BOMBS)
    pixels = st.binary(max_size=200).map(lambda data: chunk(b"IDAT", zlib.compress(data * 20)))
    body = draw(st.lists(st.one_of(some, bomb, pixels), max_size=5))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(body) + chunk(b"IEND", b"")


def exif() -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = 6
    made[0x010E] = "a picture"
    return made


PNGS = [
    encode(ARRAYS.train_images[0]),
    encode(ARRAYS.train_images[0][:8, :8], exif=exif()),
    encode(Image.fromarray(ARRAYS.train_images[0]).quantize(16), transparency=3),
]
OTHERS = [encode(ARRAYS.train_images[0], kind) for kind in ("JPEG", "BMP", "WEBP", "GIF")]
OTHERS.append(encode(ARRAYS.train_images[0], "JPEG", exif=exif()))


@budget(250)
@given(st.one_of(damaged(*PNGS), pngs()))
def test_png_images(content):
    image = refuses_or(lambda: decode_image(content, "where", formats=("PNG",), exact=(32, 32)))
    assert image is None or (image.shape == (32, 32, 3) and image.dtype == np.uint8)


@budget(150)
@given(st.one_of(damaged(*PNGS, *OTHERS), pngs()))
def test_images_of_all_kinds(content):
    image = refuses_or(lambda: decode_image(content, "where", (8, 8)))
    assert image is None or (image.shape == (8, 8, 3) and image.dtype == np.uint8)


def npz(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


SMALL = random_arrays(2, size=(2, 3))
NPYS = {name: npy(np.array(value)) for name, value in vars(SMALL).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds a folder `where`; everything is written there."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "where").mkdir()
    return place


def check_packed(folder: Path, content: bytes) -> None:
    path = folder / "where" / "x.npz"
    path.write_bytes(content)
    os.chdir(folder)
    if (data := refuses_or(lambda: dataset("packed", root=Path("where/x.npz")))) is not None:
        assert len(data.train) and data.train.labels.max() < data.num_classes
    assert [each.name for each in folder.rglob("*")] == ["where", "x.npz"] and not SENTINEL.exists()


@pytest.fixture
def back_again(monkeypatch):
    """Go back after a test that changes the working folder."""
    monkeypatch.chdir(Path.cwd())


@budget(120)
@given(content=damaged(npz(*NPYS.items())))
@pytest.mark.usefixtures("back_again")
def test_packed_files(folder, content):
    check_packed(folder, content)


@budget(250)
@given(
    changed=st.dictionaries(st.sampled_from(sorted(NPYS)), damaged(*NPYS.values()), max_size=3),
    header=st.fixed_dictionaries(
        {
            "descr": st.sampled_from(("|u1", "|O", "<f8", "<U0", "|V0", "<U1000000", ">i8", "|b1", "nonsense")),
            "fortran_order": st.sampled_from((True, False)),
            "shape": st.lists(st.sampled_from((-1, 0, 1, 2, 3, 1 << 40, True)), max_size=5).map(tuple),
        }
    ),
    name=st.sampled_from(("", *sorted(NPYS))),
    rest=st.binary(max_size=40),
)
@pytest.mark.usefixtures("back_again")
def test_arrays_of_packed_files(folder, changed, header, name, rest):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    crafted = {name: file.getvalue() + rest} if name else {}
    check_packed(folder, npz(*(NPYS | changed | crafted).items()))


@st.composite
def tars(draw) -> bytes:
    """Write a tar archive of any members, whose headers may lie."""
    good, bad = ("top", "top/a.bin", "top/b.bin", "x" * 300), ("../x", "/x", "top/../../x", "", ".", "\n\x1b[m")
    names = st.sampled_from((*good, *bad))
    kinds = b"0 1 2 3 4 5 6 7 S L K x g X \0 Q".split(b" ")
    sizes = st.sampled_from((0, 1, 5, 512, 600, 1 << 20, 10 << 30, -1, -512))
    plain = (b"size=5", b"size=-512", b"size=x", b"path=../x", b"linkpath=/etc", b"path=\xff", b"=", b"mtime=nan")
    sparse = (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.map=1,2,3", b"GNU.sparse.size=9999999999")
    lines = st.sampled_from((*plain, *sparse, b"hdrcharset=BINARY"))
    content = b""
    for _ in range(draw(st.integers(0, 5))):
        info = tar_info(draw(names), draw(sizes), draw(st.sampled_from(kinds)), draw(names))
        data = draw(st.binary(max_size=30))
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE) and draw(st.booleans()):
            data = b"".join(b"%d %s\n" % (len(line) + 4, line) for line in draw(st.lists(lines, max_size=4)))
            info.size = len(data)
        elif draw(st.booleans()):
            info.size = len(data)
        content += info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    return content + bytes(draw(st.sampled_from((0, 512, 1024, 10240))))


def whole_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("top/a.bin", "top/größe.bin", "x" * 200):
            archive.addfile(tar_info(name, 600), io.BytesIO(bytes(600)))
    return file.getvalue()


TAR = whole_tar()


@budget(250)
@given(
    content=st.one_of(
        damaged(TAR).map(lambda content: gzip.compress(content, 1)),
        tars().map(lambda content: gzip.compress(content, 1)),
        damaged(gzip.compress(TAR, 1)),
    )
)
@pytest.mark.usefixtures("back_again")
def test_tar_archives(folder, content):
    place = folder / "where" / "x.npz"
    place.write_bytes(content)
    os.chdir(folder)
    found = refuses_or(lambda: dict(members(Path("where/x.npz"), lambda name: True, "fix", 1 << 16, 1 << 18)))
    for name in found or ():
        assert Path(os.path.normpath(folder / name)).is_relative_to(folder)
    assert [each.name for each in folder.rglob("*")] == ["where", "x.npz"]
