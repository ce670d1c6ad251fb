"""How long the first steps take, and a step that has become many times slower, which is said once."""

import statistics
import time
from pathlib import Path

import torch

from codistill.core.imports import resuming

FIRST = 20  # steps, whose median is the measure
TIMES = 8
SECONDS = 5.0


class Pace:
    """Watches the time from the end of one step of a run to that of the next, on a CPU."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.usual: float | None = None
        """Seconds of a step: median of the first ones, as soon as there are so many."""
        self._first: list[float] = []
        self._last: float | None = None
        self._slow: list[float] = []  # the last steps, while they are slow
        self._said = False

    def pause(self) -> None:
        """Leave out the time until the next step ends."""
        self._last = None

    def step(self) -> str | None:
        """Note the end of a step, and return the line of a warning where steps have been slow for some time."""
        now = time.monotonic()
        took, self._last = None if self._last is None else now - self._last, now
        if took is None or self._said:
            return None
        if len(self._first) < FIRST:
            self._first.append(took)
            self.usual = statistics.median(self._first) if len(self._first) == FIRST else None
            return None
        usual = statistics.median(self._first)
        self._slow = [*self._slow, took] if took > TIMES * usual else []
        # One alone may be a computer that slept.
        if len(self._slow) < 2 or sum(self._slow) <= SECONDS:
            return None
        self._said = True
        slow, threads = statistics.median(self._slow), torch.get_num_threads()
        again = f"{resuming(self._run)} --override threads={threads // 2}"
        fewer = f", or go on with fewer threads: Ctrl-C, then {again}"
        return (
            f"a step takes {slow:.2g} s, {slow / usual:.0f} times as long as the first ones: other programs may keep "
            f"the cores busy: stop them{fewer if threads > 1 else ''}"
        )
