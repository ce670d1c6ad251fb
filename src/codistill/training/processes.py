"""Work in forked processes of this program, several at a time; what it has loaded and built is theirs too.

Each is forked by a thread that has computed nothing: the threads of OpenMP, which do not survive a fork, belong to the
thread that has started them.
"""

import contextlib
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NoReturn, TypeVar

import torch

from codistill.core.errors import CodistillError, WorkerError
from codistill.core.signals import SAVING, STOPPING, defer_signals, end_with_parent, terminate

T = TypeVar("T")
POLL_SECONDS = 0.1


def can_fork() -> bool:
    """Whether forked processes can compute: on Linux, where nothing has a GPU, whose threads do not survive a fork."""
    return sys.platform == "linux" and not torch.cuda.is_available()


def run_in_processes(
    works: Sequence[Callable[[], T]], processes: int, kept: Callable[[], str] = lambda: "before the first step"
) -> list[T | Exception]:
    """Do each work in a process of its own, so many at a time, and return what each returns or raises.

    A signal that stops this process is passed on once as SIGTERM, and waited for until all have ended; works that have
    not begun are left. A second one kills them. SIGUSR1 and SIGUSR2 are passed on.

    Args:
        works: Functions whose results can be pickled; each has SIGTERM and SIGINT as a command line has them.
        processes: How many at a time.
        kept: Returns what the line of a signal says after `interrupted`; nothing: it came too late to stop anything.

    Raises:
        Interrupted: SIGINT arrived; likewise Terminated.
    """
    children, told = Children(), False
    with ThreadPoolExecutor(processes) as pool, defer_signals() as requests:
        futures = [pool.submit(children.run, work) for work in works]
        try:
            while wait(futures, POLL_SECONDS).not_done:
                if requests.saving:
                    requests.saving = False
                    children.send(signal.SIGUSR1)
                if requests.stopping and not told:
                    told = True
                    for future in futures:
                        future.cancel()
                    children.send(signal.SIGTERM)
        except BaseException:
            for future in futures:
                future.cancel()
            children.send(signal.SIGKILL)
            raise
        if requests.stopping and (line := kept()):
            requests.act(line)
    return [future.result() for future in futures]


class Children:
    """Processes that this one has forked and that have not ended."""

    def __init__(self) -> None:
        self._pids: set[int] = set()
        self._forking = threading.Lock()

    def send(self, number: int) -> None:
        """Send a signal to all of them."""
        with self._forking:
            for pid in self._pids:
                os.kill(pid, number)

    def run(self, work: Callable[[], T]) -> T | Exception:
        """Do a work in a new process, and return what it returned or raised."""
        for stream in (sys.stdout, sys.stderr):  # or both processes would write what is in the buffers
            if stream is not None:
                stream.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until the new process has handlers of its own
        with self._forking, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: other threads hold no locks here
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                become_a_worker(work, writing)
            self._pids.add(pid)
            os.close(writing)
        with open(reading, "rb") as pipe:
            written = pipe.read()
        with self._forking:  # or a signal could reach whoever has its number next
            _, status = os.waitpid(pid, 0)
            self._pids.discard(pid)
        if not written:
            number = os.waitstatus_to_exitcode(status)
            how = f"killed by {signal.Signals(-number).name}" if number < 0 else f"ended with status {number}"
            return WorkerError(f"its process was {how}")
        outcome: T | Exception = pickle.loads(written)
        return outcome


def become_a_worker(work: Callable[[], Any], writing: int) -> NoReturn:
    """Do a work in a process that was just forked, write its outcome to a pipe, and end."""
    status = 1
    try:
        os.setsid()  # the Ctrl-C of a terminal reaches the parent alone
        end_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, terminate)
        for number in SAVING:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        try:
            outcome = work()
        except Exception as error:
            outcome = error
            error.add_note(traceback.format_exc())
        except BaseException:
            outcome = WorkerError("its process was stopped by a signal")
        try:
            written = pickle.dumps(outcome)
        except Exception:
            written = pickle.dumps(CodistillError(f"bug: {type(outcome).__name__}: {outcome}"))
        with open(writing, "wb") as pipe:
            pipe.write(written)
        status = 0
    finally:
        with contextlib.suppress(Exception):
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        os._exit(status)
