"""Signals, full disks, NaN, exhausted memory: the last checkpoint stays, and the exit status says why."""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.data.augment import DeviceImages
from codistill.runs import checkpoint
from codistill.training.step import TrainStep

from .asserting import refused
from .running import (
    EPOCHS,
    STEPS,
    arguments,
    at_step,
    end_state,
    evaluate_in_batches,
    in_child,
    kill_at_step,
    run_here,
    tiered,
)
from .test_writers import refusing

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
WORD = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


def signals(places: Sequence[int], term: int, interrupt: Sequence[int]) -> pytest.MarkDecorator:
    """Try both signals at all places; in the first tier SIGTERM at one of them and SIGINT at some."""
    first = {(signal.SIGTERM, term), *((signal.SIGINT, place) for place in interrupt)}
    cases = tiered(itertools.product(STATUS, places), first)
    return pytest.mark.parametrize(("number", "place"), cases, ids=lambda value: getattr(value, "name", value))


def positions(out: Path) -> list[tuple[int, int]]:
    return [(entry["epoch"], entry["step"]) for entry in cd.Run(out).checkpoints.entries()]


# --- 34 and 35: signals ---


@pytest.mark.fault(34)
@pytest.mark.fault(35)
@signals(range(1, STEPS * EPOCHS + 1), term=4, interrupt=(1, 3, 6))
def test_a_signal_within_a_step(colours, undisturbed, tmp_path, capsys, monkeypatch, number, place):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, place, lambda _: signal.raise_signal(number))
        capsys.readouterr()
        assert run_here(arguments(colours, out)) == STATUS[number]
    epoch, done = divmod(place - 1, STEPS)
    where = f"after step {done + 1} of epoch {epoch + 1}"
    line = f"codistill: error: {WORD[number]} {where} and saved: codistill resume {out}\n"
    assert capsys.readouterr().err == line
    # Saved at the end of that very step.
    assert positions(out)[-1] == (epoch, done + 1)
    assert cd.Run(out).summary["status"] == "interrupted"
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()


