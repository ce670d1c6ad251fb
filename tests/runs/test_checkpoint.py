"""Checkpoints that are checked before they are parsed."""

import errno
import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.core import files
from codistill.core.errors import CheckpointError
from codistill.core.files import write_json
from codistill.methods.cohort import Cohort
from codistill.runs.checkpoint import CheckpointStore
from codistill.runs.saving import HostCopies
from codistill.runs.state import TrainingState, load_weights, tensors_once

from .. import tiny


def state(epoch: int, best: bool = False, step: int = 0, value: float | None = None) -> TrainingState:
    """A state whose weights are the number of the epoch, or another value."""
    weights = {"weight": torch.full((1000,), float(epoch if value is None else value))}
    rows = [{"epoch": each} for each in range(epoch)]
    return TrainingState({"seed": 0}, weights, [torch.zeros(2)], rows, step, best)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def saved(store: CheckpointStore, *best: bool) -> list[Path]:
    """Save one checkpoint after the other; the values are the epochs."""
    for epoch, is_best in enumerate(best, start=1):
        store.save(state(epoch, is_best))
    return sorted(store.folder.glob("*.pt"))


def value(loaded: TrainingState) -> float:
    return loaded.method["weight"][0].item()


def test_a_round_trip_keeps_every_bit(store):
    tensors = {"wide": torch.randn(3, 4), "narrow": torch.randn(5).bfloat16(), "count": torch.tensor(7)}
    rows = [{"epoch": 0, "train": {"loss": 0.1 + 0.2}}]
    sums = {"names": ["ce"], "sums": torch.randn(2, dtype=torch.float64)}
    saved = TrainingState({"lr": 0.1}, tensors, [torch.randn(2)], rows, 3, sums=sums, finite={"names": ["ce"]})
    store.save(saved)
    loaded = store.load()
    for name, tensor in tensors.items():
        assert torch.equal(loaded.method[name], tensor) and loaded.method[name].dtype == tensor.dtype
    assert torch.equal(loaded.momentum[0], saved.momentum[0]) and torch.equal(loaded.sums["sums"], sums["sums"])
    assert (loaded.config, loaded.rows, loaded.finite) == (saved.config, rows, saved.finite)
    assert (loaded.epoch, loaded.step, loaded.best) == (1, 3, False)


def test_the_last_two_and_the_best_are_kept(store):
    files = saved(store, True, True, False, False, False)
    assert [file.name for file in files] == ["epoch-000002.pt", "epoch-000004.pt", "epoch-000005.pt"]
    assert [entry["best"] for entry in store.entries()] == [True, False, False]
    assert value(store.load()) == 5 and value(store.load("best")) == 2
    for entry, file in zip(store.entries(), files, strict=True):
        assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sorted(each.name for each in store.folder.iterdir()) == [*(file.name for file in files), "index.json"]


def test_an_epoch_saved_again_replaces_itself(store):
    saved(store, True, False)
    store.save(state(2, value=20))
    assert [entry["epoch"] for entry in store.entries()] == [1, 2]
    assert value(store.load()) == 20


def test_nothing_is_deleted_before_the_new_one_is_safe(store, monkeypatch):
    saved(store, True, False)
    before = tiny.listing(store.folder)
    real = files.write_atomically

    def fail_at_index(path: Path, content: bytes) -> None:
        if path.name == "index.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(files, "write_atomically", fail_at_index)
    with pytest.raises(OSError, match="No space"):
        store.save(state(3, True))
    after = tiny.listing(store.folder)
    assert {name: after[name] for name in before} == before
    assert value(store.load()) == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hello"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_one_is_passed_over_with_one_warning(store, damage, capsys):
    files = saved(store, True, False)
    DAMAGES[damage](files[-1])
    before = tiny.listing(store.folder)
    assert value(store.load()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"codistill: warning: {files[-1]}: ")
    assert tiny.listing(store.folder) == before


def test_when_all_are_bad_each_is_named_and_none_deleted(store, capsys):
    files = saved(store, True, False, False)
    for file in files:
        flip(file)
    before = tiny.listing(store.folder)
    with pytest.raises(CheckpointError, match=r"damaged: SHA-256 is [0-9a-f]{12}\.\. instead of ") as error:
        store.load()
    assert all(file.name in str(error.value) for file in files) and "\n" not in str(error.value)
    assert tiny.listing(store.folder) == before
    assert capsys.readouterr().err == ""


def test_a_damaged_best_one_is_not_replaced_by_another(store):
    files = saved(store, True, False)
    flip(files[0])
    with pytest.raises(CheckpointError, match=r"epoch-000001\.pt: damaged"):
        store.load("best")


def test_without_a_checkpoint(store):
    with pytest.raises(CheckpointError, match="no last checkpoint; the run did not complete an epoch"):
        store.load()
    assert not store.folder.exists()


STRANGE_ENTRIES = [3, {}, {"file": "epoch-000001.pt"}, {"file": 1, "sha256": 2, "best": True}, {"file": "../x.pt"}]


