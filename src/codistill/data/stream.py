"""Images that stay in their file: batches are read ahead by a thread, in the order in which training takes them.

The results are those of images in memory, bit for bit. On CUDA batches go through pinned memory; this has run on a
pretended GPU only, never on a real one.
"""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from codistill.core.console import note
from codistill.core.errors import ResourceError, UsageError
from codistill.core.host import free_memory
from codistill.data.affine import Statistics
from codistill.data.augment import BatchIndices, DeviceImages
from codistill.data.dataset import Dataset, Split
from codistill.data.mapped import RowReader, is_mapped

AHEAD = 2  # batches that are read while one is used
SHARE = 0.5  # of the free memory, which images in memory may take

Streaming = Literal["auto", "on", "off"]


def on_device(split: Split, statistics: Statistics, device: torch.device, stream: Streaming = "auto") -> DeviceImages:
    """Put a split on a device, or have it streamed from its file, if it is mapped, where it would take too much memory.

    On a GPU only where that is asked for: streaming to one has not been run yet.

    Raises:
        ResourceError: The images are not to be streamed, and do not fit into memory.
    """
    wanted, free = split.images.nbytes, free_on(device)
    sizes = f"{wanted / 1e9:.1f} GB of images, and {free / 1e9:.1f} GB of memory are free"
    mapped = is_mapped(split.images) and wanted > 0
    auto = stream == "auto" and device.type == "cpu"
    if mapped and (stream == "on" or (auto and wanted > SHARE * free)):
        if auto:
            note(f"{sizes}: they are read from the file of decoded images during training (--stream)")
        return StreamedImages(split, statistics, device)
    if mapped and wanted > free:
        raise ResourceError(f"{sizes}: with --stream on they are read during training")
    return DeviceImages(split, statistics, device)


def check_streaming(data: Dataset, stream: Streaming) -> None:
    """Refuse to stream training images that have no file."""
    if stream == "on" and not is_mapped(data.train.images):
        fix = "leave out --stream on, or name a folder for decoded image files with --data-cache"
        raise UsageError(f"data set {data.name} is in memory, and has no file to stream it from: {fix}")


def free_on(device: torch.device) -> float:
    """Return the free memory of a device, bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


class StreamedImages(DeviceImages):
    """A split whose images stay in a mapped file; only those of a batch are on the device."""

    streams = True

    def __init__(self, split: Split, statistics: Statistics, device: torch.device) -> None:
        super().__init__(Split(split.images[:0], split.labels, split.files), statistics, device)
        self._reader = RowReader(split.images)  # type: ignore[arg-type]
        self._all_labels = self.labels

    def for_steps(self, size: int) -> "StreamedImages":
        """Return the images with a place on the device for batches of at most that size, which stays where it is."""
        part = copy.copy(self)
        part.images = torch.zeros((size, *self.images.shape[1:]), dtype=torch.uint8, device=self.device)
        part.labels = torch.zeros(size, dtype=torch.int64, device=self.device)
        return part

    def __len__(self) -> int:
        return len(self._all_labels if self.positions is None else self.positions)

    def batch(self, start: int, stop: int) -> tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]:
        """Return used images from `start` to before `stop`; see `DeviceImages.batch`."""
        return next(self._scored([(start, min(stop, len(self)))]))

    def batches(self, size: int) -> Iterator[tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]]:
        """Yield all used images; see `DeviceImages.batches`."""
        return self._scored([(start, min(start + size, len(self))) for start in range(0, len(self), size)])

    def _scored(
        self, parts: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]]:
        used = torch.arange(len(self)) if self.positions is None else self.positions
        labels = self._all_labels if self._places is None else self._all_labels[self._places]
        for (start, stop), pixels in zip(parts, self._read([used[slice(*part)] for part in parts]), strict=True):
            yield self.normalised(pixels.to(self.device, non_blocking=True)), labels[start:stop]

    def staged(self, indices: BatchIndices, steps: Sequence[tuple[int, int]]) -> Iterator[BatchIndices]:
        """Yield the indices of each batch, when its images are in the place that `for_steps` has made; see there."""
        order = indices.image.reshape(-1, indices.image.shape[-1])[0]
        on_host = order.cpu()
        for (start, stop), pixels in zip(steps, self._read([on_host[slice(*step)] for step in steps]), strict=True):
            part, size = indices.part(start, stop), stop - start
            self.images[:size].copy_(pixels, non_blocking=True)
            self.labels[:size].copy_(self._all_labels[order[start:stop]])
            places = torch.arange(size, device=self.device).expand(part.image.shape).contiguous()
            yield part._replace(image=places)

    def _read(self, batches: Sequence[Int[Tensor, " batch"]]) -> Iterator[UInt8[Tensor, "batch height width 3"]]:
        """Yield images of some batches; each is to be copied, on the current stream, before the next is asked for."""
        on_gpu, most = self.device.type == "cuda", max(map(len, batches), default=0)
        shape = (most, *self.images.shape[1:])
        buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(AHEAD + 1)]
        copied = [torch.cuda.Event() if on_gpu else None for _ in buffers]  # type: ignore[no-untyped-call]

        def read(number: int) -> Tensor:
            event, rows = copied[number % len(buffers)], batches[number]
            if event is not None and number >= len(buffers):
                event.synchronize()
            buffer = buffers[number % len(buffers)][: len(rows)]
            self._reader.read(rows.tolist(), buffer.numpy())
            return buffer

        waiting: deque[Future[Tensor]] = deque()
        pool = ThreadPoolExecutor(1, "streaming")
        try:
            for number in range(len(batches)):
                for later in range(number + len(waiting), min(number + AHEAD + 1, len(batches))):
                    waiting.append(pool.submit(read, later))
                yield waiting.popleft().result()
                if (event := copied[number % len(buffers)]) is not None:
                    event.record()
        finally:
            pool.shutdown(cancel_futures=True)