@pytest.mark.fault(34)
@signals((1, 2, 4, 6), term=2, interrupt=(1, 6))
def test_a_signal_within_the_evaluation(colours, undisturbed, tmp_path, monkeypatch, number, place):
    out, batch, count = tmp_path / "run", DeviceImages.batch, iter(range(1, 100))

    def watched(self: DeviceImages, *start_and_stop: int) -> Any:
        if next(count) == place:
            signal.raise_signal(number)
        return batch(self, *start_and_stop)

    evaluate_in_batches(monkeypatch, 8)  # 21 test images: three batches in an evaluation
    with monkeypatch.context() as patch:
        patch.setattr(DeviceImages, "batch", watched)
        assert run_here(arguments(colours, out)) == STATUS[number]
    assert positions(out)[-1] == ((place - 1) // 3, STEPS)
    assert next(count) == place + 1  # no further batch was evaluated
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed(evaluated_in=8)


@pytest.mark.fault(34)
@signals((1, 2, 3, 4), term=2, interrupt=(1, 4))
def test_a_signal_during_a_save(colours, undisturbed, tmp_path, monkeypatch, number, place):
    out, count, replace = tmp_path / "run", iter(range(1, 100)), os.replace

    def watched(source: Any, target: Any) -> None:
        # On the thread that saves; the signal reaches the main one.
        if "checkpoints" in str(target) and next(count) == place:
            os.kill(os.getpid(), number)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        status = run_here(arguments(colours, out))
    # After the last epoch's save nothing is left to stop.
    assert status == STATUS[number] or (status == 0 and place > 2)
    if status:
        assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()


@pytest.fixture(scope="module")
def fleets(colours, tiny_registered, tmp_path_factory) -> Path:
    """A whole fleet of two, and one that a signal has stopped; to be read only."""
    folder = tmp_path_factory.mktemp("fleets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
        assert run_here(arguments(colours, folder / "whole", "--seeds", "0", "1")) == 0
        at_step(patch, 8, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run_here(arguments(colours, folder / "broken", "--seeds", "0", "1")) == 143
    assert [positions(folder / "broken" / f"seed{seed}")[-1] for seed in (0, 1)] == [(1, 1), (1, 1)]
    return folder


@pytest.mark.fault(34)
@pytest.mark.parametrize("together", [False, True])
def test_a_signal_at_a_fleet(fleets, tmp_path, capsys, together):
    broken = shutil.copytree(fleets / "broken", tmp_path / "broken")
    if not together:  # one of them alone, and the rest by the folder of all
        assert run_here(["resume", str(broken / "seed1")]) == 0
    assert run_here(["resume", str(broken)]) == 0
    for seed in (0, 1):
        assert end_state(broken / f"seed{seed}") == end_state(fleets / "whole" / f"seed{seed}")
    words = ("all 2 runs", "are finished or diverged")
    refused(capsys, ["resume", str(broken)], 2, *words, unchanged=tmp_path)


@pytest.mark.fault(35)
def test_sigint_twice_ends_at_once(colours, undisturbed, tmp_path, capfd):
    out = tmp_path / "run"

    def twice(_: TrainStep) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one waited")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, twice)
        assert run_here(arguments(colours, out)) == 130
    assert capfd.readouterr().err == "codistill: error: interrupted at once; what was saved before is kept\n"
    assert positions(out) == [(1, 0)]  # nothing new, and the old state is whole
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()


@pytest.mark.fault(35)
def test_sigint_twice_in_another_process_during_a_save(colours, undisturbed, tmp_path):
    out = tmp_path / "run"

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        replace = os.replace

        def slow(source: Any, target: Any) -> None:
            if "step-" in str(target):
                os.kill(os.getpid(), signal.SIGINT)
            replace(source, target)

        with pytest.MonkeyPatch.context() as patch:
            kill_at_step(patch, 5, signal.SIGINT)
            patch.setattr(os, "replace", slow)
            return main(arguments(colours, out))

    assert in_child(work) == 130
    assert positions(out)[0] == (1, 0)
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()


@pytest.mark.fault(35)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name)
def test_sigusr_saves_and_goes_on(colours, undisturbed, tmp_path, number):
    seen: list[list[tuple[int, int]]] = []
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, lambda _: signal.raise_signal(number))
        at_step(patch, 3, lambda _: seen.append(positions(out)))
        assert run_here(arguments(colours, out)) == 0
    assert seen == [[(0, 2)]]
    assert end_state(out) == undisturbed()
    assert signal.getsignal(number) is signal.SIG_DFL  # given back


# --- 31 and 32: disks ---


def failing(kind: int, names: Callable[[str], bool], times: int) -> Callable[[Path, bytes], None]:
    """Make writing fail so many times for files of some names."""
    real, left = checkpoint.write_atomically, iter(range(times))

    def write(path: Path, content: bytes) -> None:
        if names(str(path)) and next(left, None) is not None:
            raise OSError(kind, os.strerror(kind))
        real(path, content)

    return write


@pytest.mark.fault(31)
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_is_full_for_a_while(colours, undisturbed, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(checkpoint, "write_atomically", failing(kind, lambda name: name.endswith(".pt"), 1))
    capsys.readouterr()
    assert run_here(arguments(colours, tmp_path / "run")) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"codistill: warning: {tmp_path / 'run'}: checkpoint not written: {os.strerror(kind)}")
    assert end_state(tmp_path / "run") == undisturbed()


@pytest.mark.fault(31)
def test_an_index_that_cannot_be_read_for_a_while(colours, undisturbed, tmp_path, capsys, monkeypatch):
    read, left = Path.read_bytes, iter(range(2))

    def failing_read(path: Path) -> bytes:
        if path.name == "index.json" and next(left, None) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing_read)
    capsys.readouterr()
    assert run_here(arguments(colours, tmp_path / "run")) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoint not written: " in error and "training goes on" in error
    monkeypatch.undo()
    assert end_state(tmp_path / "run") == undisturbed()


@pytest.mark.fault(31)
def test_a_disk_that_is_full_at_the_last_save_is_tried_once_more(colours, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint, "write_atomically", failing(errno.ENOSPC, lambda name: name.endswith("epoch-000002.pt"), 1)
    )
    assert run_here(arguments(colours, tmp_path / "run")) == 0
    assert end_state(tmp_path / "run") == undisturbed()


@pytest.mark.fault(31)
def test_a_disk_that_stays_full(colours, undisturbed, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "write_atomically", failing(errno.ENOSPC, lambda name: name.endswith("epoch-000002.pt"), 99)
        )
        capsys.readouterr()
        assert run_here(arguments(colours, out)) == 6
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("codistill: warning: ") and "No space left on device" in warning
    assert error == (
        f"codistill: error: {out}: the last checkpoint could not be written: No space left on device: "
        f"free some space; what was written before is kept; then: codistill resume {out}"
    )
    assert cd.Run(out).summary["status"] == "failed" and positions(out) == [(1, 0)]
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()


