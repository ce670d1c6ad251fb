"""Dual attention as Triton kernels: one forward, one backward, and the sum of the weights' gradients over images.

A program has one image and holds its whole map as a matrix of places (height times width) by channels, which is how
channels_last lies in memory; both are padded to powers of two. Values are float32 whatever the map and the weights are.
Where a value is NaN so is the mean that it has a part in, and means and maxima are added: maxima need not keep NaN.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import triton
import triton.language as tl


@triton.jit
def _sigmoid(values):
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def _pooled(values, exists, known, count, AXIS: tl.constexpr):
    """Give means and maxima along an axis of values that are 0 where there is nothing; 0 where nothing is `known`."""
    maximum = tl.max(tl.where(exists, values, float("-inf")), AXIS)
    return tl.sum(values, AXIS) / count, tl.where(known, maximum, 0.0)


@triton.jit
def _hidden(average, maximum, weight_in, bias_in, unit, column, hidden, channels, HAS_BIAS: tl.constexpr):
    """Give the hidden layer's weights [unit, channel], and its values before the ReLU for means and for maxima."""
    exists = (unit < hidden)[:, None] & (column < channels)[None, :]
    weight = tl.load(weight_in + unit[:, None] * channels + column[None, :], exists, 0.0).to(tl.float32)
    # Padding is left out instead of multiplied by 0, which is NaN where something is infinite.
    of_average = tl.sum(tl.where(exists, weight * average[None, :], 0.0), 1)
    of_maximum = tl.sum(tl.where(exists, weight * maximum[None, :], 0.0), 1)
    if HAS_BIAS:
        bias = tl.load(bias_in + unit, unit < hidden, 0.0).to(tl.float32)
        of_average += bias
        of_maximum += bias
    # Not maximum, which turns NaN into 0 and hides that a run diverged.
    positive = tl.where(of_average <= 0, 0.0, of_average) + tl.where(of_maximum <= 0, 0.0, of_maximum)
    return weight, of_average, of_maximum, positive


@triton.jit
def _outward(weight_in, unit, column, hidden, channels):
    """Give the second layer's weights [channel, unit], their offsets, and which of them exist."""
    offset = column[:, None] * hidden + unit[None, :]
    exists = (column < channels)[:, None] & (unit < hidden)[None, :]
    return tl.load(weight_in + offset, exists, 0.0).to(tl.float32), offset, exists


@triton.jit
def _convolved(
    values,
    weight_in,
    height,
    width,
    row_stride,
    column_stride,
    TURNED: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
):
    """Convolve one value a place with one plane of weights and zero padding, as a product with a banded matrix.

    Turned is the transposed product, which the backward pass needs. The matrix is built a chunk of columns at a time.
    """
    place = tl.arange(0, BLOCK_PLACES)
    total = tl.zeros((BLOCK_PLACES,), tl.float32)
    for first in range(0, BLOCK_PLACES, BLOCK_CHUNK):
        source = first + tl.arange(0, BLOCK_CHUNK)
        chunk = values
        if BLOCK_CHUNK < BLOCK_PLACES:
            chunk = tl.sum(tl.where(place[:, None] == source[None, :], values[:, None], 0.0), 0)
        row = (source // width)[None, :] - (place // width)[:, None]
        column = (source % width)[None, :] - (place % width)[:, None]
        if TURNED:
            row = -row
            column = -column
        row += KERNEL // 2
        column += KERNEL // 2
        exists = (place < height * width)[:, None] & (source < height * width)[None, :]
        exists = exists & (row >= 0) & (row < KERNEL) & (column >= 0) & (column < KERNEL)
        weight = tl.load(weight_in + row * row_stride + column * column_stride, exists, 0.0).to(tl.float32)
        total += tl.sum(tl.where(exists, weight * chunk[None, :], 0.0), 1)
    return total


@triton.jit
def attend(
    features,
    result,
    hidden_weight,
    hidden_bias,
    channel_weight,
    channel_bias,
    spatial_weight,
    channel_gates,
    spatial,
    channels,
    hidden,
    height,
    width,
    plane_stride,
    row_stride,
    column_stride,
    HAS_BIAS: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Weight channels and places of an image; keep w_c, and of each place w_s with the mean and maximum before it."""
    image, places = tl.program_id(0).to(tl.int64), height * width
    place, column, unit = tl.arange(0, BLOCK_PLACES), tl.arange(0, BLOCK_CHANNELS), tl.arange(0, BLOCK_HIDDEN)
    inside, known = place < places, column < channels
    offset, exists = place[:, None] * channels + column[None, :], inside[:, None] & known[None, :]
    start = image * places * channels
    value = tl.load(features + start + offset, exists, 0.0).to(tl.float32)

    average, maximum = _pooled(value, exists, known, places, 0)
    _, _, _, positive = _hidden(average, maximum, hidden_weight, hidden_bias, unit, column, hidden, channels, HAS_BIAS)
    weight, _, present = _outward(channel_weight, unit, column, hidden, channels)
    total = tl.sum(tl.where(present, weight * positive[None, :], 0.0), 1)
    if HAS_BIAS:
        # Once for the means and once for the maxima.
        total += 2.0 * tl.load(channel_bias + column, known, 0.0).to(tl.float32)
    channel_gate = _sigmoid(total)
    tl.store(channel_gates + image * channels + column, channel_gate, known)

    value = value * channel_gate[None, :]
    average, maximum = _pooled(value, exists, inside, channels, 1)
    of_average = _convolved(
        average, spatial_weight, height, width, row_stride, column_stride, False, KERNEL, BLOCK_PLACES, BLOCK_CHUNK
    )
    of_maximum = _convolved(
        maximum,
        spatial_weight + plane_stride,
        height,
        width,
        row_stride,
        column_stride,
        False,
        KERNEL,
        BLOCK_PLACES,
        BLOCK_CHUNK,
    )
    spatial_gate = _sigmoid(of_average + of_maximum)
    kept = spatial + image * places * 3 + place
    tl.store(kept, spatial_gate, inside)
    tl.store(kept + places, average, inside)
    tl.store(kept + 2 * places, maximum, inside)
    tl.store(result + start + offset, value * spatial_gate[:, None], exists)


@triton.jit
def sum_over_images(partial, total, images, numbers, BLOCK_IMAGES: tl.constexpr, BLOCK_NUMBERS: tl.constexpr):
    """Add up the rows of a matrix [image, number], in the order of the images."""
    column = tl.program_id(0) * BLOCK_NUMBERS + tl.arange(0, BLOCK_NUMBERS)
    found = tl.zeros((BLOCK_NUMBERS,), tl.float32)
    for start in range(0, images, BLOCK_IMAGES):
        image = start + tl.arange(0, BLOCK_IMAGES)
        offset = image[:, None].to(tl.int64) * numbers + column[None, :]
        exists = (image < images)[:, None] & (column < numbers)[None, :]
        found += tl.sum(tl.load(partial + offset, exists, 0.0), 0)
    tl.store(total + column, found, column < numbers)
