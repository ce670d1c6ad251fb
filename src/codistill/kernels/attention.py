"""Dual attention, channels and then places, as one differentiable function."""

# mypy: disable-error-code="no-untyped-call"

from dataclasses import dataclass
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor, nn

from codistill.kernels.attention_gradients import attend_backward
from codistill.kernels.attention_passes import attend, sum_over_images
from codistill.kernels.reach import reached
from codistill.modules.attention import DualAttention
from codistill.modules.attention import attended as stock_attended

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TILE = 16384
"""Elements of a map, or of a matrix of weights, that a program holds at a time."""
MAX_CHUNK = 4096
"""Elements of the convolution's banded matrix that are built at a time: more of them would not fit in registers."""
MAX_PLACES = 256
MIN_BLOCK = 16
ELEMENTS_PER_WARP, MIN_WARPS, MAX_WARPS = 512, 4, 16
SUMMED_IMAGES, SUMMED_NUMBERS = 128, 32
"""What a program of the sum over images holds at a time."""


def _block(length: int) -> int:
    return max(MIN_BLOCK, int(triton.next_power_of_2(length)))


@dataclass(frozen=True)
class Sizes:
    """Sizes of a map and of the weights, and of the blocks that they fill; all are lengths in elements.

    Attributes:
        channels: C.
        hidden: Width of the perceptron's hidden layer.
        height: Of the map.
        width: Of the map.
        kernel: Side of the spatial convolution.
    """

    channels: int
    hidden: int
    height: int
    width: int
    kernel: int

    @classmethod
    def of(
        cls,
        features: Float[Tensor, "batch channel height width"],
        hidden_weight: Float[Tensor, "hidden channel"],
        spatial_weight: Float[Tensor, "1 2 side side"],
    ) -> "Sizes":
        """Read the sizes off tensors."""
        _, channels, height, width = features.shape
        return cls(channels, hidden_weight.shape[0], height, width, spatial_weight.shape[2])

    @property
    def fit(self) -> bool:
        """Whether a program can hold an image."""
        places, channels = _block(self.height * self.width), _block(self.channels)
        held = (places * channels, _block(self.hidden) * channels, _block(self.kernel**2) * places)
        return places <= MAX_PLACES and max(held) <= MAX_TILE

    @property
    def blocks(self) -> dict[str, int]:
        """Compile-time sizes of both directions."""
        places, channels = _block(self.height * self.width), _block(self.channels)
        return {
            "KERNEL": self.kernel,
            "BLOCK_PLACES": places,
            "BLOCK_CHUNK": min(places, MAX_CHUNK // places),
            "BLOCK_CHANNELS": channels,
            "BLOCK_HIDDEN": _block(self.hidden),
            "num_warps": min(max(places * channels // ELEMENTS_PER_WARP, MIN_WARPS), MAX_WARPS),
        }

    def numbers(self, spatial_weight: Float[Tensor, "1 2 side side"]) -> tuple[int, ...]:
        """Give what every kernel is told: sizes of the map, and how the planes of weights lie in memory."""
        return self.channels, self.hidden, self.height, self.width, *spatial_weight.stride()[1:]


class _DualAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        hidden_weight: Tensor,
        channel_weight: Tensor,
        spatial_weight: Tensor,
        *biases: Tensor,
    ) -> Tensor:
        sizes = Sizes.of(features, hidden_weight, spatial_weight)
        batch, channels, height, width = features.shape
        result = torch.empty_like(features)
        gates = features.new_empty(batch, channels, dtype=torch.float32)
        spatial = features.new_empty(batch, 3, height, width, dtype=torch.float32)
        hidden_bias, channel_bias = biases or (hidden_weight, channel_weight)
        with torch.cuda.device_of(features):
            attend[(batch,)](
                features,
                result,
                hidden_weight,
                hidden_bias,
                channel_weight,
                channel_bias,
                spatial_weight,
                gates,
                spatial,
                *sizes.numbers(spatial_weight),
                HAS_BIAS=bool(biases),
                **sizes.blocks,
            )
        ctx.save_for_backward(features, gates, spatial, hidden_weight, channel_weight, spatial_weight, *biases)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        features, gates, spatial, *weights = ctx.saved_tensors
        hidden_weight, channel_weight, spatial_weight, *biases = weights
        sizes = Sizes.of(features, hidden_weight, spatial_weight)
        gradient = gradient.to(features.dtype).contiguous(memory_format=torch.channels_last)
        feature_gradient = torch.empty_like(features)
        batch, numbers = features.shape[0], sum(each.numel() for each in weights)
        partial = features.new_empty(batch, numbers, dtype=torch.float32)
        total = features.new_empty(numbers, dtype=hidden_weight.dtype)
        with torch.cuda.device_of(features):
            attend_backward[(batch,)](
                gradient,
                features,
                feature_gradient,
                hidden_weight,
                biases[0] if biases else hidden_weight,
                channel_weight,
                spatial_weight,
                gates,
                spatial,
                partial,
                numbers,
                *sizes.numbers(spatial_weight),
                HAS_BIAS=bool(biases),
                BLOCK_KERNEL=_block(sizes.kernel**2),
                **sizes.blocks,
            )
            sum_over_images[(triton.cdiv(numbers, SUMMED_NUMBERS),)](
                partial, total, batch, numbers, BLOCK_IMAGES=SUMMED_IMAGES, BLOCK_NUMBERS=SUMMED_NUMBERS, num_warps=4
            )
        gradients, start = [feature_gradient], 0
        for each in weights:
            gradients.append(total.as_strided(each.shape, each.stride(), start))
            start += each.numel()
        return tuple(gradients)


def dual_attention(
    features: Float[Tensor, "batch channel height width"],
    hidden_weight: Float[Tensor, "hidden channel"],
    channel_weight: Float[Tensor, "channel hidden"],
    spatial_weight: Float[Tensor, "1 2 side side"],
    biases: tuple[Float[Tensor, " hidden"], Float[Tensor, " channel"]] | None = None,
) -> Float[Tensor, "batch channel height width"]:
    """Compute what `modules.DualAttention` computes without normalisation, in one kernel forward and two backward.

    No host read, nothing random and no atomics: it may be captured in a CUDA graph and repeats to the last bit. All
    values in between are float32.

    Args:
        features: float32, bfloat16 or float16; brought to channels_last where it is not.
        hidden_weight: Of the perceptron's hidden layer; all weights have one type, any of these three.
        channel_weight: Of the perceptron's second layer.
        spatial_weight: Of the convolution of mean and maximum over channels; the side is odd, pixels.
        biases: Of both layers of the perceptron, or none.

    Returns:
        The weighted map in channels_last, of the type of `features`, as of stock layers in autocast, and rounded once.

    Raises:
        TypeError: Another type of map or weights, or weights of unlike types.
        ValueError: A map or weights too large for a program to hold, see `Sizes.fit`.
    """
    weights = (hidden_weight, channel_weight, spatial_weight, *(biases or ()))
    types = {each.dtype for each in weights}
    if features.dtype not in DTYPES or len(types) > 1 or not types <= set(DTYPES):
        raise TypeError(
            f"fused attention takes float32, bfloat16 or float16 with weights of one such type, "
            f"not {features.dtype} with {', '.join(sorted(map(str, types)))}"
        )
    sizes = Sizes.of(features, hidden_weight, spatial_weight)
    if not sizes.fit:
        raise ValueError(f"too large for fused attention: {sizes}")
    if not spatial_weight.is_contiguous(memory_format=torch.channels_last):
        spatial_weight = spatial_weight.contiguous()
    result: Tensor = _DualAttention.apply(
        features.contiguous(memory_format=torch.channels_last),
        hidden_weight.contiguous(),
        channel_weight.contiguous(),
        spatial_weight,
        *(each.contiguous() for each in biases or ()),
    )
    return result


def attended(
    feature_map: Float[Tensor, "batch channel height width"], attention: DualAttention
) -> Float[Tensor, "batch channel height width"]:
    """Compute in training mode what `modules.attention.attended` computes, with `dual_attention`.

    In evaluation mode, with normalisation, on a CPU, or where a program cannot hold an image, call that one.
    """
    inward, outward, spatial_weight = attention.channel[0], attention.channel[2], attention.spatial[0].weight
    assert isinstance(inward, nn.Linear) and isinstance(outward, nn.Linear) and isinstance(spatial_weight, Tensor)
    sizes = Sizes.of(feature_map, inward.weight, spatial_weight)
    if not attention.training or len(attention.spatial) > 1 or not sizes.fit or not reached(feature_map):
        return stock_attended(feature_map, attention)
    biases = None if inward.bias is None or outward.bias is None else (inward.bias, outward.bias)
    return dual_attention(feature_map, inward.weight, outward.weight, spatial_weight, biases)
