"""Trainings of a fraction of a second that are killed, stopped and resumed, here or in a child process."""

import functools
import hashlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import pytest

import codistill as cd
from codistill.cli import main
from codistill.evaluation.evaluation import Evaluation
from codistill.training.step import TrainStep

from .. import tiny

# Two epochs of three steps, the last of them smaller.
STEPS, EPOCHS = 3, 2


def arguments(data: str, out: Path, *more: str, method: str = "mfef") -> list[str]:
    """The command line of a tiny training."""
    students = ["tiny"] * max(2, cd.METHODS[method].min_students)
    flags = ["--networks", *students, "--data", "packed", "--data-dir", data, "--epochs", str(EPOCHS)]
    return ["train", method, *flags, "-b", "8", "--lr", "0.05", "--threads", "1", "--out", str(out), *more]


def end_state(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Digest of every tensor of the last checkpoint (weights, optimiser, averages), and the metrics without times."""
    state = cd.Run(path).checkpoints.load("last")
    digest = hashlib.sha256(repr(state.position).encode())
    for name, tensor in sorted(state.method.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for tensor in (*state.momentum, *state.ema.values()):
        digest.update(tensor.contiguous().numpy().tobytes())
    rows: list[dict[str, Any]] = tiny.untimed(cd.Run(path).metrics())
    return digest.hexdigest(), rows


def tiered(cases: Iterable[Any], first: Container[Any]) -> list[Any]:
    """Return parameters of a test; those that are not in `first` belong to the second tier."""
    return [pytest.param(*case, marks=() if case in first else pytest.mark.slow) for case in cases]


def evaluate_in_batches(patch: pytest.MonkeyPatch, images: int) -> None:
    """Evaluate in batches of so many images; the scores of other batches differ in their last digits."""
    patch.setattr(Evaluation, "__init__", functools.partialmethod(Evaluation.__init__, batch_size=images))


def run_here(line: list[str]) -> int:
    """Run a command line in this process, and restore the signal handlers of the tests afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # A shell may have started the tests with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main(line)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_child(work: Callable[[], int]) -> int:
    """Run something in a fork of this process; its exit status, or minus the signal that killed it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # one thread computes; Python 3.12 warns of others
        pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[TrainStep], None]) -> None:
    """Do something before a step of the training, counted from 1."""
    call, count = TrainStep.__call__, iter(range(1, 1000))

    def stepping(self: TrainStep, *arguments: Any) -> None:
        if next(count) == number:
            act(self)
        call(self, *arguments)

    patch.setattr(TrainStep, "__call__", stepping)


def kill_at_step(patch: pytest.MonkeyPatch, number: int, what: int = signal.SIGKILL) -> None:
    """Send this process a signal before a step."""
    at_step(patch, number, lambda _: os.kill(os.getpid(), what))
