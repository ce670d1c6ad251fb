"""Engines that run the commands of a sweep; each has one method, `run`."""

import contextlib
import fcntl
import os
import shlex
import subprocess
import time
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from codistill.core.host import default_threads

POLL_SECONDS = 0.1


class Job(Protocol):
    """What one process works on: a run, or several side by side."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def logs(self) -> list[Path]:
        """A file for each run, held locked as long as the process lives, whatever becomes of the one that started it.

        The process writes into the first one what it says, and the others name that one.
        """
        ...

    @property
    def choose_gpu(self) -> bool:
        """Whether the executor chooses the GPU."""
        ...

    def command(self) -> list[str]:
        """Give the command line.

        Called with the logs held when a process is about to start, so that it can look at what is there; of runs that
        it leaves to another job, `logs` has nothing afterwards.
        """
        ...

    def look(self) -> None:
        """See how the runs are getting on; called now and then while the process lives."""
        ...

    def say(self, line: str) -> None:
        """Show a person a line."""
        ...


J = TypeVar("J", bound=Job)


class Executor(Protocol):
    """What a sweep needs of an engine."""

    def run(self, jobs: deque[J], slots: int) -> Generator[tuple[J, int]]:
        """Work on jobs.

        Args:
            jobs: Taken from the left until none is left and none is running; more may be added meanwhile.
            slots: How many at a time.

        Yields:
            Each job when its process has ended, with the exit status, negative where a signal ended it. When closed
            before the end, it makes all processes save and end, and waits for them.
        """
        ...


class LocalExecutor:
    """Processes on this machine."""

    def run(self, jobs: deque[J], slots: int) -> Generator[tuple[J, int]]:
        """Work on jobs; see `Executor.run`."""
        held: dict[int, J] = {}
        running: dict[int, tuple[J, subprocess.Popen[bytes]]] = {}
        try:
            while jobs or held or running:
                for slot in range(slots):
                    if slot in running or not (slot in held or jobs):
                        continue
                    job = held[slot] if slot in held else jobs.popleft()
                    process = start(job, slot, slots)
                    if process is not None:
                        held.pop(slot, None)
                        running[slot] = job, process
                    elif slot not in held:
                        held[slot] = job
                        job.say(f"{job.name}: waits for a process of an earlier sweep that still works on it")
                time.sleep(POLL_SECONDS)
                for slot, (job, process) in list(running.items()):
                    job.look()
                    status = process.poll()
                    if status is not None:
                        del running[slot]
                        yield job, status
        finally:
            stop([process for _, process in running.values()])


def start(job: Job, slot: int, slots: int) -> subprocess.Popen[bytes] | None:
    """Start the process of a job in a session of its own, where a Ctrl-C does not reach it.

    Returns:
        The process; None where one that was started before still holds a log.
    """
    with contextlib.ExitStack() as opened:
        files = {log: opened.enter_context(open(log, "ab")) for log in job.logs}
        try:
            # The process gets the locks with the open files, and the kernel gives them back when the process ends.
            for file in files.values():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        command = job.command()
        first, *others = job.logs
        for log in job.logs:
            said = "" if log == first else f"{first} has what it says\n"
            files[log].write(f"$ {shlex.join(command)}\n{said}".encode())
            files[log].flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=files[first],
            stderr=subprocess.STDOUT,
            pass_fds=[files[log].fileno() for log in others],
            env=environment(job, slot, slots),
            start_new_session=True,
        )


def environment(job: Job, slot: int, slots: int) -> dict[str, str]:
    """Share CPU threads and GPUs between the slots, unless the user has set the number of threads."""
    variables = dict(os.environ)
    if slots > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, default_threads() // slots)))
    gpus = torch.cuda.device_count()
    if gpus > 1 and job.choose_gpu:
        visible = variables.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    return variables


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let processes save and end, and wait for them; a second signal meanwhile ends them at once."""
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


EXECUTORS: dict[str, Executor] = {"local": LocalExecutor()}
