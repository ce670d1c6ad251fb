"""Files that are whole or absent."""

import errno
import os

import pytest

from codistill.core.errors import CheckpointError
from codistill.core.files import read_json, replaced, write_atomically, write_json

from .. import tiny


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert tiny.listing(tmp_path) == {"file": b"new"}


@pytest.mark.fault(31)
@pytest.mark.parametrize("fails", ["replace", "fsync"])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, fails, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    before = tiny.listing(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert tiny.listing(tmp_path) == before


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write_atomically(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the content, the name, the folder


def test_json_refuses_what_is_no_json(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None, "ü"]})
    assert read_json(path) == {"a": [1, 2.5, None, "ü"]}
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, {"a": number})
    assert read_json(path) == {"a": [1, 2.5, None, "ü"]}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": 1} 2'])
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{path}: damaged: ") as error:
        read_json(path)
    assert "\n" not in str(error.value)


@pytest.mark.fault(93)
def test_missing_json_asks_for_the_run_folder(tmp_path):
    for place, words in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "empty", "empty is empty, no run folder"),
        (tmp_path / "other", r"other a run folder\?"),
        (tmp_path, "holds runs: name one of them, such as .*/folder"),
        (tmp_path / "file", "file is a file, no run folder"),
        (tmp_path / "folder", "Is a directory"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "other" / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "config.json").mkdir(parents=True, exist_ok=True)
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=f"config.json: .*{words}") as error:
            read_json(place / "config.json")
        assert "damaged" not in str(error.value)


def test_a_file_may_be_written_by_others_and_is_dropped_when_they_fail(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="differs"), replaced(path, ".onnx") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".onnx" and ".tmp-" in temporary.name
        temporary.write_bytes(b"new")
        raise ValueError("differs")
    assert tiny.listing(tmp_path) == {"model.onnx": b"old"}
    with replaced(path, ".onnx") as temporary:
        temporary.write_bytes(b"new")
    assert tiny.listing(tmp_path) == {"model.onnx": b"new"}
