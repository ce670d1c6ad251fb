"""A run that was killed, damaged or locked resumes from its last whole checkpoint and ends as an undisturbed one."""

import builtins
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.runs.lock import lock_folder
from codistill.training.step import TrainStep

from .. import tiny
from .asserting import refused
from .running import EPOCHS, STEPS, arguments, at_step, end_state, in_child, kill_at_step, run_here, tiered

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")


def killed(colours: str, out: Path, step: int, method: str = "mfef") -> Path:
    """Train in a child that is killed before a step, counted from 1."""

    def work() -> int:
        with pytest.MonkeyPatch.context() as patch:
            kill_at_step(patch, step)
            return main(arguments(colours, out, method=method))

    assert in_child(work) == -signal.SIGKILL
    return out


def goes_on(out: Path, expected: Any) -> None:
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == expected
    assert cd.Run(out).summary["status"] == "finished"
    assert not [each.name for each in out.rglob("*.tmp-*")]


# --- 24: killed ---


@pytest.mark.fault(24)
@pytest.mark.parametrize("step", tiered(((step,) for step in range(1, STEPS * EPOCHS + 1)), [(1,), (4,), (6,)]))
def test_killed_at_a_step(colours, undisturbed, tmp_path, step):
    goes_on(killed(colours, tmp_path / "run", step), undisturbed())


@pytest.mark.fault(24)
@pytest.mark.parametrize("method", ["kdcl", "pcl", "dml"])
def test_killed_with_statistics_of_a_method(colours, undisturbed, tmp_path, method):
    goes_on(killed(colours, tmp_path / "run", 5, method), undisturbed(method))


