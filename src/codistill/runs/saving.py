"""What a run writes while it trains: checkpoints, metrics and events, on a thread beside the training."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from codistill.core.console import warn
from codistill.core.errors import ResourceError
from codistill.evaluation.metrics import Scores
from codistill.runs.folder import RunFolder


class HostCopies:
    """Copies of tensors on the host that are made while the device works on; a copy is whole once the host has waited.

    The copies of one call are overwritten by the next.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str | int, ...], Tensor] = {}

    def copy(self, value: Any, place: tuple[str | int, ...] = ()) -> Any:
        """Copy every tensor in nested dicts and lists."""
        if isinstance(value, Tensor):
            buffer = self._buffers.get(place)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                pinned = value.device.type == "cuda"
                buffer = torch.empty_like(value, device="cpu", pin_memory=pinned, requires_grad=False)
                self._buffers[place] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self.copy(each, (*place, key)) for key, each in value.items()}
        if isinstance(value, list):
            return [self.copy(each, (*place, index)) for index, each in enumerate(value)]
        return value


class Saver:
    """Write one run's checkpoints, metrics.jsonl and events, one after the other, while the training goes on.

    Where the disk is full or fails, that is said in a warning, the run goes on, and the next write makes up for it.

    Args:
        run: Its folder.
        rows: Lines of metrics.jsonl that are there, without their ends.
    """

    def __init__(self, run: RunFolder, rows: Sequence[str] = ()) -> None:
        self.run = run
        self.rows = list(rows)
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="codistill-saver")
        self._under_way: Future[None] | None = None
        self._unsaved: Callable[[], None] | None = None
        self._metrics_lost = False
        self._board: SummaryWriter | None = None
        self._warned: set[str] = set()

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a state to the host, without waiting for the device."""
        self.settle()
        copied: dict[str, Any] = self._copies.copy(state)
        return copied

    def save(self, state: dict[str, Any], epoch: int, step: int = 0, best: bool = False) -> None:
        """Begin to write a checkpoint of a state that `copy` gave; see `CheckpointStore.save`."""
        whole = {**state, "rows": list(self.rows)}
        self._begin(lambda: self._save(whole, epoch, step, best))

    def log(self, row: Mapping[str, Any], state: dict[str, Any], best: bool) -> None:
        """Begin to write an epoch: its checkpoint, its line of metrics.jsonl, its events.

        Args:
            row: The line; `epoch` counts from 0.
            state: What `copy` gave.
            best: Whether it is the best so far.
        """
        self.rows.append(json.dumps(row, allow_nan=False))
        whole = {**state, "rows": list(self.rows)}

        def write() -> None:
            self._save(whole, row["epoch"] + 1, 0, best)
            self._write_metrics()
            self._tried("events", lambda: self._write_events(row))

        self._begin(write)

    def settle(self) -> None:
        """Wait until everything is written that was begun."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def finish(self) -> ResourceError | None:
        """Make sure of the last checkpoint and of all metrics, trying again what failed.

        Returns:
            What to end with where the metrics are lost and the rest is whole.

        Raises:
            ResourceError: The last checkpoint cannot be written.
        """
        self.settle()
        path = self.run.path
        if self._unsaved is not None:
            self._unsaved()
        if self._unsaved is not None:
            raise ResourceError(
                f"{path}: the last checkpoint could not be written: free some space, then: codistill resume {path}"
            )
        if self._metrics_lost:
            self._write_metrics()
        if self._metrics_lost:
            return ResourceError(f"{path}/metrics.jsonl could not be written; the checkpoints are whole and hold it")
        return None

    def close(self) -> None:
        """End the thread once it has written what it is at."""
        self._thread.shutdown()
        if self._board is not None:
            self._tried("events", self._board.close)

    def _begin(self, write: Callable[[], None]) -> None:
        self.settle()
        self._under_way = self._thread.submit(write)

    def _tried(self, what: str, write: Callable[[], None]) -> bool:
        """Write, and say whether it worked; the first failure of a kind is worth a warning."""
        try:
            write()
        except (OSError, MemoryError) as error:
            if what not in self._warned:
                self._warned.add(what)
                reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
                warn(f"{self.run.path}: {what} not written: {reason}; training goes on and will try again")
            return False
        return True

    def _save(self, state: dict[str, Any], epoch: int, step: int, best: bool) -> None:
        saved = self._tried("checkpoint", lambda: self.run.checkpoints.save(state, epoch, best, step))
        if saved:
            self._warned.discard("checkpoint")
        self._unsaved = None if saved else lambda: self._save(state, epoch, step, best)

    def _write_metrics(self) -> None:
        write = self.run.write_metrics if self._metrics_lost else self.run.append_metrics
        self._metrics_lost = not self._tried("metrics.jsonl", lambda: write(self.rows))

    def _write_events(self, row: Mapping[str, Any]) -> None:
        if self._board is None:
            self._board = SummaryWriter(str(Path(self.run.path) / "tensorboard"), purge_step=row["epoch"] + 1)
        write_events(self._board, row)
        self._board.flush()


def write_events(board: SummaryWriter, row: Mapping[str, Any]) -> None:
    """Write a row of metrics.jsonl as TensorBoard scalars: train/<term>, test/<predictor>/<score>."""
    step = row["epoch"] + 1
    for name, value in row["train"].items():
        board.add_scalar(f"train/{name.replace('->', '_to_')}", value, step)
    for split in ("validation", "test"):
        for predictor, scores in row.get(split, {}).items():
            for name in (field.name for field in fields(Scores)):
                board.add_scalar(f"{split}/{predictor}/{name}", scores[name], step)
    for name in ("disagreement", "kl"):
        board.add_scalar(f"diversity/{name}", row["diversity"][name], step)
    board.add_scalar("train/learning_rate", row["learning_rate"], step)
    board.add_scalar("train/images_per_second", row["images_per_second"], step)
