"""Signals that wait for the end of a step, so that they can be lost in no library's exception handler."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

DEFERRED = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back until the function that this gives is called; a second one acts at once.

    What then acts is the handler that was there before: KeyboardInterrupt for SIGINT as a rule, and whatever the
    program has set for SIGTERM. A signal without a handler in Python keeps its effect, and outside the main thread,
    which alone may set handlers, all do.
    """
    arrived: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], object]] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        if number in arrived:
            before[number](number, frame)
        arrived.append(number)

    def act() -> None:
        if arrived:
            before[arrived[0]](arrived[0], None)

    if threading.current_thread() is threading.main_thread():
        for number in DEFERRED:
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, hold)
    try:
        yield act
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
