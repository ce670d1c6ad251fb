"""The part of a run on several processes that all of them but the first have: to train, and nothing else."""

from collections.abc import Callable, Sequence
from typing import Any

from codistill.loop import Loop


class Follower(Loop):
    """The state of a training that rank 0 evaluates, judges and writes.

    What ends rank 0 ends this one too, at its next exchange.
    """

    def evaluate(self, between: Callable[[], None]) -> None:
        """Wait for rank 0."""
        between()

    def state(self, step: int = 0) -> dict[str, Any]:
        """Give nothing: rank 0 has the same."""
        return {}

    def save_inside(self, epoch: int, step: int) -> None:
        """Leave it to rank 0."""

    def end_epoch(self, epoch: int, numbers: Sequence[Sequence[float]], state: dict[str, Any]) -> None:
        """Forget what has been summed."""
        self.step.sums.reset()
        self.step.watch.reset()

    def finish(self, seconds: float) -> None:
        """Leave it to rank 0."""