class Killing:
    """Count the system calls of all saves, and kill the process at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None) -> None:
        self.at = at
        self.calls: list[str] = []
        self.opened = builtins.open
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "open"), (Path, "unlink")):
            patch.setattr(owner, name, self.counting(name, getattr(owner, name)))
        for owner in (builtins, io):  # Path.write_bytes has the latter
            patch.setattr(owner, "open", self.open)

    def counting(self, name: str, call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.tick(name)
            return call(*arguments, **options)

        return counted

    def tick(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = self.opened(file, mode, *arguments, **options)
        if "w" in mode or "a" in mode:
            kind = re.sub(r"\.tmp-.*|\d", "", Path(str(file)).name)
            self.tick(f"open {kind}")
            write = opened.write

            def half(content: Any) -> int:
                # Killed in the middle of a write, half of the content is in the file.
                if len(self.calls) + 1 == self.at:
                    write(content[: len(content) // 2])
                    opened.flush()
                self.tick(f"half of {kind}")
                return int(write(content))

            opened.write = half
        return opened


def killed_at_call(colours: str, out: Path, at: int | None) -> tuple[int, list[str]]:
    """Train in a child that is killed at a system call of its saves; its status, and which calls there were."""
    calls = out.with_name(f"{out.name}.calls")

    def work() -> int:
        with pytest.MonkeyPatch.context() as patch:
            killing = Killing(patch, at)
            status = main(arguments(colours, out))
            killing.opened(calls, "w").write(json.dumps(killing.calls))
            return status

    status = in_child(work)
    return status, json.loads(calls.read_text()) if calls.exists() else []


FIRST = ("half of config.json", "half of epoch-.pt", "half of index.json", "half of metrics.jsonl", "fsync", "replace")

MOST = 20  # arrays and TensorBoard are written in many pieces


@pytest.mark.fault(24)
# The first call of some kinds; in the second tier nearly all calls, for four processes of the tests.
@pytest.mark.parametrize("shard", [None, *(pytest.param(shard, marks=pytest.mark.slow) for shard in range(4))])
def test_killed_at_each_call_of_each_save(colours, undisturbed, tmp_path, shard):
    expected = undisturbed()  # before the calls are counted: what a process does once only is done
    status, calls = killed_at_call(colours, tmp_path / "counted", None)
    assert status == 0 and len(calls) > 2 * 13  # two epochs, each a checkpoint, an index and a line of metrics
    places = [at for at, name in enumerate(calls, 1) if calls[:at].count(name) <= MOST][shard or 0 :: 4]
    if shard is None:
        places = [calls.index(name) + 1 for name in FIRST]
    unmade = 0
    for at in places:
        out = tmp_path / f"killed{at}"
        assert killed_at_call(colours, out, at)[0] == -signal.SIGKILL
        if not (out / "config.json").exists():
            assert run_here(arguments(colours, out)) == 0  # nothing had begun: the same command again
            unmade += 1
        elif (out / "summary.json").exists():
            assert end_state(out) == expected
        else:
            goes_on(out, expected)
    made = calls.index("replace") + 1  # of config.json
    assert unmade == sum(at <= made for at in places), calls


@pytest.mark.fault(24)
def test_killed_while_it_resumes(colours, undisturbed, tmp_path):
    out = killed(colours, tmp_path / "run", 2)
    for _ in range(3):

        def again() -> int:
            with pytest.MonkeyPatch.context() as patch:
                kill_at_step(patch, 3)
                return main(["resume", str(out)])

        assert in_child(again) == -signal.SIGKILL
    goes_on(out, undisturbed())


# --- 25 to 30: damaged ---


@pytest.fixture(scope="module")
def killed_once(colours, tiny_registered, tmp_path_factory) -> Path:
    """A run that was killed in its second epoch, one checkpoint on the disk for each of two; to be read only."""
    out = tmp_path_factory.mktemp("killed") / "run"

    def work() -> int:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 5, lambda _: signal.raise_signal(signal.SIGUSR1))
            kill_at_step(patch, 6)
            return main(arguments(colours, out))

    assert in_child(work) == -signal.SIGKILL
    assert [(entry["epoch"], entry["step"]) for entry in cd.Run(out).checkpoints.entries()] == [(1, 0), (1, 2)]
    return out


@pytest.fixture
def broken(killed_once, tmp_path) -> Path:
    """A copy of that run."""
    return shutil.copytree(killed_once, tmp_path / "run")


def flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def newest(out: Path) -> Path:
    return out / "checkpoints" / str(cd.Run(out).checkpoints.entries()[-1]["file"])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], marks=pytest.mark.fault(25), id="cut"),
        pytest.param(lambda content: b"", marks=pytest.mark.fault(25), id="empty"),
        pytest.param(lambda content: b"hello", marks=pytest.mark.fault(25), id="text"),
        pytest.param(flipped, marks=pytest.mark.fault(26), id="bit"),
    ],
)
def test_a_damaged_newest_checkpoint(broken, undisturbed, capsys, damage):
    path = newest(broken)
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    goes_on(broken, undisturbed())
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"codistill: warning: {path}: damaged") and "using" in error


@pytest.mark.fault(26)
def test_a_flipped_bit_of_a_weight_is_not_loaded(broken, undisturbed):
    # torch.load alone takes it.
    path = newest(broken)
    name = next(name for name in torch.load(path)["method"] if name.endswith("running_mean"))
    weight = torch.load(path)["method"][name]
    content = path.read_bytes()
    place = content.index(weight.numpy().tobytes()) + 4
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert not torch.equal(torch.load(path)["method"][name], weight)
    goes_on(broken, undisturbed())


@pytest.mark.fault(27)
def test_all_checkpoints_are_bad(broken, capsys):
    files = list((broken / "checkpoints").glob("*.pt"))
    for path in files:
        path.write_bytes(flipped(path.read_bytes()))
    assert len(files) == 2
    for command in ("resume", "evaluate"):
        refused(capsys, [command, str(broken)], 4, *(path.name for path in files), unchanged=broken)


def enter(out: Path, content: bytes) -> None:
    """Replace a run's newest checkpoint together with its digest, as somebody could who hands a run folder on."""
    index = out / "checkpoints" / "index.json"
    listed = json.loads(index.read_text())
    listed["files"] = listed["files"][-1:]
    listed["files"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (out / "checkpoints" / listed["files"][0]["file"]).write_bytes(content)
    index.write_text(json.dumps(listed))


@pytest.mark.fault(28)
@pytest.mark.parametrize("wrapping", ["pickle", "torch.save"])
def test_a_checkpoint_that_carries_code(broken, tmp_path, capsys, wrapping):
    sentinel = tmp_path / "sentinel"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {sentinel}",)

    buffer = io.BytesIO()
    (pickle.dump if wrapping == "pickle" else torch.save)({"format": 2, "method": Evil()}, buffer)
    enter(broken, buffer.getvalue())
    export = ["export", str(broken), "--predictor", "student0", "--format", "safetensors"]
    for command in (["resume", str(broken)], ["evaluate", str(broken)], export):
        refused(capsys, command, 4, newest(broken).name, "cannot be read", unchanged=broken)
        assert not sentinel.exists()


def edited(path: Path, change: Any) -> bytes:
    state = torch.load(path)
    change(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


HEAD = "cohort.students.1.head.linear.weight"


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda weights: weights.update({HEAD: torch.zeros(10, 8)}),
            [HEAD, "[10, 8] there and [3, 8] here", "1 have another shape, 0 are missing, 0 unexpected"],
        ),
        (lambda weights: weights.pop(HEAD), [HEAD, "nothing there", "0 have another shape, 1 are missing"]),
        (lambda weights: weights.update(more=torch.ones(2)), ["more is [2] there and nothing here", "1 unexpected"]),
        (lambda weights: weights.update(more=3), ["something else in place of a tensor"]),
    ],
)
def test_a_checkpoint_of_other_shapes(broken, capsys, change, words):
    enter(broken, edited(newest(broken), lambda state: change(state["method"])))
    refused(capsys, ["evaluate", str(broken)], 4, *words, unchanged=broken)
    checkpoints = tiny.listing(broken / "checkpoints")
    refused(capsys, ["resume", str(broken)], 4, *words)
    assert tiny.listing(broken / "checkpoints") == checkpoints


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("momentum"),
        lambda state: state["momentum"].pop(),
        lambda state: state.pop("sums"),
        lambda state: state.update(rows=[]),
        lambda state: state.update(rows=["{"]),
        lambda state: state.pop("rows"),
        lambda state: state.update(step=10**6),
        lambda state: state.pop("config"),
        lambda state: state.pop("method"),
    ],
)
def test_a_checkpoint_that_lacks_a_part(broken, capsys, change):
    enter(broken, edited(newest(broken), change))
    checkpoints = tiny.listing(broken / "checkpoints")
    refused(capsys, ["resume", str(broken)], 4, str(broken), "checkpoint")
    assert tiny.listing(broken / "checkpoints") == checkpoints


