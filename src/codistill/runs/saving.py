"""Write checkpoints and metrics of a run, and tell its trackers, on a thread beside the training."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import KeyPath, tree_map_with_path

from codistill.core.console import warn
from codistill.core.errors import CodistillError, ResourceError, reason
from codistill.core.extras import missing_package
from codistill.core.files import system_error
from codistill.core.imports import resuming
from codistill.runs.folder import RunFolder
from codistill.runs.state import TrainingState


class HostCopies:
    """Copies of tensors on the host, made while the device works on; a copy is whole once the host has waited.

    The copies of one call are overwritten by the next.
    """

    def __init__(self) -> None:
        self._buffers: dict[KeyPath, Tensor] = {}

    def copy(self, tree: Any) -> Any:
        """Copy every tensor in nested dicts and lists."""
        return tree_map_with_path(self._copied, tree)

    def _copied(self, place: KeyPath, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            pinned = value.device.type == "cuda"
            buffer = torch.empty_like(value, device="cpu", pin_memory=pinned, requires_grad=False)
            self._buffers[place] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)


class Tracker(Protocol):
    """Somebody who is told of a run's epochs, on the thread that writes; where it fails, a warning says so once."""

    name: str

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl."""

    def pictures(self, images: npt.NDArray[np.uint8]) -> None:
        """Take training images as the networks see them, [image, height, width, 3], before the first epoch."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Take what summary.json is about to hold."""

    def close(self) -> None:
        """Write what is left; the run may have ended early."""


class Saver:
    """Write one run's checkpoints and metrics.jsonl, and tell its trackers, one after the other beside the training.

    Where the disk is full or fails, a warning says so, the run goes on, and the next write makes up for it.
    """

    def __init__(self, run: RunFolder, trackers: Iterable[Tracker] = ()) -> None:
        self.run = run
        self._trackers = list(trackers)
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="codistill-saver")
        self._under_way: Future[None] | None = None
        self._unsaved: TrainingState | None = None
        self._unwritten: Sequence[Mapping[str, Any]] | None = None
        self._warned: set[str] = set()
        self._failed: dict[str, Exception] = {}

    def copy(self, state: TrainingState) -> TrainingState:
        """Copy the tensors of a state to the host, without waiting for the device."""
        self.flush()
        parts = {name: getattr(state, name) for name in ("method", "momentum", "sums", "finite", "ema")}
        return dataclasses.replace(state, **self._copies.copy(parts))

    def save(self, state: TrainingState) -> None:
        """Begin to write a checkpoint of what `copy` returned."""
        self._begin(partial(self._save, state))

    def log(self, state: TrainingState) -> None:
        """Begin to write a completed epoch of what `copy` returned: checkpoint, line of metrics.jsonl, trackers."""

        def write() -> None:
            self._save(state)
            self._write_metrics(state.rows)
            self._tell("epoch", state.rows[-1])

        self._begin(write)

    def flush(self) -> None:
        """Wait until everything that was begun is written."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def finish(self) -> CodistillError | None:
        """Try again what failed; return the error to end with where the metrics are lost and the rest is whole.

        Raises:
            ResourceError: The last checkpoint cannot be written; UsageError, where its place is the reason.
        """
        self.flush()
        path = self.run.path
        if self._unsaved is not None:
            self._save(self._unsaved)
        if self._unsaved is not None:
            fix = f"; then: {resuming(path)}"
            raise self._error("checkpoint", f"{path}: the last checkpoint could not be written", fix)
        if self._unwritten is not None:
            self._write_metrics(self._unwritten)
        if self._unwritten is None:
            return None
        lost = f"{path}/metrics.jsonl could not be written; the checkpoints are whole and hold it"
        return self._error("metrics.jsonl", lost)

    def _error(self, what: str, words: str, then: str = "") -> CodistillError:
        """Return the error of something that could not be written in the end, with the reason."""
        reason = self._failed[what]
        error = system_error(reason) if isinstance(reason, OSError) else ResourceError(str(reason))
        return type(error)(f"{words}: {error}{then}")

    def close(self) -> None:
        """End the thread once everything that was begun is written."""
        self._thread.submit(partial(self._tell, "close"))
        self._thread.shutdown()

    def tell(self, what: str, about: Any) -> None:
        """Begin to tell the trackers of something else than an epoch: a method of `Tracker` and its argument."""
        self._begin(partial(self._tell, what, about))

    def _tell(self, what: str, *about: Any) -> None:
        for tracker in self._trackers:
            self._tried(tracker.name, partial(getattr(tracker, what), *about), tracker=True)

    def _begin(self, write: Callable[[], None]) -> None:
        self.flush()
        self._under_way = self._thread.submit(write)

    def _tried(self, what: str, write: Callable[[], None], tracker: bool = False) -> bool:
        """Write, and return whether it worked; warn of the first failure of a kind."""
        try:
            write()
        except Exception as error:
            # Whatever fails within the libraries of trackers costs no run.
            if not isinstance(error, (OSError, MemoryError, ResourceError)) and not tracker:
                raise
            self._failed[what] = error
            if what not in self._warned:
                self._warned.add(what)
                why = missing_package(error) or reason(error)
                warn(f"{self.run.path}: {what} not written: {why}; training goes on and will try again")
            return False
        return True

    def _save(self, state: TrainingState) -> None:
        saved = self._tried("checkpoint", partial(self.run.checkpoints.save, state))
        if saved:
            self._warned.discard("checkpoint")
        self._unsaved = None if saved else state

    def _write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        add, rewrite = partial(self.run.append_metrics, rows[-1]), partial(self.run.write_metrics, rows)
        write = add if self._unwritten is None else rewrite
        self._unwritten = None if self._tried("metrics.jsonl", write) else rows
