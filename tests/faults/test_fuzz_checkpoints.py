"""Checkpoints and indices of every shape: `load` gives a state or raises CheckpointError, and changes nothing."""

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from codistill.core.errors import CheckpointError
from codistill.runs.checkpoint import CheckpointStore
from codistill.runs.state import TrainingState

from .. import tiny
from .fuzzing import budget, mutations

INDEX = "index.json"


def state(epoch: int) -> TrainingState:
    weights = {"weight": torch.full((3, 4), float(epoch)), "steps": torch.tensor(epoch)}
    config = {"note": "text", "numbers": [1, 2.5, None, True]}
    return TrainingState(config, weights, [torch.zeros(2)], [{"epoch": each} for each in range(epoch)], best=epoch == 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two checkpoints, and its contents."""
    folder = tmp_path_factory.mktemp("store") / "checkpoints"
    for epoch in (1, 2):
        CheckpointStore(folder).save(state(epoch))
    return folder, {each.name: each.read_bytes() for each in folder.iterdir()}


def restore(folder: Path, contents: dict[str, bytes]) -> None:
    """Put contents into a folder, and nothing else."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def with_newest(contents: dict[str, bytes], content: bytes) -> dict[str, bytes]:
    """Return contents with other bytes in the newest checkpoint, and their digest in the index."""
    newest = max(name for name in contents if name != INDEX)
    digests = [hashlib.sha256(each).hexdigest().encode() for each in (contents[newest], content)]
    assert digests[0] in contents[INDEX]
    return {**contents, newest: content, INDEX: contents[INDEX].replace(*digests)}


def load(folder: Path, which: str) -> TrainingState | None:
    """Load a state; None: it was refused in order."""
    before = tiny.listing(folder)
    try:
        found = CheckpointStore(folder).load(which)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        found = None
    assert found is None or isinstance(found, TrainingState)
    assert tiny.listing(folder) == before
    return found


def archive(**members: bytes) -> bytes:
    """Make a zip file as torch.save does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


# By name: the bytes of an archive depend on the second in which it was written.
NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"text\n",
    "zeros": b"\0" * 1000,
    "start of an archive": b"PK\x03\x04",
    "end of an archive": b"PK\x05\x06" + b"\0" * 18,
    "pickle": pickle.dumps({"format": 2}),
    "pickled list": pickle.dumps([]),
    "archive of nothing": archive(),
    "archive without a pickle": archive(data=b""),
    "empty pickle in an archive": archive(**{"data.pkl": b"", "version": b"3"}),
    "version that is no number": archive(**{"data.pkl": b"\x80\x02N.", "version": b"x"}),
    "format that is no number": archive(**{"data.pkl": pickle.dumps({"format": "two"}, 2), "version": b"3"}),
    "format far away": archive(**{"data.pkl": pickle.dumps({"format": 10**30}, 2), "version": b"3"}),
    "deep pickle": archive(**{"data.pkl": b"(" * 100_000, "version": b"3"}),
}


@pytest.mark.fault(25)
@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_a_newest_file_that_is_no_checkpoint_is_passed_over(saved, capsys, content):
    folder, contents = saved
    restore(folder, with_newest(contents, content))
    found = load(folder, "last")
    assert found is not None and found.method["weight"][0, 0] == 1
    assert capsys.readouterr().err.count("codistill: warning: ") == 1


@budget(200)
@given(data=st.data())
def test_damaged_bytes_whose_digest_is_right(saved, data):
    folder, contents = saved
    newest = max(name for name in contents if name != INDEX)
    restore(folder, with_newest(contents, data.draw(mutations(contents[newest]))))
    load(folder, "last")


@budget(200)
@given(data=st.data())
def test_damaged_pickles_in_whole_archives(saved, data):
    folder, contents = saved
    newest = max(name for name in contents if name != INDEX)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(contents[newest])) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, data.draw(mutations(member)) if name.endswith("data.pkl") else member)
    restore(folder, with_newest(contents, buffer.getvalue()))
    load(folder, "last")
    # Without an index the files speak for themselves.
    (folder / INDEX).unlink()
    load(folder, "last")


@budget(200)
@given(data=st.data())
def test_damaged_indices(saved, data):
    folder, contents = saved
    restore(folder, {**contents, INDEX: data.draw(mutations(contents[INDEX]))})
    load(folder, data.draw(st.sampled_from(["last", "best"])))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)


@budget(200)
@given(key=st.sampled_from(["file", "sha256", "epoch", "step", "best"]), value=VALUES, both=st.booleans())
@example(key="file", value="a\0b", both=True)
@example(key="file", value="../x", both=True)
@example(key="file", value="..", both=True)
@example(key="file", value="", both=False)
@example(key="file", value="\ud800", both=True)
@example(key="file", value="x" * 300, both=True)
@example(key="epoch", value=10**400, both=True)
@example(key="sha256", value="", both=True)
@example(key="sha256", value="\n", both=True)
def test_indices_with_other_values(saved, key, value, both):
    folder, contents = saved
    index = json.loads(contents[INDEX])
    for entry in index["files"][0 if both else 1 :]:
        entry[key] = value
    restore(folder, {**contents, INDEX: json.dumps(index).encode()})
    for which in ("last", "best"):
        load(folder, which)


@budget(100)
@given(key=st.sampled_from(["format", "files"]), value=VALUES)
def test_indices_of_another_form(saved, key, value):
    folder, contents = saved
    restore(folder, {**contents, INDEX: json.dumps({**json.loads(contents[INDEX]), key: value}).encode()})
    load(folder, "last")
