"""One run on several processes that torchrun starts: each trains on its part of every batch, gradients are averaged."""

import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from codistill.core.device import choose_device
from codistill.core.errors import CodistillError, UsageError, WorkerError
from codistill.core.signals import Terminated
from codistill.core.torchrun import world_size
from codistill.data.augment import BatchIndices
from codistill.settings.config import ExecutionSettings

T = TypeVar("T")
# One that died before it joined is noticed by time alone; later, the end of a process is noticed at once. Rank 0 may
# download data, and evaluates alone.
JOIN, PATIENCE = timedelta(minutes=2), timedelta(hours=2)


@dataclass
class Ranks:
    """The processes that share a run; rank 0 evaluates, writes and prints."""

    number: int = 0
    count: int = 1
    gradients: Any = None  # on CUDA the NCCL group for gradients; None: the default one, gloo

    @classmethod
    @contextlib.contextmanager
    def from_environment(cls) -> Iterator["Ranks"]:
        """Join the processes that torchrun started, and leave them at the end; without torchrun yield `ALONE`."""
        if world_size() == 1:
            yield ALONE
            return
        ranks = cls(int(os.environ["RANK"]), world_size())
        with ranks._noticing_loss():
            store = next(rendezvous("env://", timeout=JOIN))[0]
            store = PrefixStore(fresh_name(store, ranks.number, ranks.count), store)
            dist.init_process_group("gloo", store=store, rank=ranks.number, world_size=ranks.count, timeout=JOIN)
            dist.group.WORLD.set_timeout(PATIENCE)  # type: ignore[union-attr]
        try:
            yield ranks
        except (KeyboardInterrupt, Terminated) as stopped:
            if ranks.leads:  # all ranks stop after the same step, and rank 0 says so
                raise
            raise SystemExit(143 if isinstance(stopped, Terminated) else 130) from None
        except WorkerError:
            if ranks.gradients is not None:
                ranks.gradients.abort()  # or this process would wait on its GPU for the lost one
            raise
        finally:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, writes and prints."""
        return self.number == 0

    def choose_device(self, settings: ExecutionSettings) -> torch.device:
        """Return this process's device: on CUDA the GPU of its number on this machine."""
        with self.together():
            device = choose_device(settings.device, settings.precision)
            if self.count > 1 and device.type == "cuda":
                here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
                if device.index is not None or gpus < here:
                    raise UsageError(
                        f"device {settings.device}: {here} ranks on {socket.gethostname()} need a GPU each of its "
                        f"{gpus}: use --nproc-per-node {gpus} with --device cuda, or --device cpu"
                    )
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        with self.together():
            if len({each.type for each in self.gathered(device)}) > 1:
                raise UsageError("some machines have a GPU and others have none: use --device cpu")
        if self.count > 1 and device.type == "cuda":
            torch.cuda.set_device(device)
            self.gradients = dist.new_group(backend="nccl", timeout=PATIENCE)
        return device

    def part(self, batch: BatchIndices) -> BatchIndices:
        """Return this process's part of a batch: contiguous, and of all parts none is larger by more than an image."""
        if self.count == 1:
            return batch
        size = batch.image.shape[-1]
        return batch.part(size * self.number // self.count, size * (self.number + 1) // self.count)

    def average(self, tensors: Sequence[Tensor], share: float) -> None:
        """Replace tensors by their means over all processes in one exchange; their shares as weights add up to 1."""
        if self.count == 1:
            return
        bucket = torch.cat([each.detach().flatten() for each in tensors]) * share
        with self._noticing_loss():
            dist.all_reduce(bucket, group=self.gradients)
        for each, mean in zip(tensors, torch.split(bucket, [each.numel() for each in tensors]), strict=True):
            each.detach().copy_(mean.view(each.shape))

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest value that each of some numbers has in any process."""
        if self.count == 1:
            return list(numbers)
        agreed = torch.tensor(numbers)
        with self._noticing_loss():
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return [int(each) for each in agreed.tolist()]

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with self._noticing_loss():
                dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Fail in all processes where the block fails in one; all must enter it, and not within another one.

        Rank 0 raises the error of the first rank that raised one; the others exit with its status.
        """
        own: CodistillError | None = None
        try:
            yield
        except CodistillError as error:
            own = error
        for number, first in enumerate(self.gathered(own)):
            if first is not None and self.leads:
                raise own or type(first)(f"rank {number}: {first}")
            if first is not None:
                raise SystemExit(first.exit_status)

    def from_leader(self, make: Callable[[], T]) -> T:
        """Return in all processes what rank 0 makes; it is pickled, and its error is that of all."""
        with self.together():
            made: list[Any] = [make() if self.leads else None]
        if self.count > 1:
            with self._noticing_loss():
                dist.broadcast_object_list(made, src=0)
        return cast(T, made[0])

    def in_turn(self, make: Callable[[], T]) -> T:
        """Return what this process makes, rank 0 before the others: data are downloaded and cached once."""
        for leads in (True, False):
            with self.together():
                if self.leads is leads:
                    result = make()
        return result

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


def fresh_name(store: Store, number: int, count: int) -> str:
    """Agree on a name below which nothing is in torchrun's store, which keeps addresses of ranks over a restart.

    Rank 0 proposes a name and answers each rank that repeats it; one of an earlier start does not answer.
    """
    own = uuid.uuid4().hex
    if number == 0:
        store.set("codistill", own)
        for other in range(1, count):
            store.set(f"{own}/{other}/{store.get(f'{own}/{other}').decode()}", "")
        return own
    for _ in range(JOIN.seconds):
        name: str = store.get("codistill").decode()
        store.set(f"{name}/{number}", own)
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"{name}/{number}/{own}"], timedelta(seconds=1))
            return name
    raise RuntimeError("rank 0 did not come")
