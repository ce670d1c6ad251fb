"""One training step: plain PyTorch, and the same captured as a CUDA graph behind the same signature."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from codistill.data.augment import Augmentation, Batch, DeviceImages
from codistill.device import autocast
from codistill.methods import Method
from codistill.metrics import TermSums

WARM_UP_STEPS = 3


class Step(Protocol):
    """What the loop calls: train on a batch, add its loss terms to `sums`; the loop cannot tell steps apart."""

    method: Method
    images: DeviceImages
    augmentation: Augmentation
    optimizer: torch.optim.Optimizer
    sums: TermSums

    def __call__(self, batch: Batch, progress: Float[Tensor, ""]) -> None:
        """Train on a batch."""


class PlainStep:
    """Gather, augment, forward, losses, one backward, one optimiser step; no host read.

    Args:
        method: What is trained, in training mode and on the device of the images.
        images: The training split.
        augmentation: Crops and flips; the same as the batches were drawn with.
        optimizer: Over `Method.parameter_groups`.
        precision: float32, or bf16 for autocast in the forward pass; losses are computed in float32 in any case.
    """

    def __init__(
        self,
        method: Method,
        images: DeviceImages,
        augmentation: Augmentation,
        optimizer: torch.optim.Optimizer,
        precision: str = "float32",
    ) -> None:
        self.method = method
        self.images = images
        self.augmentation = augmentation
        self.optimizer = optimizer
        self.precision = precision
        self.sums = TermSums(images.labels.device)

    def __call__(self, batch: Batch, progress: Float[Tensor, ""]) -> None:
        """Train on a batch and add its loss terms to `sums`."""
        count = batch.image.shape[-1]
        images, labels = self.images.augmented(Batch(*(table.flatten() for table in batch)), self.augmentation)
        images, labels = images.reshape(*batch.image.shape, *images.shape[1:]), labels[:count]
        turns: Sequence[Sequence[Tensor] | None] = self.method.turns() or [None]
        for parameters in turns:
            terms = self.terms(images, labels, progress)
            total = torch.stack(list(terms.values())).sum()
            total.backward(inputs=parameters)  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()
        self.sums.update(terms, count)

    def terms(self, images: Tensor, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        """Run the method and compute its losses."""
        with autocast(labels.device, self.precision):
            outputs = self.method(images)
        return self.method.losses(outputs, labels, progress)


class CapturedStep:
    """A plain step as one CUDA graph per batch size.

    The first calls with a size run plainly, on the stream that is captured later: they are real training steps, and
    make cuDNN, the compiler and the allocator ready. Then the step is captured, and from then on replayed.

    Args:
        plain: The step; everything that it touches stays where it is in memory.
        warm_up: How many calls of a size run plainly.
    """

    def __init__(self, plain: PlainStep, warm_up: int = WARM_UP_STEPS) -> None:
        self.plain = plain
        self.method, self.images, self.augmentation = plain.method, plain.images, plain.augmentation
        self.optimizer, self.sums = plain.optimizer, plain.sums
        self.warm_up = warm_up
        self.device = plain.images.labels.device
        if plain.method.parallel_branches:
            plain.method.cohort.run_branches_on_streams(self.device)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._progress = torch.zeros((), device=self.device)
        self._calls: dict[int, int] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Batch]] = {}

    def __call__(self, batch: Batch, progress: Float[Tensor, ""]) -> None:
        """Train on a batch and add its loss terms to `sums`."""
        size = batch.image.shape[-1]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._progress.copy_(progress)
            if size not in self._graphs and self._calls.get(size, 0) < self.warm_up:
                self._calls[size] = self._calls.get(size, 0) + 1
                self.plain(batch, self._progress)
            else:
                if size not in self._graphs:
                    self._graphs[size] = self._capture(batch)
                graph, static = self._graphs[size]
                for target, source in zip(static, batch, strict=True):
                    target.copy_(source)
                graph.replay()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch]:
        static = Batch(*(table.clone() for table in batch))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.plain(static, self._progress)
        return graph, static


def make_step(plain: PlainStep) -> Step:
    """Capture a step where it can be: on CUDA, and where the method allows it."""
    if plain.images.labels.device.type == "cuda" and plain.method.capturable:
        return CapturedStep(plain)
    return plain
