"""Engines that run the commands of a sweep; each has one method, `run`."""

import fcntl
import os
import shlex
import subprocess
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

POLL_SECONDS = 0.1


@dataclass(frozen=True, eq=False)
class Job:
    """A run that is to be worked on.

    Attributes:
        name: For people.
        command: Gives the command line; called when a process is about to start, so that it can look at what is there.
        log: Where the process writes what it says. It is held locked as long as the process lives, whatever becomes of
            the one that started it.
        say: Shows a person a line.
        choose_gpu: Whether the executor chooses the GPU.
    """

    name: str
    command: Callable[[], list[str]]
    log: Path
    say: Callable[[str], None]
    choose_gpu: bool = True


class Executor(Protocol):
    """What a sweep needs of an engine."""

    def run(self, jobs: deque[Job], slots: int) -> Generator[tuple[Job, int]]:
        """Work on jobs.

        Args:
            jobs: Taken from the left until none is left and none is running; the caller may add more meanwhile.
            slots: How many at a time.

        Yields:
            Each job when its process has ended, with the exit status, negative where a signal ended it. When closed
            before the end, it makes all processes save and end, and waits for them.
        """
        ...


class LocalExecutor:
    """Processes on this machine."""

    def run(self, jobs: deque[Job], slots: int) -> Generator[tuple[Job, int]]:
        """Work on jobs; see `Executor.run`."""
        held: dict[int, Job] = {}
        running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
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
                    status = process.poll()
                    if status is not None:
                        del running[slot]
                        yield job, status
        finally:
            stop([process for _, process in running.values()])


def start(job: Job, slot: int, slots: int) -> subprocess.Popen[bytes] | None:
    """Start the process of a job in a session of its own, where a Ctrl-C does not reach it.

    Returns:
        The process; None where one that was started before still holds the log.
    """
    with open(job.log, "ab") as log:
        try:
            # The process gets the lock with the open file, and the kernel gives it back when the process ends.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        command = job.command()
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(job, slot, slots),
            start_new_session=True,
        )


def environment(job: Job, slot: int, slots: int) -> dict[str, str]:
    """Share CPU threads and GPUs between the slots, unless the user has set the number of threads."""
    variables = dict(os.environ)
    if slots > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // slots)))
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
