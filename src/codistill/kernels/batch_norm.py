"""Training-mode batch normalisation, addition of a shortcut and ReLU as two Triton kernels forward and two backward.

Activations are read as a matrix of rows (batch, height, width) by channels, which is how channels_last lies in memory.
Rows are divided into parts. The first kernel of each direction sums over the rows of a part, the second one adds up the
parts of its channels again in each program, always in the same order, and does the rest: no atomics, so results repeat
to the last bit. Sums and products are float32 whatever the activations are.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor, nn

from codistill.networks.network import normalised as stock_normalised

MAX_PARTS = 128
"""Parts that the rows are divided into, at most: about one for each multiprocessor of a large GPU."""
MIN_TILE, MAX_TILE = 1024, 8192
"""Elements that a program holds at a time."""
MAX_BLOCK_CHANNELS = 64
WARPS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _tile(start, stop, column, channels, BLOCK_ROWS: tl.constexpr):
    """Give offsets, and which of them exist, of the rows from `start` to below `stop`."""
    row = start + tl.arange(0, BLOCK_ROWS)
    return row[:, None].to(tl.int64) * channels + column[None, :], (row < stop)[:, None] & (column < channels)[None, :]


@triton.jit
def _part_statistics(
    features, partial, rows, channels, part_rows, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Store mean and sum of squared deviations of the rows of a part, joined tile by tile as Chan et al. do."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = part * part_rows
    stop = tl.minimum(first + part_rows, rows)
    mean = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    deviation = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for start in range(first, stop, BLOCK_ROWS):
        offset, exists = _tile(start, stop, column, channels, BLOCK_ROWS)
        value = tl.load(features + offset, exists, 0.0).to(tl.float32)
        before = (start - first).to(tl.float32)
        count = tl.minimum(stop - start, BLOCK_ROWS).to(tl.float32)
        tile_mean = tl.sum(value, 0) / count
        centred = tl.where(exists, value - tile_mean[None, :], 0.0)
        change = tile_mean - mean
        mean += change * (count / (before + count))
        deviation += tl.sum(centred * centred, 0) + change * change * (before * count / (before + count))
    tl.store(partial + part * channels + column, mean, column < channels)
    tl.store(partial + (parts + part) * channels + column, deviation, column < channels)


@triton.jit
def _normalise(
    features,
    skipped,
    result,
    partial,
    weight,
    bias,
    mean_out,
    scale_out,
    running_mean,
    running_var,
    rows,
    channels,
    part_rows,
    momentum,
    eps,
    HAS_SKIPPED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Join the parts' statistics, normalise the rows of a part, add and activate; the first part keeps the books."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = column < channels
    each = tl.arange(0, BLOCK_PARTS)
    present = (each < parts)[:, None] & known[None, :]
    where = each[:, None] * channels + column[None, :]
    count = tl.maximum(tl.minimum(rows - each * part_rows, part_rows), 0).to(tl.float32)[:, None]
    part_mean = tl.load(partial + where, present, 0.0)
    mean = tl.sum(part_mean * count, 0) / rows
    apart = part_mean - mean[None, :]
    deviation = tl.sum(tl.load(partial + parts * channels + where, present, 0.0) + count * apart * apart, 0)
    scale = 1.0 / tl.sqrt(deviation / rows + eps)
    if part == 0:
        tl.store(mean_out + column, mean, known)
        tl.store(scale_out + column, scale, known)
        old_mean = tl.load(running_mean + column, known, 0.0)
        tl.store(running_mean + column, old_mean + momentum * (mean - old_mean), known)
        old_var = tl.load(running_var + column, known, 0.0)
        tl.store(running_var + column, old_var + momentum * (deviation / (rows - 1) - old_var), known)
    slope = scale * tl.load(weight + column, known, 0.0)
    shift = tl.load(bias + column, known, 0.0)
    first = part * part_rows
    stop = tl.minimum(first + part_rows, rows)
    for start in range(first, stop, BLOCK_ROWS):
        offset, exists = _tile(start, stop, column, channels, BLOCK_ROWS)
        value = tl.load(features + offset, exists, 0.0).to(tl.float32)
        value = (value - mean[None, :]) * slope[None, :] + shift[None, :]
        if HAS_SKIPPED:
            value += tl.load(skipped + offset, exists, 0.0).to(tl.float32)
        if ACTIVATED:
            # Not maximum, which turns NaN into 0 and hides that a run diverged.
            value = tl.where(value <= 0, 0.0, value)
        tl.store(result + offset, value, exists)


@triton.jit
def _passed_gradient(
    gradient, result, centred, slope, shift, offset, exists, HAS_SKIPPED: tl.constexpr, ACTIVATED: tl.constexpr
):
    """Give the gradient behind the ReLU; without a shortcut its sign is computed again instead of read."""
    passed = tl.load(gradient + offset, exists, 0.0).to(tl.float32)
    if ACTIVATED:
        if HAS_SKIPPED:
            value = tl.load(result + offset, exists, 0.0).to(tl.float32)
        else:
            value = centred * slope[None, :] + shift[None, :]
        passed = tl.where(value <= 0, 0.0, passed)
    return passed


@triton.jit
def _part_gradients(
    gradient,
    features,
    result,
    skipped_gradient,
    partial,
    weight,
    bias,
    mean_in,
    scale_in,
    rows,
    channels,
    part_rows,
    HAS_SKIPPED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store the sums over a part's rows of the gradient and of gradient times normalised input."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = column < channels
    mean = tl.load(mean_in + column, known, 0.0)
    scale = tl.load(scale_in + column, known, 0.0)
    slope = scale * tl.load(weight + column, known, 0.0)
    shift = tl.load(bias + column, known, 0.0)
    total = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    along = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    first = part * part_rows
    stop = tl.minimum(first + part_rows, rows)
    for start in range(first, stop, BLOCK_ROWS):
        offset, exists = _tile(start, stop, column, channels, BLOCK_ROWS)
        centred = tl.load(features + offset, exists, 0.0).to(tl.float32) - mean[None, :]
        passed = _passed_gradient(gradient, result, centred, slope, shift, offset, exists, HAS_SKIPPED, ACTIVATED)
        if HAS_SKIPPED and ACTIVATED:
            tl.store(skipped_gradient + offset, passed, exists)
        total += tl.sum(passed, 0)
        # Where no row exists the gradient is 0.
        along += tl.sum(passed * centred, 0)
    tl.store(partial + part * channels + column, total, known)
    tl.store(partial + (parts + part) * channels + column, along * scale, known)


@triton.jit
def _input_gradient(
    gradient,
    features,
    result,
    feature_gradient,
    partial,
    weight,
    bias,
    mean_in,
    scale_in,
    weight_gradient,
    bias_gradient,
    rows,
    channels,
    part_rows,
    HAS_SKIPPED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Join the parts' sums, and give the gradients of input, weight and bias.

    With a shortcut and a ReLU, `gradient` is the shortcut's gradient, behind the ReLU already.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = column < channels
    each = tl.arange(0, BLOCK_PARTS)
    present = (each < parts)[:, None] & known[None, :]
    where = each[:, None] * channels + column[None, :]
    total = tl.sum(tl.load(partial + where, present, 0.0), 0)
    along = tl.sum(tl.load(partial + parts * channels + where, present, 0.0), 0)
    if part == 0:
        tl.store(bias_gradient + column, total, known)
        tl.store(weight_gradient + column, along, known)
    mean = tl.load(mean_in + column, known, 0.0)
    scale = tl.load(scale_in + column, known, 0.0)
    slope = scale * tl.load(weight + column, known, 0.0)
    shift = tl.load(bias + column, known, 0.0)
    constant, linear = total / rows, along * scale / rows
    first = part * part_rows
    stop = tl.minimum(first + part_rows, rows)
    for start in range(first, stop, BLOCK_ROWS):
        offset, exists = _tile(start, stop, column, channels, BLOCK_ROWS)
        centred = tl.load(features + offset, exists, 0.0).to(tl.float32) - mean[None, :]
        passed = _passed_gradient(
            gradient, result, centred, slope, shift, offset, exists, HAS_SKIPPED, ACTIVATED and not HAS_SKIPPED
        )
        change = slope[None, :] * (passed - constant[None, :] - centred * linear[None, :])
        tl.store(feature_gradient + offset, change, exists)


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


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        skipped: Tensor | None,
        running: tuple[Tensor, Tensor],
        momentum: float,
        eps: float,
        activated: bool,
    ) -> Tensor:
        tiling = Tiling.of(features)
        result, partial = torch.empty_like(features), tiling.partial(features)
        mean, scale = torch.empty_like(weight), torch.empty_like(weight)
        with torch.cuda.device_of(features):
            _part_statistics[tiling.grid](features, partial, *tiling.sizes, **tiling.blocks)
            _normalise[tiling.grid](
                features,
                features if skipped is None else skipped,
                result,
                partial,
                weight,
                bias,
                mean,
                scale,
                *running,
                *tiling.sizes,
                momentum,
                eps,
                HAS_SKIPPED=skipped is not None,
                ACTIVATED=activated,
                BLOCK_PARTS=tiling.block_parts,
                **tiling.blocks,
            )
        ctx.has_skipped, ctx.activated = skipped is not None, activated
        # The result is kept by the next convolution in any case; without a shortcut it is not needed.
        ctx.save_for_backward(
            features, weight, bias, mean, scale, result if skipped is not None and activated else None
        )
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, mean, scale, result = ctx.saved_tensors
        tiling = Tiling.of(features)
        gradient = gradient.to(features.dtype).contiguous(memory_format=torch.channels_last)
        masked = ctx.has_skipped and ctx.activated
        skipped_gradient = torch.empty_like(features) if masked else gradient
        feature_gradient, partial = torch.empty_like(features), tiling.partial(features)
        weight_gradient, bias_gradient = torch.empty_like(weight), torch.empty_like(bias)
        flags = {"HAS_SKIPPED": ctx.has_skipped, "ACTIVATED": ctx.activated}
        result = features if result is None else result
        parameters = (partial, weight, bias, mean, scale)
        with torch.cuda.device_of(features):
            _part_gradients[tiling.grid](
                gradient, features, result, skipped_gradient, *parameters, *tiling.sizes, **flags, **tiling.blocks
            )
            _input_gradient[tiling.grid](
                skipped_gradient,
                features,
                result,
                feature_gradient,
                *parameters,
                weight_gradient,
                bias_gradient,
                *tiling.sizes,
                **flags,
                BLOCK_PARTS=tiling.block_parts,
                **tiling.blocks,
            )
        passed = skipped_gradient if ctx.has_skipped else None
        return feature_gradient, weight_gradient, bias_gradient, passed, None, None, None, None


def batch_norm_relu(
    features: Float[Tensor, "batch channel height width"],
    weight: Float[Tensor, " channel"],
    bias: Float[Tensor, " channel"],
    running_mean: Float[Tensor, " channel"],
    running_var: Float[Tensor, " channel"],
    skipped: Float[Tensor, "batch channel height width"] | None = None,
    activated: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channel height width"]:
    """Compute relu(batch_norm(features) + skipped) with the statistics of the batch, as in training.

    No host read, nothing random and no atomics: it may be captured in a CUDA graph and repeats to the last bit.

    Args:
        features: float32, bfloat16 or float16; brought to channels_last where it is not.
        weight: float32, as are all that have its shape.
        bias: Added behind the weight.
        running_mean: Moved in place by `momentum` towards the batch's mean.
        running_var: Moved in place by `momentum` towards the batch's unbiased variance.
        skipped: What is added before the ReLU, or nothing.
        activated: Whether there is a ReLU.
        momentum: Share of the batch in the running statistics.
        eps: Added to the (biased) variance.

    Returns:
        The result in channels_last, of the type of `features`. It is rounded once; stock layers round after each of
        the three operations.

    Raises:
        TypeError: Another type of activations or parameters.
        ValueError: One value a channel, which has no variance.
    """
    if features.dtype not in DTYPES or weight.dtype != torch.float32:
        raise TypeError(
            f"fused batch normalisation takes float32, bfloat16 or float16 with float32 weights, "
            f"not {features.dtype} with {weight.dtype}"
        )
    if features.numel() == features.shape[1]:
        raise ValueError(f"batch normalisation needs more than 1 value per channel, got {list(features.shape)}")
    features = features.contiguous(memory_format=torch.channels_last)
    if skipped is not None:
        skipped = skipped.to(features.dtype).contiguous(memory_format=torch.channels_last)
    running = (running_mean, running_var)
    result: Tensor = _BatchNormReLU.apply(features, weight, bias, skipped, running, momentum, eps, activated)
    return result


def normalised(
    features: Float[Tensor, "batch channel height width"],
    norm: nn.BatchNorm2d,
    skipped: Float[Tensor, "batch channel height width"] | None,
    activated: bool,
) -> Float[Tensor, "batch channel height width"]:
    """Compute in training mode what `networks.network.normalised` computes, with `batch_norm_relu`; else call it."""
    if not norm.training:
        return stock_normalised(features, norm, skipped, activated)
    mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
    assert mean is not None and var is not None and momentum is not None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return batch_norm_relu(features, norm.weight, norm.bias, mean, var, skipped, activated, momentum, norm.eps)
