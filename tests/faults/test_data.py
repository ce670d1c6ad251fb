"""Data that is missing, damaged or hostile, as the command line meets it (faults 11 to 21, and 23)."""

import functools
import gzip
import io
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codistill.cli import main
from codistill.data import cifar, cinic10, dataset
from codistill.data.cifar_files import CIFAR10, CIFAR100

from ..data.writers import (
    cifar_binary,
    cifar_python,
    cinic_files,
    encode,
    image_folder_files,
    python2_pickle,
    random_arrays,
    sha256,
    tar_gz,
    tar_info,
    write_archive,
    write_folder,
    write_npz,
)
from .asserting import refused

pytestmark = pytest.mark.usefixtures("tiny_registered")

BINARY, PYTHON = CIFAR10
ARRAYS = random_arrays(10)
FILES = cifar_binary("cifar10", ARRAYS)
PICKLES = cifar_python("cifar10", ARRAYS)
FIRST = FILES["data_batch_1.bin"]
CINIC = cinic_files(per_class=1)[0]
CAT = "train/cat/cifar10-train-00003.png"
WHOLE = CINIC[CAT]
PICTURES = image_folder_files(size=(32, 32))[0]
BEE = "test/bee/001.png"
SMALL = random_arrays(3, size=(8, 8))
RECORD = 3073  # bytes


