"""The passes over a map that batch normalisation takes, as Triton kernels: two forward and two backward.

Activations are read as a matrix of rows (batch, height, width) by channels, which is how channels_last lies in memory.
Rows are divided into parts. The first kernel of each direction sums over the rows of a part, the second one adds up the
parts of its channels again in each program, always in the same order, and does the rest: no atomics, so results repeat
to the last bit. Sums and products are float32 whatever the activations are.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import triton
import triton.language as tl


@triton.jit
def _tile(start, stop, column, channels, BLOCK_ROWS: tl.constexpr):
    """Give offsets, and which of them exist, of the rows from `start` to below `stop`."""
    row = start + tl.arange(0, BLOCK_ROWS)
    return row[:, None].to(tl.int64) * channels + column[None, :], (row < stop)[:, None] & (column < channels)[None, :]


@triton.jit
def _of_parts(parts, channels, column, BLOCK_PARTS: tl.constexpr):
    """Give the numbers of all parts, and offsets of their sums for some channels with which of them exist."""
    each = tl.arange(0, BLOCK_PARTS)
    where = each[:, None] * channels + column[None, :]
    return each, where, (each < parts)[:, None] & (column < channels)[None, :]


@triton.jit
def _normalisation(mean_in, scale_in, weight, bias, column, known):
    """Load the mean and scale of some channels, and what they are multiplied by and raised by in all."""
    scale = tl.load(scale_in + column, known, 0.0)
    slope = scale * tl.load(weight + column, known, 0.0)
    return tl.load(mean_in + column, known, 0.0), scale, slope, tl.load(bias + column, known, 0.0)


@triton.jit
def part_statistics(
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
def normalise(
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
    each, where, present = _of_parts(parts, channels, column, BLOCK_PARTS)
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
    gradient,
    added,
    result,
    centred,
    slope,
    shift,
    offset,
    exists,
    HAS_ADDED: tl.constexpr,
    HAS_SKIPPED: tl.constexpr,
    ACTIVATED: tl.constexpr,
):
    """Give the gradient behind the ReLU; without a shortcut its sign is computed again instead of read."""
    passed = tl.load(gradient + offset, exists, 0.0).to(tl.float32)
    if HAS_ADDED:
        # Rounded as it would be if it had been added before.
        passed += tl.load(added + offset, exists, 0.0).to(tl.float32)
        passed = passed.to(added.dtype.element_ty).to(tl.float32)
    if ACTIVATED:
        if HAS_SKIPPED:
            value = tl.load(result + offset, exists, 0.0).to(tl.float32)
        else:
            value = centred * slope[None, :] + shift[None, :]
        passed = tl.where(value <= 0, 0.0, passed)
    return passed


@triton.jit
def part_gradients(
    gradient,
    added,
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
    HAS_ADDED: tl.constexpr,
    HAS_SKIPPED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store the sums over a part's rows of the gradient and of gradient times normalised input."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = column < channels
    mean, scale, slope, shift = _normalisation(mean_in, scale_in, weight, bias, column, known)
    total = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    along = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    first = part * part_rows
    stop = tl.minimum(first + part_rows, rows)
    for start in range(first, stop, BLOCK_ROWS):
        offset, exists = _tile(start, stop, column, channels, BLOCK_ROWS)
        centred = tl.load(features + offset, exists, 0.0).to(tl.float32) - mean[None, :]
        passed = _passed_gradient(
            gradient, added, result, centred, slope, shift, offset, exists, HAS_ADDED, HAS_SKIPPED, ACTIVATED
        )
        if HAS_SKIPPED and (ACTIVATED or HAS_ADDED):
            tl.store(skipped_gradient + offset, passed, exists)
        total += tl.sum(passed, 0)
        # Where no row exists the gradient is 0.
        along += tl.sum(passed * centred, 0)
    tl.store(partial + part * channels + column, total, known)
    tl.store(partial + (parts + part) * channels + column, along * scale, known)


@triton.jit
def input_gradient(
    gradient,
    added,
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
    HAS_ADDED: tl.constexpr,
    HAS_SKIPPED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Join the parts' sums, and give the gradients of input, weight and bias.

    With a shortcut, `gradient` is the shortcut's gradient, with `added` in it and behind the ReLU already.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = column < channels
    _, where, present = _of_parts(parts, channels, column, BLOCK_PARTS)
    total = tl.sum(tl.load(partial + where, present, 0.0), 0)
    along = tl.sum(tl.load(partial + parts * channels + where, present, 0.0), 0)
    if part == 0:
        tl.store(bias_gradient + column, total, known)
        tl.store(weight_gradient + column, along, known)
    mean, scale, slope, shift = _normalisation(mean_in, scale_in, weight, bias, column, known)
    constant, linear = total / rows, along * scale / rows
    first = part * part_rows
    stop = tl.minimum(first + part_rows, rows)
    for start in range(first, stop, BLOCK_ROWS):
        offset, exists = _tile(start, stop, column, channels, BLOCK_ROWS)
        centred = tl.load(features + offset, exists, 0.0).to(tl.float32) - mean[None, :]
        passed = _passed_gradient(
            gradient,
            added,
            result,
            centred,
            slope,
            shift,
            offset,
            exists,
            HAS_ADDED and not HAS_SKIPPED,
            HAS_SKIPPED,
            ACTIVATED and not HAS_SKIPPED,
        )
        change = slope[None, :] * (passed - constant[None, :] - centred * linear[None, :])
        tl.store(feature_gradient + offset, change, exists)
