"""Signals that are held back until the end of a step, so that a run is saved before they act."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAVING = (signal.SIGUSR1, signal.SIGUSR2)
# Found here: between a fork and the next program nothing is to be loaded.
PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if os.name == "posix" else None


class Terminated(SystemExit):
    """SIGTERM arrived; a program that does not catch it ends with status 143."""

    def __init__(self, line: str = "terminated") -> None:
        super().__init__(line)
        self.code = 128 + signal.SIGTERM


class Interrupted(KeyboardInterrupt):
    """SIGINT arrived, and the run was saved."""


def terminate(*_: object) -> None:
    """Turn SIGTERM into an exception, so that what is open is closed."""
    raise Terminated


def end_with_parent() -> None:
    """Have this process get SIGTERM when the one that started it dies, whatever killed that; on Linux only."""
    if PRCTL:
        PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class SignalRequests:
    """Requests of signals that wait to be handled.

    Attributes:
        stopping: SIGINT or SIGTERM, whichever came first; None: neither.
        saving: Whether SIGUSR1 or SIGUSR2 asked for a checkpoint.
        insistent: Whether a second stopping signal of the same kind acts at once.
    """

    def __init__(self) -> None:
        self.stopping: int | None = None
        self.saving = False
        self.insistent = True
        self.before: dict[int, Any] = {}

    def hold(self, number: int, frame: FrameType | None) -> None:
        """Record a signal, or act at once if it insists."""
        if number in SAVING:
            self.saving = True
        elif self.stopping == number and self.insistent:
            self.act("at once; what was saved before is kept", frame)
        else:
            self.stopping = self.stopping or number

    def act(self, line: str, frame: FrameType | None = None) -> None:
        """Raise KeyboardInterrupt or SystemExit 143 with a line about the run, or call the program's own handler."""
        number = self.stopping or signal.SIGINT
        handler = self.before.get(number, signal.SIG_DFL)
        if number == signal.SIGINT and handler in (signal.SIG_DFL, signal.default_int_handler):
            raise Interrupted(f"interrupted {line}")
        if number == signal.SIGTERM and handler in (signal.SIG_DFL, terminate):
            raise Terminated(f"terminated {line}")
        handler(number, frame)
        self.stopping = None


@contextlib.contextmanager
def defer_signals() -> Iterator[SignalRequests]:
    """Hold SIGINT and SIGTERM back, and take SIGUSR1 and SIGUSR2 as requests to save, within a `with` block.

    A signal that is ignored stays ignored, and a program's own handlers of SIGUSR1 and SIGUSR2 stay. Outside the main
    thread, which alone may set handlers, nothing changes.
    """
    pending = SignalRequests()
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING + SAVING:
            handler = signal.getsignal(number)
            if handler is signal.SIG_DFL or (number in STOPPING and callable(handler)):
                pending.before[number] = handler
                signal.signal(number, pending.hold)
    try:
        yield pending
    finally:
        for held, handler in pending.before.items():
            signal.signal(held, handler)
