"""One run on several processes of a machine: each has its part of every batch, and gradients are averaged over all."""

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.data.augment import BatchIndices

# How long a rank that has lost another one waits for its end, in seconds: the launcher is to see the other one first.
GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run; rank 0 evaluates, writes and prints.

    Attributes:
        number: This process among them, from 0.
        count: How many there are; 1: no process group is needed.
    """

    number: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, writes and prints."""
        return self.number == 0

    def part(self, batch: BatchIndices) -> BatchIndices:
        """Take this process's part of a batch: contiguous, and of all parts none is larger by more than an image."""
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
        with exchange():
            dist.all_reduce(bucket)
        means = torch.split(bucket, [each.numel() for each in tensors])
        for each, mean in zip(tensors, means, strict=True):
            each.detach().copy_(mean.view(each.shape))

    def largest(self, *numbers: int) -> list[int]:
        """Give the largest value that each of some numbers has in any process."""
        if self.count == 1:
            return list(numbers)
        agreed = torch.tensor(numbers)
        with exchange():
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return [int(each) for each in agreed.tolist()]

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Let rank 0 do something, and then the others."""
        if not self.leads:
            self.largest(0)
        yield
        if self.leads:
            self.largest(0)


ALONE = Ranks()


@contextlib.contextmanager
def exchange() -> Iterator[None]:
    """Exchange something with the other processes; where one of them is lost, wait to be ended.

    The launcher ends all as soon as it sees that one has failed. It must not be this one that it sees first.
    """
    try:
        yield
    except RuntimeError:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SECONDS)
        raise


def one_device_each(device: torch.device, processes: int) -> None:
    """Refuse to train on fewer GPUs than processes.

    Raises:
        UsageError: Too few, or one of them chosen by its number.
    """
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(f"device {device}: {processes} processes use a GPU each: choose --device cuda or cpu")
        gpus = torch.cuda.device_count()
        if gpus < processes:
            raise UsageError(
                f"processes is {processes}, but this machine has {gpus} CUDA devices, and each process needs one: "
                f"use --processes {gpus} or --device cpu"
            )
