import io

import pytest

from codistill.core.errors import DataError, ResourceError, UsageError
from codistill.data.untrusted import check_digest, check_file, read_file, reading

from .writers import sha256


def test_whatever_a_parser_raises_is_one_line_with_file_and_mend(tmp_path):
    with (
        pytest.raises(DataError, match=r"^a\.bin: cannot be read \(two lines\): fetch it$"),
        reading("a.bin", "fetch it"),
    ):
        raise ValueError("two\nlines")
    with pytest.raises(DataError, match=r"\(IndexError\)"), reading("a.bin", "fetch it"):
        raise IndexError
    with pytest.raises(DataError, match="Is a directory"), reading(tmp_path, "fetch it"):
        tmp_path.read_bytes()


def test_own_errors_and_memory_keep_their_exit_status():
    with pytest.raises(UsageError, match=r"^mine$"), reading("a.bin", "fetch it"):
        raise UsageError("mine")
    with pytest.raises(ResourceError, match="memory"), reading("a.bin", "fetch it"):
        raise MemoryError


def test_read_file(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(DataError, match=r"a\.bin: no such file: fetch it"):
        read_file(path, 4, "fetch it")
    path.write_bytes(b"1234")
    assert read_file(path, 4, "fetch it") == b"1234"
    with pytest.raises(DataError, match="has 4 bytes, more than the 3"):
        read_file(path, 3, "fetch it")


def test_digests_and_sizes(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"1234")
    check_file(path, 4, sha256(b"1234"), "fetch it")
    check_digest(path, io.BytesIO(b"1234"), "md5:81dc9bdb52d04dc20036dbd8313ed055", "fetch it")
    with pytest.raises(DataError, match="has 4 bytes instead of 5: fetch it"):
        check_file(path, 5, sha256(b"1234"), "fetch it")
    with pytest.raises(DataError) as error:
        check_file(path, 4, sha256(b"1235"), "fetch it")
    for digest in (sha256(b"1234"), sha256(b"1235")):
        assert digest.removeprefix("sha256:") in str(error.value)
    with pytest.raises(DataError, match=r"md5 is .* instead of 00: fetch it"):
        check_digest(path, io.BytesIO(b"1234"), "md5:00", "fetch it")
