"""The backward kernel of dual attention; see `attention_passes`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

import triton
import triton.language as tl

from codistill.kernels.attention_passes import _convolved, _hidden, _outward, _pooled


@triton.jit
def _first(values, exists, maximum, number, AXIS: tl.constexpr, NONE: tl.constexpr):
    """Give the first number along an axis whose value is the maximum."""
    return tl.min(tl.where(exists & (values == maximum), number, NONE), AXIS)


@triton.jit
def _store_spatial_weight_gradient(
    passed,
    pooled,
    gradient,
    height,
    width,
    row_stride,
    column_stride,
    KERNEL: tl.constexpr,
    BLOCK_KERNEL: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
):
    """Store the sum over places of what is passed times the value that each weight of a plane has met there."""
    place, number = tl.arange(0, BLOCK_PLACES), tl.arange(0, BLOCK_KERNEL)
    row = (place // width)[None, :] + (number // KERNEL)[:, None] - KERNEL // 2
    column = (place % width)[None, :] + (number % KERNEL)[:, None] - KERNEL // 2
    exists = (number < KERNEL * KERNEL)[:, None] & (place < height * width)[None, :]
    exists = exists & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    met = tl.load(pooled + row * width + column, exists, 0.0)
    total = tl.sum(tl.where(exists, met * passed[None, :], 0.0), 1)
    where = (number // KERNEL) * row_stride + (number % KERNEL) * column_stride
    tl.store(gradient + where, total, number < KERNEL * KERNEL)


@triton.jit
def attend_backward(
    gradient,
    features,
    feature_gradient,
    hidden_weight,
    hidden_bias,
    channel_weight,
    spatial_weight,
    channel_gates,
    spatial,
    partial,
    numbers,
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
    BLOCK_KERNEL: tl.constexpr,
):
    """Give the gradient of an image, and of the weights its part: hidden, channel, spatial weights, then biases."""
    image, places = tl.program_id(0).to(tl.int64), height * width
    place, column, unit = tl.arange(0, BLOCK_PLACES), tl.arange(0, BLOCK_CHANNELS), tl.arange(0, BLOCK_HIDDEN)
    inside, known = place < places, column < channels
    offset, exists = place[:, None] * channels + column[None, :], inside[:, None] & known[None, :]
    start = image * places * channels
    own = partial + image * numbers
    own_spatial = own + 2 * hidden * channels
    kept = spatial + image * places * 3

    # Back through the weighting of the places.
    value = tl.load(features + start + offset, exists, 0.0).to(tl.float32)
    passed = tl.load(gradient + start + offset, exists, 0.0).to(tl.float32)
    channel_gate = tl.load(channel_gates + image * channels + column, known, 0.0)
    spatial_gate = tl.load(kept + place, inside, 0.0)
    weighted = value * channel_gate[None, :]
    convolved_gradient = tl.sum(passed * weighted, 1) * spatial_gate * (1.0 - spatial_gate)
    _store_spatial_weight_gradient(
        convolved_gradient,
        kept + places,
        own_spatial,
        height,
        width,
        row_stride,
        column_stride,
        KERNEL,
        BLOCK_KERNEL,
        BLOCK_PLACES,
    )
    _store_spatial_weight_gradient(
        convolved_gradient,
        kept + 2 * places,
        own_spatial + plane_stride,
        height,
        width,
        row_stride,
        column_stride,
        KERNEL,
        BLOCK_KERNEL,
        BLOCK_PLACES,
    )
    of_average = _convolved(
        convolved_gradient,
        spatial_weight,
        height,
        width,
        row_stride,
        column_stride,
        True,
        KERNEL,
        BLOCK_PLACES,
        BLOCK_CHUNK,
    )
    of_maximum = _convolved(
        convolved_gradient,
        spatial_weight + plane_stride,
        height,
        width,
        row_stride,
        column_stride,
        True,
        KERNEL,
        BLOCK_PLACES,
        BLOCK_CHUNK,
    )
    _, maximum = _pooled(weighted, exists, inside, channels, 1)
    largest = _first(weighted, exists, maximum[:, None], column[None, :], 1, BLOCK_CHANNELS)
    passed = passed * spatial_gate[:, None] + (of_average / channels)[:, None]
    passed += tl.where(column[None, :] == largest[:, None], of_maximum[:, None], 0.0)

    # Back through the weighting of the channels. Where no value exists it is 0, and so is what it has a part in.
    total = tl.sum(passed * value, 0) * channel_gate * (1.0 - channel_gate)
    average, maximum = _pooled(value, exists, known, places, 0)
    inward, before_average, before_maximum, positive = _hidden(
        average, maximum, hidden_weight, hidden_bias, unit, column, hidden, channels, HAS_BIAS
    )
    outward, outward_offset, present = _outward(channel_weight, unit, column, hidden, channels)
    tl.store(own + hidden * channels + outward_offset, total[:, None] * positive[None, :], present)
    of_positive = tl.sum(tl.where(present, outward * total[:, None], 0.0), 0)
    of_average = tl.where(before_average <= 0, 0.0, of_positive)
    of_maximum = tl.where(before_maximum <= 0, 0.0, of_positive)
    inward_offset = unit[:, None] * channels + column[None, :]
    present = (unit < hidden)[:, None] & known[None, :]
    inward_gradient = of_average[:, None] * average[None, :] + of_maximum[:, None] * maximum[None, :]
    tl.store(own + inward_offset, inward_gradient, present)
    if HAS_BIAS:
        own_bias = own_spatial + 2 * KERNEL * KERNEL
        tl.store(own_bias + unit, of_average + of_maximum, unit < hidden)
        tl.store(own_bias + hidden + column, 2.0 * total, known)

    # Back through the pooling over places, and out.
    largest = _first(value, exists, maximum[None, :], place[:, None], 0, BLOCK_PLACES)
    passed = passed * channel_gate[None, :]
    passed += (tl.sum(inward * of_average[:, None], 0) / places)[None, :]
    passed += tl.where(place[:, None] == largest[None, :], tl.sum(inward * of_maximum[:, None], 0)[None, :], 0.0)
    tl.store(feature_gradient + start + offset, passed, exists)