@pytest.mark.fault(30)
def test_a_checkpoint_of_a_newer_format(broken, capsys):
    enter(broken, edited(newest(broken), lambda state: state.update(format=3)))
    refused(capsys, ["resume", str(broken)], 4, "format 3 > 2", unchanged=broken)


@pytest.mark.fault(30)
def test_an_index_of_a_newer_format(broken, capsys):
    (broken / "checkpoints" / "index.json").write_text('{"format": 3, "files": []}')
    refused(capsys, ["resume", str(broken)], 4, "index.json: format 3 > 2", unchanged=broken)


@pytest.mark.fault(30)
@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 2, "files": [{"file": "../../x"}]}'])
def test_a_lost_index(broken, undisturbed, capsys, content):
    index = broken / "checkpoints" / "index.json"
    index.unlink() if content is None else index.write_text(content)
    capsys.readouterr()
    goes_on(broken, undisturbed())
    assert "2 whole checkpoints were found by looking at the files" in capsys.readouterr().err


# --- 33: metrics ---


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text + text[: len(text) // 2],
        lambda text: text + text,
        lambda text: "",
        None,
    ],
    ids=["cut", "a part of a line more", "a line too many", "empty", "missing"],
)
def test_metrics_that_a_crash_cut(broken, undisturbed, change):
    path = broken / "metrics.jsonl"
    path.unlink() if change is None else path.write_text(change(path.read_text()))
    goes_on(broken, undisturbed())


