import gzip
import tarfile

import numpy as np
import pytest

from codistill.core.errors import DataError
from codistill.data.archive import members

from .writers import tar_info, write_archive

FILES = {"a.bin": b"a" * 1000, "b.bin": b"b" * 512, "c.txt": b""}


def read(path, wanted=lambda name: True, member_limit=1 << 16, total_limit=1 << 20):
    return dict(members(path, wanted, "fetch it", member_limit, total_limit))


def test_gives_the_wanted_members_in_order(tmp_path):
    path = write_archive(tmp_path / "x.tar.gz", "top", FILES)
    assert read(path) == {f"top/{name}": content for name, content in FILES.items()}
    assert list(read(path)) == ["top/a.bin", "top/b.bin", "top/c.txt"]
    assert read(path, lambda name: name == "top/b.bin") == {"top/b.bin": FILES["b.bin"]}


def test_a_leading_dot_and_long_names_are_understood(tmp_path):
    long = "x" * 300
    assert read(write_archive(tmp_path / "x.tar.gz", ".", {long: b"1"})) == {long: b"1"}


def test_a_cut_last_byte_and_a_flipped_byte_are_noticed(tmp_path):
    path = write_archive(tmp_path / "x.tar.gz", "top", {"a.bin": np.random.default_rng(0).bytes(3000)})
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="fetch it"):
        read(path)
    for place in range(700, 3000, 31):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(DataError):
            read(path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, b"Q"])
@pytest.mark.parametrize("wanted", [True, False])
def test_negative_sizes_that_lead_back(tmp_path, kind, wanted):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_info("evil", -512, kind).tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
    with pytest.raises(DataError, match=r"negative size|a member has headers|neither a file nor a folder"):
        read(path, lambda name: wanted)


def test_a_damaged_header_is_not_the_end(tmp_path):
    first, second = (tar_info(name, 0).tobuf(tarfile.GNU_FORMAT) for name in "ab")
    path = tmp_path / "x.tar.gz"
    for content in (first + b"x" * 512 + second + bytes(1024), first + second[:100], first, first + second):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=r"cannot be read \(.* header\): fetch it"):
            read(path)
    path.write_bytes(gzip.compress(first + second + bytes(1024)))
    assert list(read(path)) == ["a", "b"]


def test_the_headers_of_all_members_may_be_more_than_those_of_one(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for index in range(1500):
            archive.addfile(tar_info(f"{index}" + "x" * 200))
    assert len(read(tmp_path / "x.tar.gz", total_limit=8 << 20)) == 1500


def test_not_an_archive(tmp_path):
    path = tmp_path / "x.tar.gz"
    for content in (b"hello", gzip.compress(b"hello" * 500)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            read(path)
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.tar.gz")


def test_a_header_that_lies_about_its_size(tmp_path):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_info("evil", 5000).tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    with pytest.raises(DataError, match="unexpected end of data"):
        read(path)
    path.write_bytes(gzip.compress(tar_info("evil", 10 << 30).tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    with pytest.raises(DataError, match="evil has 10737418240 bytes"):
        read(path)