@pytest.fixture
def root(tmp_path):
    """The folder for data; the run folder would lie beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def train(data: str, place: Path) -> list[str]:
    """Return a command line that trains two tiny networks on data at, or below, the folder `data`."""
    out = next(each for each in (place, *place.parents) if each.name == "data").with_name("run")
    flags = ["--networks", "tiny", "tiny", "--epochs", "1", "--batch-size", "5", "--lr", "0.05", "--threads", "1"]
    return ["train", "mfef", *flags, "--data", data, "--data-dir", str(place), "--out", str(out)]


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


def digest(content: bytes) -> str:
    return sha256(content).removeprefix("sha256:")


@pytest.fixture
def published(monkeypatch, root):
    """A small archive of CIFAR-10 that is, as far as the product knows, the published one."""
    archive = write_archive(root / BINARY.archive, BINARY.folder, FILES)
    content = archive.read_bytes()
    digests = {file: sha256(FILES[file]) for file in BINARY.digests}
    release = replace(BINARY, size=len(content), digest=sha256(content), digests=digests)
    monkeypatch.setattr(cifar, "CIFAR10", (release, PYTHON))
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 20)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 10)
    return archive


@pytest.fixture
def published_cinic(monkeypatch, root):
    """A small archive of CINIC-10 that is, as far as the product knows, the published one."""
    archive = write_archive(root / "CINIC-10.tar.gz", "", CINIC)
    content = archive.read_bytes()
    monkeypatch.setattr(cinic10, "ARCHIVE_SIZE", len(content))
    monkeypatch.setattr(cinic10, "ARCHIVE_DIGEST", sha256(content))
    monkeypatch.setattr(cinic10, "IMAGES_PER_CLASS", 1)
    return archive


PLACES = {
    "cifar10": (BINARY.archive, PYTHON.archive, BINARY.folder, "www.cs.toronto.edu", "--data cifar10:download=true"),
    "cifar100": (CIFAR100[0].archive, CIFAR100[1].folder, "www.cs.toronto.edu", "--data cifar100:download=true"),
    "cinic10": ("CINIC-10.tar.gz", "train, valid and test", "datashare.ed.ac.uk"),
    "folder": ("train", "train/<class>/ and test/<class>/"),
    "packed": ("npz", "make it with numpy.savez(path, train_images="),
}


@pytest.mark.fault(11)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_no_data(capsys, tmp_path, root, name, kind):
    place = root / "none" if kind == "missing" else root
    if name == "packed" and kind == "missing":
        place = place.with_suffix(".npz")
    refused(capsys, train(name, place), 3, str(place), *PLACES[name], unchanged=tmp_path)


@pytest.mark.fault(12)
@pytest.mark.parametrize("kept", ["half", "all but the last byte"])
@pytest.mark.parametrize("name", ["cifar10", "cinic10"])
def test_an_archive_cut_short(capsys, tmp_path, request, name, kept):
    archive = request.getfixturevalue("published" if name == "cifar10" else "published_cinic")
    size = archive.stat().st_size
    cut = size // 2 if kept == "half" else size - 1
    archive.write_bytes(archive.read_bytes()[:cut])
    expected = (archive.name, f"has {cut} bytes instead of {size}", "fetch")
    refused(capsys, train(name, archive.parent), 3, *expected, unchanged=tmp_path)
    refused(capsys, train(f"{name}:check=false", archive.parent), 3, archive.name, "cannot be read", unchanged=tmp_path)


@pytest.mark.fault(13)
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["cifar10", "cinic10"])
def test_an_archive_with_one_byte_changed(capsys, tmp_path, request, name, part):
    archive = request.getfixturevalue("published" if name == "cifar10" else "published_cinic")
    content = archive.read_bytes()
    changed = flipped(content, int(part * (len(content) - 1)))
    archive.write_bytes(changed)
    expected = (archive.name, f"sha256 is {digest(changed)} instead of {digest(content)}", "fetch")
    refused(capsys, train(name, archive.parent), 3, *expected, unchanged=tmp_path)


@pytest.mark.fault(13)
@pytest.mark.parametrize("file", ["data_batch_1.bin", "data_batch_5.bin", "test_batch.bin"])
def test_an_extracted_file_with_one_byte_changed(capsys, tmp_path, published, file):
    published.unlink()
    changed = flipped(FILES[file], 2000)
    write_folder(published.parent / BINARY.folder, FILES | {file: changed})
    expected = (f"{BINARY.folder}/{file}", f"sha256 is {digest(changed)} instead of {digest(FILES[file])}")
    refused(capsys, train("cifar10", published.parent), 3, *expected, unchanged=tmp_path)


@pytest.mark.fault(13)
@pytest.mark.parametrize("release", [*CIFAR10, *CIFAR100], ids=lambda release: release.folder)
def test_every_release_has_checksums_that_other_files_do_not_match(capsys, tmp_path, root, release):
    name, write = ("cifar10" if release in CIFAR10 else "cifar100"), (cifar_binary, cifar_python)
    arrays = random_arrays(10 if name == "cifar10" else 100)
    folder = write_folder(root / release.folder, write[release.names in ("meta", "batches.meta")](name, arrays))
    refused(capsys, train(name, root), 3, f"{folder}/", " instead of ", "check=false", unchanged=tmp_path)
    write_archive(root / "packed.tar.gz", "", {}).rename(folder.parent / release.archive)
    refused(capsys, train(name, root / release.archive), 3, f"instead of {release.size}", unchanged=tmp_path)


@pytest.mark.fault(14)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("file", "content", "record"),
    [
        ("data_batch_1.bin", FIRST[:-1], len(FIRST) // RECORD - 1),
        ("data_batch_4.bin", FIRST[: RECORD + 1], 1),
        ("data_batch_2.bin", FIRST + b"xyz", len(FIRST) // RECORD),
        ("test_batch.bin", b"", 0),
    ],
)
def test_a_data_file_of_the_wrong_length(capsys, tmp_path, root, file, content, record, packed):
    if packed:
        write_archive(root / BINARY.archive, BINARY.folder, FILES | {file: content})
    else:
        write_folder(root, FILES | {file: content})
    expected = (f"{file}: has {len(content)} bytes", f"record {record} ")
    refused(capsys, train("cifar10:check=false", root), 3, *expected, unchanged=tmp_path)


def relabelled(*labels: int) -> bytes:
    content = bytearray(FIRST)
    for index, label in enumerate(labels):
        content[index * RECORD] = label
    return bytes(content)


@pytest.mark.fault(15)
def test_a_label_out_of_range_in_records(capsys, tmp_path, root):
    write_folder(root, FILES | {"data_batch_1.bin": relabelled(0, 1, 10)})
    expected = ("data_batch_1.bin: image 2 has label 10", "labels 0 to 9")
    refused(capsys, train("cifar10:check=false", root), 3, *expected, unchanged=tmp_path)


@pytest.mark.fault(15)
@pytest.mark.parametrize("label", [-1, 10, 1 << 40])
def test_a_label_out_of_range_in_a_pickle(capsys, tmp_path, root, label):
    planes = np.zeros((3, 3072), np.uint8)
    write_folder(root, PICKLES | {"data_batch_2": python2_pickle({b"data": planes, b"labels": [0, label, 1]})})
    expected = (f"data_batch_2: image 1 has label {label}", "labels 0 to 9")
    refused(capsys, train("cifar10:check=false", root), 3, *expected, unchanged=tmp_path)


@pytest.mark.fault(15)
def test_a_class_with_too_few_images(capsys, tmp_path, published, monkeypatch):
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 50)
    expected = ("training images: class class000 has 2 images instead of 5",)
    refused(capsys, train("cifar10", published.parent), 3, *expected, unchanged=tmp_path)


@pytest.mark.fault(15)
def test_a_class_without_images(capsys, tmp_path, published_cinic):
    root = published_cinic.parent
    published_cinic.unlink()
    write_folder(root, {name: content for name, content in CINIC.items() if name != CAT})
    expected = ("train: class cat has 0 images instead of 1",)
    line = refused(capsys, train("cinic10", root), 3, *expected)
    assert str(root) in line and not (tmp_path / "run").exists()


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_labels": np.array([0, 1, 2, 3, 0, 1])}, "train: image 3 has label 3, but there are 3 classes"),
        ({"test_labels": np.array([0, -1, 2])}, "test: image 1 has label -1"),
        ({"train_labels": np.array([0, 0, 2, 2, 0, 2])}, "train: no image has label 1 (class class001)"),
        ({"train_labels": np.array([0, 1, 2])}, "train_labels is int64 [3]; it must be whole numbers [6]"),
    ],
)
def test_labels_of_arrays(capsys, tmp_path, root, changes, expected):
    path = write_npz(root / "x.npz", SMALL, **changes)
    refused(capsys, train("packed", path), 3, f"{path}", expected, unchanged=tmp_path)


@pytest.mark.fault(15)
def test_a_class_of_pictures_without_images(capsys, tmp_path, root):
    write_folder(root, PICTURES)
    for path in (root / "train" / "cat").iterdir():
        path.unlink()
    refused(capsys, train("folder", root), 3, "train/cat: holds no images", unchanged=tmp_path)


def evil_pickles(sentinel: Path) -> dict[str, bytes]:
    """Programs that would write the sentinel, in the ways that pickle knows."""
    command = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return {
        "os.system": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "posix.system": b"\x80\x04" + text("posix") + text("system") + b"\x93" + text(command) + b"\x85R.",
        "builtins.exec": f"\x80\x02cbuiltins\nexec\nU{chr(len(code))}{code}\x85R.".encode("latin1"),
        "subprocess.run": f"csubprocess\nrun\n((lS'touch'\naS'{sentinel}'\natR.".encode(),
        "builtins.getattr": b"(dS'data'\ncbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntRs.",
    }


@pytest.mark.fault(16)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
@pytest.mark.parametrize("name", list(evil_pickles(Path("x"))))
def test_a_pickle_that_runs_code(capsys, tmp_path, root, name, file, packed):
    sentinel = tmp_path / "sentinel"
    files = PICKLES | {file: evil_pickles(sentinel)[name]}
    if packed:
        write_archive(root / PYTHON.archive, PYTHON.folder, files)
    else:
        write_folder(root, files)
    expected = (f"{file}: ", f"forbidden global {name}")
    refused(capsys, train("cifar10:check=false", root), 3, *expected, unchanged=tmp_path)
    assert not sentinel.exists()


@pytest.mark.fault(16)
def test_a_pickle_whose_key_would_take_for_ever_to_hash(capsys, tmp_path, root):
    doubled = b"".join(b"h%ch%c\x86q%c" % (index, index, index + 1) for index in range(1, 60))
    write_folder(root, PICKLES | {"batches.meta": b"\x80\x02})q\x01" + doubled + b"Ns."})
    expected = ("batches.meta: forbidden use of memo 1",)
    refused(capsys, train("cifar10:check=false", root), 3, *expected, unchanged=tmp_path)


MEMBERS = {
    "../x": tar_info("../x", 1),
    "inside, then out": tar_info(f"{BINARY.folder}/../../x", 1),
    "absolute": tar_info("/tmp/codistill-evil", 1),
    "symbolic link": tar_info(f"{BINARY.folder}/link", kind=tarfile.SYMTYPE, link="/etc"),
    "hard link": tar_info(f"{BINARY.folder}/link", kind=tarfile.LNKTYPE, link="/etc/passwd"),
    "character device": tar_info(f"{BINARY.folder}/device", kind=tarfile.CHRTYPE),
    "block device": tar_info(f"{BINARY.folder}/device", kind=tarfile.BLKTYPE),
    "pipe": tar_info(f"{BINARY.folder}/pipe", kind=tarfile.FIFOTYPE),
    "backslashes": tar_info("x\\..\\..\\x", 1),
    "a name twice": tar_info(f"{BINARY.folder}/data_batch_1.bin", 1),
    "a name twice, with a dot": tar_info(f"./{BINARY.folder}/data_batch_1.bin", 1),
}


@pytest.mark.fault(17)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("member", MEMBERS)
def test_an_archive_that_writes_elsewhere(capsys, tmp_path, root, member, first):
    entries = [(tar_info(f"{BINARY.folder}/{name}", len(content)), content) for name, content in FILES.items()]
    entries.insert(0 if first else len(entries), (MEMBERS[member], b"x"))
    tar_gz(root / BINARY.archive, entries)
    expected = (f"{root / BINARY.archive}: member ", "do not use this archive")
    refused(capsys, train("cifar10:check=false", root), 3, *expected, unchanged=tmp_path)
    assert not Path("/tmp/codistill-evil").exists()


@pytest.mark.fault(17)
@pytest.mark.parametrize("member", ["../x", "absolute", "symbolic link", "pipe"])
def test_an_image_archive_that_writes_elsewhere(capsys, tmp_path, root, member):
    entries = [(tar_info(name, len(content)), content) for name, content in CINIC.items()]
    tar_gz(root / "CINIC-10.tar.gz", [*entries, (MEMBERS[member], b"x")])
    expected = ("CINIC-10.tar.gz: member ", "do not use this archive")
    refused(capsys, train("cinic10:check=false", root), 3, *expected, unchanged=tmp_path)


@pytest.mark.fault(17)
def test_an_archive_that_ends_in_its_middle(capsys, tmp_path, root):
    whole = gzip.decompress(write_archive(root / "CINIC-10.tar.gz", "", CINIC).read_bytes())
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        header = archive.getmembers()[-5].offset
    broken = whole[: header + 5] + b"\xff" + whole[header + 6 :]
    for content, reason in ((broken, "bad checksum"), (whole[:header], "empty header")):
        (root / "CINIC-10.tar.gz").write_bytes(gzip.compress(content))
        expected = ("CINIC-10.tar.gz: cannot be read", f"({reason})")
        refused(capsys, train("cinic10:check=false", root), 3, *expected, unchanged=tmp_path)


PIECE = 16 << 20  # bytes


def zeros(count: int) -> bytes:
    """Compress gigabytes of zeros in no time: gzip streams may stand one behind the other."""
    return compressed_zeros() * (count // PIECE)


@functools.cache
def compressed_zeros() -> bytes:
    return gzip.compress(bytes(PIECE), 9)


def bombs() -> dict[str, tuple[str, bytes]]:
    """Ten gigabytes in ten megabytes: name -> data set and archive."""
    folder, ten = BINARY.folder, 10 << 30

    def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
        return gzip.compress(tar_info(name, size, kind).tobuf(tarfile.GNU_FORMAT))

    body = zeros(ten)
    many = b"".join(header(f"{folder}/{index}.bin", 128 << 20) + zeros(128 << 20) for index in range(80))
    sparse = b"".join(b"%d %s\n" % (len(line) + 4, line) for line in (b"GNU.sparse.major=1", b"GNU.sparse.minor=0"))
    start = sparse + bytes(-len(sparse) % tarfile.BLOCKSIZE)
    map_of_sparse = gzip.compress(b"1000000000\n" + b"1\n" * (8 << 20))
    return {
        "a member": ("cifar10", header(f"{folder}/data_batch_1.bin", ten) + body),
        "an unwanted member": ("cifar10", header(f"{folder}/other.bin", ten) + body),
        "a size that is too low": ("cifar10", header(f"{folder}/other.bin", 512) + body),
        "a size that is too high": ("cifar10", header(f"{folder}/data_batch_1.bin", ten) + zeros(16 << 20)),
        "many members": ("cifar10", many),
        "a long name": ("cifar10", header(f"{folder}/other.bin", ten, tarfile.GNUTYPE_LONGNAME) + body),
        "extended headers": ("cifar10", header(f"{folder}/other.bin", 200 << 20, tarfile.XHDTYPE) + body),
        "an image": ("cinic10", header(CAT, ten) + body),
        "a map of a sparse file": (
            "cinic10",
            header("pax", len(sparse), tarfile.XHDTYPE) + gzip.compress(start) + header(CAT, ten) + map_of_sparse,
        ),
    }


@pytest.mark.fault(18)
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_an_archive_that_never_ends(tmp_path):
    places = []
    for index, (name, content) in enumerate(bombs().values()):
        path = tmp_path / str(index) / (BINARY.archive if name == "cifar10" else "CINIC-10.tar.gz")
        path.parent.mkdir()
        path.write_bytes(content)
        assert len(content) < 11 << 20
        places.append((f"{name}:check=false", str(path)))
    program = f"""
        import resource, torch, codistill.training.train
        from codistill.cli import main
        torch.set_num_threads(1)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
        for data, place in {places!r}:
            flags = ["--data", data, "--data-dir", place, "--out", {str(tmp_path / "run")!r}]
            print(main(["train", "mfef", "--networks", "resnet20", "resnet20", *flags]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=240
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3"] * len(places), done.stderr
    for (_, place), line in zip(places, lines, strict=True):
        assert line.startswith(f"codistill: error: {place}: ") and "more than" in line, line
    assert not (tmp_path / "run").exists()


def png(width: int, height: int, rows: int = 0) -> bytes:
    """Write a grey PNG whose header may claim more pixels than there are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes((width + 1) * rows))) + chunk(b"IEND", b"")
    )


NO_IMAGES = {
    "bomb": (png(60000, 60000), "3600000000 pixels"),
    "smaller bomb": (png(9000, 9000), "9000x9000 pixels"),
    "wrong size": (png(33, 32, 32), "32x33 pixels"),
    "text": (b"hello", "is not a "),
    "nothing": (b"", "is not a "),
}


@pytest.mark.fault(19)
@pytest.mark.parametrize("kind", NO_IMAGES)
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_of_cinic_that_is_not_what_it_says(capsys, tmp_path, root, undecodable, kind, packed):
    content, expected = NO_IMAGES[kind]
    files = {CAT: content, "valid/cat/x.png": WHOLE, "test/cat/x.png": WHOLE}
    if packed:
        write_archive(root / "CINIC-10.tar.gz", "", files)
    else:
        write_folder(root, files)
    refused(capsys, train("cinic10:check=false", root), 3, f"{CAT}: ", expected, unchanged=tmp_path)


@pytest.fixture
def undecodable(monkeypatch):
    """Fail if any pixel is decoded."""

    def load(_image):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)


@pytest.mark.fault(19)
@pytest.mark.parametrize("data", ["folder", "folder:resize=16"])
@pytest.mark.parametrize("kind", [kind for kind in NO_IMAGES if kind != "wrong size"])
def test_a_picture_that_is_not_what_it_says(capsys, tmp_path, root, data, kind):
    content, expected = NO_IMAGES[kind]
    write_folder(root, PICTURES | {BEE: content})
    refused(capsys, train(data, root), 3, f"{root / BEE}: ", expected, unchanged=tmp_path)


@pytest.mark.fault(19)
def test_a_picture_of_another_size(capsys, tmp_path, root):
    write_folder(root, PICTURES | {BEE: png(33, 32, 32)})
    expected = (f"{root / BEE}: is 32x33 pixels", "32x32", "resize")
    refused(capsys, train("folder", root), 3, *expected, unchanged=tmp_path)


DAMAGED = {
    "cut in half": WHOLE[: len(WHOLE) // 2],
    "without its last byte": WHOLE[:-1],
    "without its end": WHOLE[:-12],
    "a bit in its pixels": flipped(WHOLE, 1000),
    "a bit in its header": flipped(WHOLE, 25),
    "zeros in its middle": WHOLE[:900] + bytes(100) + WHOLE[1000:],
}


@pytest.mark.fault(20)
@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_image_among_many(capsys, tmp_path, root, damage, packed):
    files = CINIC | {CAT: DAMAGED[damage]}
    if packed:
        write_archive(root / "CINIC-10.tar.gz", "CINIC-10", files)
    else:
        write_folder(root, files)
    expected = f"{CAT}: cannot be read"
    refused(capsys, train("cinic10:check=false", root), 3, expected, unchanged=tmp_path)


@pytest.mark.fault(20)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_picture_among_many(capsys, tmp_path, root, damage):
    write_folder(root, PICTURES | {BEE: DAMAGED[damage]})
    expected = f"{root / BEE}: cannot be read"
    refused(capsys, train("folder", root), 3, expected, unchanged=tmp_path)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


SHAPE = list(SMALL.train_images.shape)
NO_ARRAYS = {
    "NaN": ({"train_images": np.full(SHAPE, np.nan)}, f"train_images is float64 {SHAPE}; it must be uint8"),
    "two channels": ({"train_images": SMALL.train_images[..., :2]}, f"train_images is uint8 {[*SHAPE[:3], 2]}"),
    "none": (
        {"train_images": SMALL.train_images[:0], "train_labels": SMALL.train_labels[:0]},
        "train: no images",
    ),
    "objects": ({"train_images": SMALL.train_images.astype(object)}, f"train_images is object {SHAPE}"),
    "labels with a point": ({"test_labels": np.full(3, np.nan)}, "test_labels is float64 [3]"),
    "names that are no texts": ({"class_names": np.array(["a", None, "c"])}, "class_names is object [3]"),
}


@pytest.mark.fault(21)
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_arrays_that_are_no_images(capsys, tmp_path, root, kind):
    changes, expected = NO_ARRAYS[kind]
    path = write_npz(root / "x.npz", SMALL, **changes)
    refused(capsys, train("packed", path), 3, str(path), expected, unchanged=tmp_path)


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", ["train_images", "test_labels", "class_names"])
def test_objects_are_never_unpickled(capsys, tmp_path, root, name):
    path = write_npz(root / "x.npz", SMALL, **{name: np.array([Evil(tmp_path / "sentinel")] * 3, dtype=object)})
    refused(capsys, train("packed", path), 3, f"{path}: {name} is object [3]", unchanged=tmp_path)


@pytest.mark.fault(21)
def test_arrays_that_unpack_to_more_than_any_images(capsys, tmp_path, root):
    path = root / "x.npz"
    images = np.zeros((1, 5000, 5000, 3), np.uint8)
    np.savez_compressed(path, **{**vars(SMALL), "train_images": images, "train_labels": np.zeros(1, np.int64)})
    expected = (f"{path}: train_images unpacks to 75000128 bytes",)
    refused(capsys, train("packed", path), 3, *expected, unchanged=tmp_path)


@pytest.mark.fault(21)
def test_texts_of_no_length_without_number(capsys, tmp_path, root):
    path = write_npz(root / "x.npz", SMALL, class_names=None)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<U0", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("class_names.npy", header.getvalue())
    expected = (f"{path}: class_names is <U0 [{1 << 40}]",)
    refused(capsys, train("packed", path), 3, *expected, unchanged=tmp_path)


def built_cache(root: Path, packed: bool) -> Path:
    """Load once, so that the cache is built; give its path."""
    if packed:
        write_archive(root / "CINIC-10.tar.gz", "", CINIC)
    else:
        write_folder(root, CINIC)
    dataset("cinic10:check=false", root=root)
    return root / "cinic10.cache.npz"


@pytest.mark.fault(23)
@pytest.mark.usefixtures("no_pages")
def test_a_damaged_cache_is_built_again(root, capsys):
    cache = built_cache(root, packed=True)
    with np.load(cache) as file:
        good, changed = dict(file), dict(file)
    changed["train_images"][3, 5, 5] ^= 1
    np.savez(cache, **changed)
    assert main(train("cinic10:check=false", root)) == 0
    line = f"codistill: warning: {cache}: the sha256 of train_images is wrong: building it again\n"
    assert capsys.readouterr().err == line
    with np.load(cache) as repaired:
        assert all((repaired[name] == good[name]).all() for name in good)


@pytest.mark.fault(23)
@pytest.mark.parametrize("place", [0.001, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_of_a_cache_changed_anywhere(root, capsys, packed, place):
    cache = built_cache(root, packed)
    expected = dataset("cinic10:check=false", root=root)
    good = cache.read_bytes()
    cache.write_bytes(flipped(good, int(place * len(good))))
    data = dataset("cinic10:check=false", root=root)
    assert capsys.readouterr().err.count("\n") <= 1, "a byte that nobody reads needs no warning"
    for part in ("train", "test"):
        for kind in ("images", "labels"):
            got, wanted = (getattr(getattr(each, part), kind) for each in (data, expected))
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.fault(23)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_cache_without_its_source(capsys, tmp_path, root, packed):
    cache = built_cache(root, packed)
    cache.write_bytes(flipped(cache.read_bytes(), 5000))
    if packed:
        (root / "CINIC-10.tar.gz").unlink()
        expected = "holds no cinic10: expected CINIC-10.tar.gz"
    else:
        (root / CAT).write_bytes(encode(np.zeros((32, 32, 3), np.uint8))[:50])
        expected = f"{CAT}: "
    refused(capsys, train("cinic10:check=false", root), 3, expected, unchanged=tmp_path, warnings=int(not packed))
