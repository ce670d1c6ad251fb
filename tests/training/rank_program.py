"""`codistill` with a network named `tiny` and a rank that fails: `torchrun .. -m tests.training.rank_program train ..`.

A file `fault` in the working directory says how, once: RANK STEP ACT, steps counted in each process from 1; step 0 is
before the data set is loaded.
"""

import os
import signal
import socket
import sys
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # an optimiser does, and forks would each take seconds for it

from codistill.cli import main
from codistill.core.errors import DataError
from codistill.training import train, trainer
from codistill.training.step import TrainStep

from .. import tiny

FAULT = Path("fault")
# If its first pass comes after a test has compiled, autograd starts threads, with which forks cannot compute.
torch.zeros((), requires_grad=True).backward()


def act(step: int) -> str:
    """Take note of the fault of this rank and step."""
    rank, at, what = FAULT.read_text().split() if FAULT.exists() else ("", "", "")
    if (rank, at) != (os.environ["RANK"], str(step)):
        return ""
    FAULT.unlink()
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    if what == "launcher":
        os.kill(os.getppid(), signal.SIGTERM)
    return what


def program(arguments: list[str] | None = None) -> int:
    """Run a command line as one rank."""
    step, load, calls = TrainStep.__call__, train.load_named_data, iter(range(1, 1000))

    def faulty(self: TrainStep, *given: Any) -> None:
        what = act(next(calls))
        if what == "raise":
            raise ValueError("the rank has had\nenough")
        if what == "diverge":
            with torch.no_grad():
                next(self.method.parameters()).fill_(torch.nan)
        step(self, *given)

    def loading(*given: Any) -> Any:
        if act(0) == "data":
            raise DataError("there are no data on this machine")
        return load(*given)

    with pytest.MonkeyPatch.context() as patch, tiny.registered():
        patch.setattr(TrainStep, "__call__", faulty)
        patch.setattr(train, "load_named_data", loading)
        patch.setattr(trainer, "write_report", lambda run, summary: None)
        return main(arguments)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def forked(work: Callable[[], int], count: int = 2, launch: str | None = None) -> list[int]:
    """Do something in forks of this process with torchrun's variables, without the seconds that torchrun takes.

    Returns:
        The exit status of each, or minus the signal that killed it.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    shared["TORCHELASTIC_RUN_ID"] = launch or uuid.uuid4().hex
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
                os.environ |= {name: str(value) for name, value in own.items()}
                status = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    sys.exit(program())