@pytest.mark.fault(31)
def test_a_limit_on_the_size_of_files(colours, undisturbed, tmp_path):
    """The system's own refusal, in the middle of a write."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def limit(_: TrainStep) -> None:
            while not (out / "metrics.jsonl").exists():  # the first epoch is saved beside the steps of the second
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 4, limit)
            return main(arguments(colours, out))

    assert in_child(work) == 6
    assert positions(out)[0] == (1, 0)
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()


@pytest.mark.fault(32)
def test_metrics_that_cannot_be_written(colours, undisturbed, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"

    def lost(self: cd.Run, rows: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(cd.Run, "append_metrics", lost)
        patch.setattr(cd.Run, "write_metrics", lost)
        capsys.readouterr()
        assert run_here(arguments(colours, out)) == 6
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"codistill: warning: {out}: metrics.jsonl not written: Input/output error")
    assert error.startswith(f"codistill: error: {out}/metrics.jsonl could not be written")
    # The training itself came to its end.
    assert cd.Run(out).summary["status"] == "finished"
    rows = list(cd.Run(out).checkpoints.load().rows)
    assert [row["epoch"] for row in rows] == [0, 1] and positions(out)[-1] == (2, 0)


@pytest.mark.fault(32)
def test_metrics_that_cannot_be_written_for_a_while(colours, undisturbed, tmp_path, capsys, monkeypatch):
    plain, count = cd.Run.append_metrics, iter(range(100))

    def half(self: cd.Run, row: Any) -> None:
        if next(count) == 0:
            (self.path / "metrics.jsonl").write_text(json.dumps(row)[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, row)

    monkeypatch.setattr(cd.Run, "append_metrics", half)
    assert run_here(arguments(colours, tmp_path / "run")) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert end_state(tmp_path / "run") == undisturbed()


@pytest.mark.fault(32)
def test_events_that_cannot_be_written(colours, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    with refusing(r"/tensorboard", errno.EROFS):
        assert run_here(arguments(colours, out)) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "events not written" in error
    assert end_state(out) == undisturbed()


@pytest.mark.fault(32)
def test_a_closed_standard_output(colours, undisturbed, tmp_path, capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert run_here(arguments(colours, tmp_path / "run")) == 0
    assert capsys.readouterr().err == ""
    assert end_state(tmp_path / "run") == undisturbed()


# --- 36: NaN and infinity ---


def poison(name: str, value: float) -> Callable[[TrainStep], None]:
    """Set one number of a parameter before the step."""

    def change(step: TrainStep) -> None:
        with torch.no_grad():
            parameter = dict(step.method.named_parameters())[name]
            parameter[(0,) * parameter.ndim] = value

    return change


def poison_gradient(name: str, value: float) -> Callable[[TrainStep], None]:
    """Set the gradient of a parameter in that step only."""

    def change(step: TrainStep) -> None:
        parameter = dict(step.method.named_parameters())[name]
        handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
        step.handle = handle  # type: ignore[attr-defined]

    return change


FIRST, SECOND = "cohort.students.0.head.linear.weight", "cohort.students.1.stages.2.0.weight"
TRUNK, FUSION = "cohort.students.0.stages.0.0.weight", "fusion.head.linear.weight"


POISONED = (
    (poison, FIRST, "student0"),
    (poison, SECOND, "student1"),
    (poison, TRUNK, "student0, student1"),
    (poison, FUSION, "fused"),
    (poison_gradient, FUSION, f"fusion (gradient of {FUSION})"),
    (poison_gradient, FIRST, f"student0 (gradient of {FIRST})"),
    (poison_gradient, SECOND, f"student1 (gradient of {SECOND})"),
    (poison_gradient, TRUNK, f"the shared trunk (gradient of {TRUNK})"),
)
WAYS = [(*who, value, step) for who in POISONED for value in (math.nan, math.inf) for step in (4, 6)]


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("act", "name", "who", "value", "step"),
    tiered(WAYS, [*WAYS[::4], *WAYS[3::12]]),  # in the first tier NaN at one step for all, infinity for three
)
def test_nan_and_infinity(colours, undisturbed, tmp_path, capsys, monkeypatch, act, name, who, value, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, step, act(name, value))
        where = f"at step {step - 3} of epoch 2 at learning rate 0.005: lower --learning-rate"
        line = refused(capsys, arguments(colours, out), 5, who, where, str(out))
        assert line.startswith(f"codistill: error: {who}")
    assert cd.Run(out).summary["status"] == "diverged"
    # The state of before is the last and the best.
    assert positions(out) == [(1, 0)]
    for which in ("last", "best"):
        assert all(each.isfinite().all() for each in cd.Run(out).checkpoints.load(which).method.values())
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()


@pytest.mark.fault(36)
def test_a_state_with_nan_is_not_saved_at_a_signal(colours, undisturbed, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, poison(FIRST, float("nan")))
        at_step(patch, 6, lambda _: signal.raise_signal(signal.SIGTERM))
        capsys.readouterr()
        assert run_here(arguments(colours, out)) == 143
    assert "warning: not saved: student0 (" in capsys.readouterr().err
    assert positions(out) == [(1, 0)]
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()


# --- 37: memory ---


@pytest.mark.fault(37)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_ends(colours, undisturbed, tmp_path, capsys, monkeypatch, error):
    out = tmp_path / "run"

    def full(_: TrainStep) -> None:
        raise error

    with monkeypatch.context() as patch:
        at_step(patch, 5, full)
        refused(capsys, arguments(colours, out), 6, "out of memory: mfef with tiny + tiny at batch size 8")
    assert cd.Run(out).summary["status"] == "failed" and positions(out) == [(1, 0)]
    assert run_here(["resume", str(out)]) == 0
    assert end_state(out) == undisturbed()
