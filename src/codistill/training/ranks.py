"""One run on several processes that torchrun starts: each trains on its part of every batch, gradients are averaged."""

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from codistill.core.device import choose_device
from codistill.core.errors import CodistillError, UsageError, WorkerError
from codistill.core.signals import Terminated
from codistill.data.augment import BatchIndices
from codistill.settings.config import ExecutionSettings, RunConfig

T = TypeVar("T")

JOIN = timedelta(minutes=2)
"""How long a rank waits at the start for the others, of which one may have died before it joined."""
PATIENCE = timedelta(hours=2)
"""How long a rank waits later: rank 0 may download data, and evaluates alone. The end of one is noticed at once."""
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
"""Environment variables that torchrun sets."""
joined = itertools.count()


@dataclass
class Ranks:
    """The processes that share a run; rank 0 evaluates, writes and prints.

    Attributes:
        number: This process among them, from 0.
        count: How many there are; 1: no process group is needed.
        restarts: How often torchrun has started them again after it lost one.
        control: Process group (gloo) for errors, signals and objects.
        gradients: Process group for gradients: NCCL on CUDA, else the same.
    """

    number: int = 0
    count: int = 1
    restarts: int = 0
    control: dist.ProcessGroup | None = None
    gradients: dist.ProcessGroup | None = None

    @classmethod
    @contextlib.contextmanager
    def from_environment(cls) -> Iterator["Ranks"]:
        """Join the processes that torchrun started, and leave them at the end; without torchrun yield `ALONE`.

        Raises:
            WorkerError: Another process did not come, or was lost.
        """
        if ranks_in_environment() == 1:
            yield ALONE
            return
        number, count = int(os.environ["RANK"]), ranks_in_environment()
        ranks = cls(number, count, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
        with ranks._noticing_loss():
            store = next(rendezvous("env://", timeout=JOIN))[0]
            # torchrun keeps its store over a restart, with the addresses of the processes before.
            store = PrefixStore(f"codistill/{ranks.restarts}/{next(joined)}", store)
            dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=JOIN)
            ranks.control = ranks.gradients = new_group("gloo")
        try:
            yield ranks
        except (KeyboardInterrupt, Terminated) as stopped:
            if ranks.leads:
                raise
            # All ranks stop after the same step, and rank 0 says so.
            raise SystemExit(143 if isinstance(stopped, Terminated) else 130) from None
        except WorkerError:
            if ranks.gradients is not None and ranks.gradients is not ranks.control:
                ranks.gradients.abort()  # or this process would wait on its GPU for the lost one
            raise
        finally:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, writes and prints."""
        return self.number == 0

    def facts(self) -> dict[str, Any]:
        """Return what config.json records: the number of ranks, and a name of torchrun's launch that restarts keep."""
        if self.count == 1:
            return {"ranks": 1}
        chosen = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return {"ranks": self.count, "launch": chosen if chosen != "none" else f"{socket.gethostname()} {os.getppid()}"}

    def choose_device(self, settings: ExecutionSettings) -> torch.device:
        """Return this process's device: on CUDA the GPU of its number on this machine.

        Raises:
            UsageError: No such device, or not one for each rank.
        """
        with self.together():
            device = choose_device(settings.device, settings.precision)
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
            if self.count > 1 and device.type == "cuda" and (device.index is not None or gpus < here):
                raise UsageError(
                    f"device {settings.device}: {here} ranks on {socket.gethostname()} need a GPU each of its {gpus}: "
                    f"use --nproc-per-node {gpus} with --device cuda, or --device cpu"
                )
        if self.count == 1:
            return device
        kinds = set(self._gathered(device.type))
        with self.together():
            if len(kinds) > 1:
                raise UsageError("some machines have a GPU and others have none: use --device cpu")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            self.gradients = new_group("nccl")
        return device

    def check_count(self, began: int, path: Path) -> None:
        """Refuse to resume a run on another number of ranks: batch statistics would be of parts of another size.

        Raises:
            UsageError: Says how to resume it.
        """
        if began != self.count:
            how = "without torchrun" if began == 1 else f"with torchrun on {began} processes"
            raise UsageError(
                f"{path} began on {began} ranks, and batch statistics are those of a rank: resume it {how}"
            )

    def check_parts(self, config: RunConfig, images: int) -> None:
        """Refuse what would be another experiment on several ranks, or too few images for batch statistics.

        Args:
            config: The run.
            images: Number of training images.

        Raises:
            UsageError: Names the setting to change.
        """
        size, least, needs = config.train.batch_size, 2 * self.count, config.method.needs_full_batch
        last = 0 if config.train.drop_last else images % size
        if self.count > 1 and needs:
            raise UsageError(f"{config.method_name} with {needs} needs the full batch in one process: omit torchrun")
        if self.count > 1 and size < least:
            raise UsageError(f"batch_size is {size}; {self.count} ranks need at least {least}, two images each")
        if self.count > 1 and 0 < last < least:
            raise UsageError(
                f"the last batch of {images} images would have {last}, too few for {self.count} ranks: "
                f"set drop_last or another batch_size than {size}"
            )

    def part(self, batch: BatchIndices) -> BatchIndices:
        """Return this process's part of a batch: contiguous, and of all parts none is larger by more than an image."""
        if self.count == 1:
            return batch
        size = batch.image.shape[-1]
        return batch.part(size * self.number // self.count, size * (self.number + 1) // self.count)

    def average(self, tensors: Sequence[Tensor], share: float) -> None:
        """Replace tensors by their weighted means over all processes, in place and with one exchange.

        Args:
            tensors: As many, and of the same shapes, in each process.
            share: This process's weight, from 0 to 1; all weights add up to 1.
        """
        if self.count == 1:
            return
        bucket = torch.cat([each.detach().flatten() for each in tensors]) * share
        with self._noticing_loss():
            dist.all_reduce(bucket, group=self.gradients)
        means = torch.split(bucket, [each.numel() for each in tensors])
        for each, mean in zip(tensors, means, strict=True):
            each.detach().copy_(mean.view(each.shape))

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest value that each of some numbers has in any process."""
        if self.count == 1:
            return list(numbers)
        agreed = torch.tensor(numbers)
        with self._noticing_loss():
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.control)
        return [int(each) for each in agreed.tolist()]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Fail in all processes where the block fails in one; all must enter it, and not within another one.

        Raises:
            CodistillError: In rank 0, of the first rank that raised one.
            SystemExit: In the others, with the same exit status.
        """
        own: CodistillError | None = None
        try:
            yield
        except CodistillError as error:
            own = error
        for number, first in enumerate(self._gathered(own)):
            if first is not None and self.leads:
                raise own or type(first)(f"rank {number}: {first}")
            if first is not None:
                raise SystemExit(first.exit_status)

    def from_leader(self, make: Callable[[], T]) -> T:
        """Return in all processes what rank 0 makes; it is pickled, and its error is that of all."""
        made: list[Any] = [None]
        with self.together():
            if self.leads:
                made = [make()]
        if self.count > 1:
            with self._noticing_loss():
                dist.broadcast_object_list(made, src=0, group=self.control)
        result: T = made[0]
        return result

    def in_turn(self, make: Callable[[], T]) -> T:
        """Return what this process makes, rank 0 before the others: data are downloaded and cached once."""
        for leads in (True, False):
            with self.together():
                if self.leads is leads:
                    result = make()
        return result

    def _gathered(self, value: T) -> list[T]:
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with self._noticing_loss():
                dist.all_gather_object(values, value, group=self.control)
        return values

    @contextlib.contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if threading.current_thread() is threading.main_thread():
                # torchrun is about to terminate the others; the status is to be that of the loss.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1)  # torchrun is to see the lost process first, and to name it
            raise WorkerError(
                f"rank {self.number} of {self.count} lost contact with another one: `codistill resume RUN` under "
                f"torchrun continues from the last checkpoint ({' '.join(str(error).split())[:200]})"
            ) from error


ALONE = Ranks()


def new_group(backend: str) -> dist.ProcessGroup:
    """Make a process group of all ranks."""
    group = dist.new_group(backend=backend, timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def ranks_in_environment() -> int:
    """Return how many processes torchrun has started for this program; 1 without torchrun."""
    known = all(os.environ.get(name, "").isdecimal() for name in NUMBERS)
    return int(os.environ["WORLD_SIZE"]) if known else 1


def refuse_ranks(what: str) -> None:
    """Refuse under torchrun what one process does.

    Raises:
        UsageError: torchrun has started several.
    """
    if ranks_in_environment() > 1:
        raise UsageError(f"{what}: for one process only: start it without torchrun")
