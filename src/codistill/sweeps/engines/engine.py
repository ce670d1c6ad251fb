"""What every engine of a sweep does, and the work that it starts: the command of a run, or of several.

It is imported on the nodes of a cluster, too: nothing here needs torch.
"""

import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from codistill.core.errors import WorkerError
from codistill.core.signals import end_with_parent

if TYPE_CHECKING:
    from codistill.sweeps.spec import PlannedRun

Process = subprocess.Popen[bytes]
NODE_SECONDS = 0.2
LOST = WorkerError.exit_status  # the exit status of a job that its engine lost; its log has the reason


class Engine:
    """Runs commands somewhere: nothing else differs between engines. Making one checks that it can be reached."""

    seconds = 0.1
    """Between two polls."""
    settings: Mapping[str, type] = {}
    """The settings that a spec may have in a table of the engine's name, each with its type."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Reach the engine for a sweep in a folder that may not exist yet; UsageError where that cannot be."""

    def room(self, runs: Sequence["PlannedRun"]) -> int:
        """Return how many jobs there is room for at a time, where the user does not say it."""
        return len(runs)

    def start(self, works: Sequence["Work"], logs: Sequence[Sequence[IO[bytes]]]) -> list[Any]:
        """Start jobs, whose logs are open and locked until this returns.

        Returns:
            For each an object whose `poll()` returns the exit status: None while it waits or runs, LOST, with a line in
            its log, where it has none.
        """
        raise NotImplementedError

    def stop(self, jobs: Sequence[Any]) -> None:
        """Make jobs save and end, and wait for them."""
        raise NotImplementedError

    def record(self, job: Any) -> str:
        """Return the name by which another sweep can ask for a job while it waits or runs, if there is one."""
        return ""

    def alive(self, record: str) -> bool:
        """Return whether a job that another sweep has started still waits or runs."""
        return False

    def close(self) -> None:
        """Leave the engine, with no job in it."""


@dataclass
class Work:
    """The runs of a job, by which each command follows from what their folders hold when it starts.

    Attributes:
        program: What is put before `train ..` and `resume ..`.
        runs: The folder and the recipe of each.
        logs: The log of each, the first of which has the output.
        more: Flags of both commands.
        data_dir: Where the data set is now.
        cwd: The folder in which the command is given.
        slot: Its place among the jobs that run at a time, counted from 0, and how many there are.
        device: Of the settings.
        variables: Of the environment, beside or in place of those on the node.
    """

    program: list[str]
    runs: list[tuple[str, str]]
    logs: list[str]
    more: list[str] = field(default_factory=list)
    data_dir: str | None = None
    cwd: str = field(default_factory=os.getcwd)
    slot: tuple[int, int] = (0, 1)
    device: str = "auto"
    variables: dict[str, str] = field(default_factory=dict)
    process: Process | None = None

    def command(self) -> list[str]:
        """Return the command that goes on: it resumes what was begun, or begins the rest; empty: all have ended."""
        left = [(folder, recipe) for folder, recipe in self.runs if not ended(Path(self.cwd, folder))]
        begun = [folder for folder, _ in left if Path(self.cwd, folder, "config.json").exists()]
        if begun:
            data_dir = ["--data-dir", self.data_dir] if self.data_dir else []
            return [*self.program, "resume", *begun, *data_dir, *self.more]
        if len(left) > 1:
            recipes, out = [recipe for _, recipe in left], str(Path(left[0][0]).parent)
            return [*self.program, "train", "--recipes", *recipes, "--out", out, *self.more]
        return [*self.program, "train", "--recipe", left[0][1], "--out", left[0][0], *self.more] if left else []

    def __call__(self) -> int:
        """Run the commands on the node of a cluster, one after the other; return the last one's exit status.

        Locks that the driver took on another machine do not reach it: it takes them itself, and waits for a process of
        an earlier job that still has them. Where it is stopped, its process saves.
        """
        status, before = 0, list[str]()
        with contextlib.ExitStack() as opened:
            logs = [opened.enter_context(open(Path(self.cwd, log), "ab")) for log in self.logs]
            for log in logs:
                fcntl.flock(log, fcntl.LOCK_EX)
            while status == 0 and (command := self.command()) and command != before:
                environment, before = {**os.environ, **self.variables}, command
                self.process = launch(command, logs, environment, self.cwd, end_with_parent)
                try:
                    while running(self.process):
                        time.sleep(NODE_SECONDS)
                finally:
                    status = self.halt()
        return status

    def halt(self) -> int:
        """Make the process save and end, if there is one that has not ended; return its exit status."""
        if self.process is None:
            return 0
        if running(self.process):
            self.process.terminate()
        while running(self.process):
            time.sleep(NODE_SECONDS)
        return self.process.wait()


def running(process: Process) -> bool:
    """Return whether a process runs, also from the handler of a signal that came while `Popen` was asked for it."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def lost(work: Work, reason: str) -> int:
    """Write into the log of a job why its engine lost it, and return the status for that."""
    with open(Path(work.cwd, work.logs[0]), "a", encoding="utf-8") as log:
        log.write(f"codistill: error: {reason}\n")
    return LOST


def ended(folder: Path) -> bool:
    """Return whether a run folder shows that the run is finished or has diverged."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("status") in (
            "finished",
            "diverged",
        )
    return False


@contextlib.contextmanager
def locked(logs: Sequence[Path]) -> Iterator[list[IO[bytes]] | None]:
    """Yield logs open for appending and locked; None where a process, maybe of another sweep, still holds one.

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


def launch(
    command: Sequence[str],
    logs: Sequence[IO[bytes]],
    environment: Mapping[str, str],
    cwd: str,
    first: Callable[[], None] | None = None,
) -> Process:
    """Start a command in a session of its own, where a Ctrl-C does not reach it.

    Its output goes into the first one of the locked logs of its runs; the others name that one.
    """
    output, *others = logs
    for log in logs:
        pointer = "" if log is output else f"{output.name} has its output\n"
        log.write(f"$ {shlex.join(command)}\n{pointer}".encode())
        log.flush()
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=[log.fileno() for log in others],
        env=environment,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=first,
    )
