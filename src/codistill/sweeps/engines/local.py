"""Processes on this machine, and the locks by which a sweep knows those of an earlier one.

Another engine replaces `start` and `stop`; what it starts has a `poll`, as `subprocess.Popen` has it.
"""

import contextlib
import fcntl
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from codistill.core.host import default_threads
from codistill.settings.config import RunConfig

Process = subprocess.Popen[bytes]


@contextlib.contextmanager
def locked(logs: Sequence[Path]) -> Iterator[list[IO[bytes]] | None]:
    """Yield logs open for appending and locked; None where the process of an earlier sweep still holds one.

    A process that is started meanwhile inherits the locks with the open files, and the kernel releases them when it
    ends, even if its parent dies first.
    """
    with contextlib.ExitStack() as opened:
        files: list[IO[bytes]] | None = [opened.enter_context(open(log, "ab")) for log in logs]
        try:
            for file in files or ():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            files = None
        yield files


def start(command: Sequence[str], logs: Sequence[IO[bytes]], environment: dict[str, str]) -> Process:
    """Start a command in a session of its own, where a Ctrl-C does not reach it.

    Its output goes into the first one of the locked logs of its runs; the others name that one.
    """
    first, *others = logs
    for log in logs:
        pointer = "" if log is first else f"{first.name} has its output\n"
        log.write(f"$ {shlex.join(command)}\n{pointer}".encode())
        log.flush()
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=first,
        stderr=subprocess.STDOUT,
        pass_fds=[log.fileno() for log in others],
        env=environment,
        start_new_session=True,
    )


def stop(processes: Sequence[Process]) -> None:
    """Make processes save and end, and wait for them; a second signal meanwhile kills them."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        raise


def slot_environment(slot: int, slots: int, config: RunConfig | None) -> dict[str, str]:
    """Return the environment of the process in a slot: its share of the CPU threads and one of the GPUs.

    The number of threads that the user has set stays, and so does a device that the settings name.
    """
    variables = dict(os.environ)
    if slots > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, default_threads() // slots)))
    gpus = torch.cuda.device_count()
    if gpus > 1 and config and config.execution.device in ("auto", "cuda"):
        visible = variables.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    return variables