@pytest.mark.parametrize(
    "index",
    [None, "", "[]", "null", '{"files": []}', '{"format": 2}', '{"format": 2, "files": 3}', "{", "\x00\xff"]
    + [json.dumps({"format": 2, "files": [entry]}) for entry in STRANGE_ENTRIES],
)
def test_a_lost_index_is_rebuilt_from_the_whole_files(store, index, capsys):
    files = saved(store, True, False, False)
    flip(files[2])
    before = store.entries()
    path = store.folder / "index.json"
    if index is None:
        path.unlink()
    else:
        path.write_text(index)
    again = CheckpointStore(store.folder)
    assert again.entries() == before[:2]
    assert (value(again.load()), value(again.load("best"))) == (2, 1)
    error = capsys.readouterr().err
    assert "index.json is " in error and "2 whole checkpoints were found" in error
    again.save(state(4))
    assert [entry["epoch"] for entry in store.entries()] == [1, 2, 4] and not capsys.readouterr().err


@pytest.mark.parametrize(("number", "words"), [(1, "format 1 < 2: made by an older"), (3, "format 3 > 2")])
def test_an_index_of_another_format_is_refused(store, number, words):
    saved(store, True)
    index = store.folder / "index.json"
    index.write_text(json.dumps({"format": number, "files": []}))
    before = tiny.listing(store.folder)
    with pytest.raises(CheckpointError, match=rf"index\.json: {words}"):
        store.load()
    with pytest.raises(CheckpointError, match=words):
        store.save(state(2))
    assert tiny.listing(store.folder) == before


def enter(store: CheckpointStore, content: bytes) -> None:
    """Put bytes into the store with a right digest, as somebody could who passes a run folder on."""
    store.folder.mkdir(exist_ok=True)
    (store.folder / "epoch-000001.pt").write_bytes(content)
    entry = {"file": "epoch-000001.pt", "sha256": hashlib.sha256(content).hexdigest(), "epoch": 1, "step": 0}
    write_json(store.folder / "index.json", {"format": 2, "files": [{**entry, "best": True}]})


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in state(1).as_mapping().items() if name != key}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((content, "not a checkpoint of codistill") for content in ([1], {}, {"format": "2"}, without("format"))),
        *(
            (without(key), f"damaged: {key} is missing")
            for key in state(1).as_mapping()
            if key not in ("format", "ema")  # older versions have no averages
        ),
        ({"format": 3}, "format 3 > 2: made by a newer version of codistill"),
        ({**state(1).as_mapping(), "epoch": 2}, "it holds no metrics of 2 epochs"),
        ({**state(1).as_mapping(), "rows": ["{"]}, "it holds no metrics of 1 epochs"),
        ({**state(1).as_mapping(), "rows": ["3"]}, "it holds no metrics of 1 epochs"),
        ({**state(1).as_mapping(), "method": {"weight": 3}}, "in place of a tensor"),
        ({**state(1).as_mapping(), "step": -1}, "a step below 0"),
    ],
)
def test_contents_that_are_no_checkpoint_are_refused(store, content, words):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    enter(store, buffer.getvalue())
    with pytest.raises(CheckpointError, match=words):
        store.load()


def test_inside_an_epoch(store):
    store.save(state(1, True))
    store.save(state(1, step=7, value=2))
    assert [(entry["file"], entry["epoch"], entry["step"]) for entry in store.entries()] == [
        ("epoch-000001.pt", 1, 0),
        ("epoch-000001-step-000007.pt", 1, 7),
    ]
    loaded = store.load()
    assert (value(loaded), *loaded.position) == (2, 1, 7) and value(store.load("best")) == 1


def test_after_a_damaged_one_two_whole_ones_are_kept(store):
    files = saved(store, True, False, False)
    flip(files[2])
    assert value(store.load()) == 2
    store.save(state(3, step=5))
    assert [entry["epoch"] for entry in store.entries()] == [1, 2, 3]
    assert all(each.load() for each in (store, CheckpointStore(store.folder)))


def test_code_in_a_checkpoint_is_not_run(store, tmp_path):
    # tests/faults has pickles and files of torch.save.
    sentinel = tmp_path / "sentinel"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {sentinel}",)

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"format": 2, "method": Evil()}))
        archive.writestr("x/version", "3")
    pickle.loads(pickle.dumps(Evil()))
    assert sentinel.exists()  # unpickled carelessly, it runs
    sentinel.unlink()
    enter(store, buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"epoch-000001\.pt: cannot be read") as error:
        store.load()
    assert "\n" not in str(error.value) and not sentinel.exists()


def test_a_trunk_that_students_share_is_stored_once(store):
    method = cd.ONE([cd.network("resnet20", 10) for _ in range(3)], 10)
    store.save(TrainingState({}, HostCopies().copy(tensors_once(method)), []))
    size = next(store.folder.glob("*.pt")).stat().st_size
    tensors = [*method.parameters(), *method.buffers()]
    once = sum(tensor.nbytes for tensor in tensors)
    assert once < size < once + 500 * len(tensors)  # names, alignment
    assert size < 0.9 * sum(tensor.nbytes for tensor in method.state_dict().values())


def test_shared_tensors_come_back_under_all_their_names():
    saved, fresh = (tiny.method(cd.ONE, seed, students=3) for seed in (0, 1))
    load_weights(fresh, tensors_once(saved), "it")
    assert fresh.cohort.shared_stages > 0 and fresh.cohort[0].stages[0] is fresh.cohort[2].stages[0]
    for name, tensor in saved.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_weights_of_a_cohort_that_shares_less_are_refused():
    apart, shared = (tiny.method(kind, students=2) for kind in (cd.DML, cd.Independent))
    shared.cohort = Cohort(list(shared.cohort), shared_stages=2)
    with pytest.raises(CheckpointError, match=r"0 have another shape, 0 are missing, 1\d unexpected"):
        load_weights(shared, tensors_once(apart), "it")
