import os

import numpy as np
import pytest

from codistill.core.errors import DataError
from codistill.data.cache import cached

ARRAYS = {"a": np.arange(600, dtype=np.uint8).reshape(2, 300), "b": np.arange(4)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.npz"


def build():
    return dict(ARRAYS)


def never():
    raise DataError("no source")


def test_builds_once_and_reads_what_is_wanted(path):
    assert cached(path, "v1", ["a"], build).keys() == {"a", "b"}
    arrays = cached(path, "v1", ["b"], never)
    assert arrays.keys() == {"b"} and arrays["b"].dtype == ARRAYS["b"].dtype
    np.testing.assert_array_equal(cached(path, "v1", ["a"], never)["a"], ARRAYS["a"])
    assert [each.name for each in path.parent.iterdir()] == ["cache.npz"]


def test_other_sources_make_it_stale(path, capsys):
    cached(path, "v1", ["a"], build)
    with pytest.raises(DataError, match="no source"):
        cached(path, "v2", ["a"], never)
    line = f"codistill: warning: {path}: was made from other files or by another version: building it again\n"
    assert capsys.readouterr().err == line


def test_a_flipped_byte_anywhere_is_noticed_and_repaired(path, capsys):
    cached(path, "v1", ["a"], build)
    good = path.read_bytes()
    for place in range(0, len(good), 97):
        flipped = bytearray(good)
        flipped[place] ^= 1
        path.write_bytes(bytes(flipped))
        np.testing.assert_array_equal(cached(path, "v1", ["a"], build)["a"], ARRAYS["a"])
    assert all(line.endswith("building it again") for line in capsys.readouterr().err.splitlines())
    path.write_bytes(good[:300])
    with pytest.raises(DataError, match="no source"):
        cached(path, "v1", ["a"], never)
    assert path.read_bytes() == good[:300], "a cache is only replaced by a better one"


def test_a_cache_that_cannot_be_written_costs_a_warning(path, capsys, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cached(path, "v1", ["a"], build).keys() == {"a", "b"}
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error and list(path.parent.iterdir()) == []
