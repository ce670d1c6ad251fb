"""How a map is divided among the programs of the batch normalisation's kernels."""

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float
from torch import Tensor

MAX_PARTS = 128
"""Parts that the rows are divided into, at most: about one for each multiprocessor of a large GPU."""
MIN_TILE, MAX_TILE = 1024, 8192
"""Elements that a program holds at a time."""
MAX_BLOCK_CHANNELS = 64
WARPS = 8


@dataclass(frozen=True)
class Tiling:
    """How rows and channels are divided among programs; a pure function of the shape, so that sums keep their order.

    Attributes:
        rows: Batch times height times width.
        channels: C.
        part_rows: Rows of each part but the last, which may have fewer.
        block_rows: Rows that a program holds at a time, a power of two.
        block_channels: Channels of a program, a power of two.
    """

    rows: int
    channels: int
    part_rows: int
    block_rows: int
    block_channels: int

    @classmethod
    def of(cls, features: Float[Tensor, "batch channel height width"]) -> "Tiling":
        """Divide a map."""
        channels = features.shape[1]
        rows = features.numel() // channels
        block_channels = min(MAX_BLOCK_CHANNELS, triton.next_power_of_2(channels))
        share = triton.cdiv(rows, MAX_PARTS)
        block_rows = triton.next_power_of_2(share)
        block_rows = max(MIN_TILE // block_channels, min(block_rows, MAX_TILE // block_channels))
        return cls(rows, channels, triton.cdiv(share, block_rows) * block_rows, block_rows, block_channels)

    @property
    def parts(self) -> int:
        """How many parts there are, none of them empty."""
        return int(triton.cdiv(self.rows, self.part_rows))

    @property
    def grid(self) -> tuple[int, int]:
        """Programs over parts and over blocks of channels."""
        return self.parts, int(triton.cdiv(self.channels, self.block_channels))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What every kernel is told of the shape."""
        return self.rows, self.channels, self.part_rows

    @property
    def blocks(self) -> dict[str, int]:
        """Compile-time sizes of every kernel."""
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_CHANNELS": self.block_channels, "num_warps": WARPS}

    @property
    def block_parts(self) -> int:
        """Compile-time size of what joins the parts."""
        return int(triton.next_power_of_2(self.parts))

    def partial(self, like: Tensor) -> Float[Tensor, "2 parts channel"]:
        """Allocate room for two sums of each part and channel."""
        return like.new_empty(2, self.parts, self.channels, dtype=torch.float32)