# --- 10: changed settings ---


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.2}, ["learning_rate: 0.05 -> 0.2"]),
        ({"seed": 3, "momentum": 0.5}, ["seed: 0 -> 3", "momentum: 0.9 -> 0.5"]),
        ({"networks": ["tiny", "tiny", "tiny"]}, ["networks: ['tiny', 'tiny'] -> ['tiny', 'tiny', 'tiny']"]),
        ({"data": "digits"}, ["data: 'packed' -> 'digits'"]),
        ({"epochs": 4}, ["epochs: 2 -> 4"]),
    ],
)
def test_resume_with_changed_settings(broken, capsys, change, words):
    path = broken / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(capsys, ["resume", str(broken)], 2, str(path), *words, unchanged=broken)


@pytest.mark.fault(10)
@pytest.mark.parametrize("key", ["learning_rate", "seed", "networks", "epochs", "batch_size", "precision", "nonsense"])
def test_only_places_may_be_overridden(broken, undisturbed, capsys, key):
    refused(
        capsys,
        ["resume", str(broken), "--override", f"{key}=1"],
        2,
        key,
        "only data_dir, device, threads, data_cache, stream, track, weights, init, teacher can change",
        unchanged=broken,
    )


@pytest.mark.fault(10)
def test_places_may_be_overridden(broken, undisturbed, colours, tmp_path):
    moved = tmp_path / "moved.npz"
    moved.write_bytes(Path(colours).read_bytes())
    assert run_here(["resume", str(broken), "--override", f"data_dir={moved}", "device=cpu", "threads=1"]) == 0
    assert end_state(broken) == undisturbed()


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("words", "fragment"), [(["device"], "key=value"), (["device=gpu"], "device"), (["threads=0"], "threads")]
)
def test_overrides_that_cannot_be_used(broken, capsys, words, fragment):
    refused(capsys, ["resume", str(broken), "--override", *words], 2, fragment, unchanged=broken)


@pytest.mark.fault(10)
def test_resume_with_other_data(broken, tmp_path, capsys):
    other = tiny.write_npz(tmp_path / "other.npz", tiny.data(train=24, test=21))
    refused(capsys, ["resume", str(broken), "--data-dir", str(other)], 3, "24 train images", "20", unchanged=broken)


# --- 9: locks ---


@pytest.mark.fault(9)
def test_a_second_process_is_kept_out_and_a_dead_one_is_not(colours, undisturbed, tmp_path, capsys):
    out, go = tmp_path / "run", tmp_path / "go"

    def waiting(_: TrainStep) -> None:
        while not go.exists():
            time.sleep(0.01)

    def work() -> int:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 5, waiting)
            return main(arguments(colours, out))

    pids: list[int] = []
    ended: list[int] = []

    def watched() -> int:
        (tmp_path / "pid").write_text(str(os.getpid()))
        return work()

    first = threading.Thread(target=lambda: ended.append(in_child(watched)))
    first.start()
    try:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        pids.append(int((tmp_path / "pid").read_text()))
        before = tiny.listing(out / "checkpoints")
        for command in (["resume", str(out)], arguments(colours, out)):
            refused(capsys, command, 2, f"in use by pid {pids[0]} on host {os.uname().nodename}")
        assert tiny.listing(out / "checkpoints") == before
        os.kill(pids[0], signal.SIGKILL)
    finally:
        go.touch()
        first.join()
    assert ended == [-signal.SIGKILL]
    assert f"pid {pids[0]}" in (out / ".lock").read_text()
    goes_on(out, undisturbed())


@pytest.mark.fault(9)
def test_a_process_that_asks_for_the_lock_does_not_disturb(colours, undisturbed, tmp_path, capsys):
    def asked(_: TrainStep) -> None:
        # Another open file, as another process has.
        with pytest.raises(UsageError, match="in use by pid"):
            lock_folder(tmp_path / "run")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, asked)
        assert run_here(arguments(colours, tmp_path / "run")) == 0
    assert end_state(tmp_path / "run") == undisturbed()
