"""Chains of small operations as one compiled function each, forward and backward, over [images, places, channels].

Eager PyTorch passes over memory once for each small operation, which on most devices takes longer than the convolutions
between them. Here each chain is a plain function of tensors with a hand-written gradient, and Inductor, torch.compile's
backend, compiles both once for each shape; the compiled object is called directly, without Dynamo's guards. Sums over
places are taken in two levels, by image and then over images, which is both accurate in float32 and fast.

Stock PyTorch is the reference of each chain. It is what runs in evaluation, in deployed files, and where there is no
compiler: chains run only in training, within `compiled_chains`.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from codistill.core.console import warn_once

Rows = Float[Tensor, "image place channel"]
Channels = Float[Tensor, " channel"]
Code = Callable[..., Any]


class Compiler:
    """What turns the function of a chain into code; `None` for its options leaves functions as they are.

    Attributes:
        failed: Whether a compilation has failed; from then on stock PyTorch runs.
    """

    def __init__(self, options: dict[str, Any] | None) -> None:
        self.options, self.failed = options, False

    def compile(self, function: Code, arguments: Sequence[Tensor]) -> Code:
        """Compile a function for the shapes of arguments."""
        if self.options is None or self.failed:
            return function
        try:
            return inductor(function, arguments, self.options)
        except Exception as error:
            self.failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            warn_once(f"compilation failed, training goes on without a compiler, more slowly: {reason}")
            return function


def inductor(function: Code, arguments: Sequence[Tensor], options: dict[str, Any]) -> Code:
    """Compile a function of tensors for their very shapes, strides and types, with Inductor."""
    # They take seconds to import, which runs without them need not wait for.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU on machines without one
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    examples = [each.detach() for each in arguments]
    with torch.no_grad(), config.patch(options):
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*examples)
        code = compile_fx_inner(traced, examples)
    return lambda *given: code(list(given))


_compiler: Compiler | None = None


@contextlib.contextmanager
def compiled_chains(compiler: Compiler) -> Iterator[None]:
    """Have chains run compiled in training until the context ends."""
    global _compiler
    before, _compiler = _compiler, compiler
    try:
        yield
    finally:
        _compiler = before


class Chain:
    """A function of tensors, called as its code for the shape and type of the first argument."""

    def __init__(self, function: Code) -> None:
        self.function = function
        self._code: dict[tuple[Any, ...], Code] = {}

    def __call__(self, *arguments: Tensor) -> Any:
        """Compute the function."""
        first = arguments[0]
        key = (_compiler, len(arguments), first.shape, first.dtype, first.device)
        code = self._code.get(key)
        if code is None:
            assert _compiler is not None
            code = self._code[key] = _compiler.compile(self.function, arguments)
        return code(*arguments)


def on(module: nn.Module) -> bool:
    """Whether a module is to compute with chains: in training, with a compiler, unless its user has compiled it."""
    ready = _compiler is not None and not _compiler.failed
    return ready and module.training and not torch.compiler.is_compiling()


def rows(features: Float[Tensor, "image channel height width"]) -> Rows:
    """Return maps as [image, place, channel]: a view where they are in channels_last memory format."""
    image, channel, height, width = features.shape
    last = features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return last.reshape(image, height * width, channel)


def maps(of: Rows, like: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image channel height width"]:
    """Return [image, place, channel] as maps of the shape of others, in channels_last memory format."""
    image, channel, height, width = like.shape
    return of.view(image, height, width, channel).permute(0, 3, 1, 2)


def total(of: Rows) -> Channels:
    """Sum over places, then over images."""
    return of.sum(1).sum(0)


# Batch normalisation, then an addition, then ReLU. `wide` is float32, or float64 for float64.


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the type that sums are computed in."""
    return tensor.float() if tensor.dtype != torch.float64 else tensor


def norm_forward(
    features: Rows, weight: Channels, bias: Channels, epsilon: float, act: bool, shortcut: Rows | None = None
) -> tuple[Rows, Channels, Channels, Channels]:
    """Compute act(norm(features) + shortcut), and mean, 1 / deviation and variance of the batch."""
    count, values = features.shape[0] * features.shape[1], wide(features)
    # Sums of what is left after one of the values was taken from all: squares of large means would cancel.
    origin = values[0, 0]
    centred = values - origin
    shift = total(centred) / count
    variance = total(centred * centred) / count - shift * shift
    mean, inverse = origin + shift, torch.rsqrt(variance + epsilon)
    scale = inverse * weight
    result = (values - mean) * scale + bias
    if shortcut is not None:
        result = result + wide(shortcut)
    return (torch.relu(result) if act else result).to(features.dtype), mean, inverse, variance


def norm_backward(
    gradients: Sequence[Rows],
    features: Rows,
    result: Rows | None,
    mean: Channels,
    inverse: Channels,
    weight: Channels,
) -> tuple[Rows, Channels, Channels, Rows]:
    """Compute the gradients of features, weight, bias and shortcut, from those of a result that is used once or twice.

    `result` is there where ReLU was applied.
    """
    count = features.shape[0] * features.shape[1]
    reached = gradients[0] if len(gradients) == 1 else gradients[0] + gradients[1]
    if result is not None:
        reached = torch.where(result > 0, reached, 0)
    values, normalised = wide(reached), (wide(features) - mean) * inverse
    of_bias, of_weight = total(values), total(values * normalised)
    of_features = (values - of_bias / count - normalised * (of_weight / count)) * (weight * inverse)
    return of_features.to(features.dtype), of_weight, of_bias, reached


@functools.cache
def norm_forward_chain(epsilon: float, act: bool) -> Chain:
    """Return the chain of a batch normalisation and what follows it."""

    def forward(features: Rows, weight: Channels, bias: Channels, *shortcut: Rows) -> tuple[Tensor, ...]:
        return norm_forward(features, weight, bias, epsilon, act, *shortcut)

    return Chain(forward)


@functools.cache
def norm_backward_chain(act: bool, uses: int, added: bool) -> Chain:
    """Return the chain of its gradients: of a result used once or twice, with or without that of a shortcut."""

    def backward(
        features: Rows, mean: Channels, inverse: Channels, weight: Channels, *more: Rows
    ) -> tuple[Tensor, ...]:
        result, gradients = (more[0], more[1:]) if act else (None, more)
        return norm_backward(gradients, features, result, mean, inverse, weight)[: 3 + added]

    return Chain(backward)


class _NormAct(torch.autograd.Function):
    """act(norm(features) + shortcut), batch normalisation with the statistics of the batch.

    The result comes twice, for a convolution and for a shortcut: their gradients are then added in this chain.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, epsilon: float, act: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        flat, added = rows(features), () if shortcut is None else (rows(shortcut),)
        result, mean, inverse, variance = norm_forward_chain(epsilon, act)(flat, weight, bias, *added)
        ctx.save_for_backward(flat, mean, inverse, weight, *([result] if act else []))
        ctx.act, ctx.added = act, shortcut is not None
        ctx.mark_non_differentiable(mean, variance)
        output = maps(result, features)
        return output, output.detach(), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [each for each in gradients[:2] if each is not None]
        # With neither ReLU nor a second use, the shortcut's gradient is the result's.
        computes = ctx.added and (ctx.act or len(given) > 1)
        chain = norm_backward_chain(ctx.act, len(given), computes)
        of_features, of_weight, of_bias, *reached = chain(*ctx.saved_tensors, *map(rows, given))
        of_shortcut = (maps(reached[0], given[0]) if computes else given[0]) if ctx.added else None
        return maps(of_features, given[0]), of_weight, of_bias, of_shortcut, None, None


def norm_act(norm: nn.BatchNorm2d, features: Tensor, act: bool, shortcut: Tensor | None = None) -> Tensor | None:
    """Apply a batch normalisation in training, an addition and ReLU as one chain; None: stock PyTorch is to do it."""
    if not on(norm) or norm.momentum is None or norm.weight is None:
        return None
    if norm.running_mean is None or norm.running_var is None:
        return None
    result, twin, mean, variance = _NormAct.apply(features, norm.weight, norm.bias, shortcut, norm.eps, act)
    count = features.numel() // features.shape[1]
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    result.twin = twin
    chained: Tensor = result
    return chained


def second_use(features: Tensor) -> Tensor:
    """Return the same features for another use of them, whose gradient the chain that made them adds itself."""
    twin: Tensor = getattr(features, "twin", features)
    return twin


# Dual attention: pooling over places, weights of channels and pooling over channels, weights of places.


def pool_forward(features: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean and maximum over places, [image, channel] each, and the places of the maxima."""
    maxima, place = features.max(dim=1)
    return wide(features).mean(dim=1).to(features.dtype), maxima, place


def pool_backward(of_mean: Tensor, of_maximum: Tensor, place: Tensor, like: Rows) -> tuple[Rows]:
    """Compute the gradient of the features."""
    places = torch.arange(like.shape[1], device=like.device)[None, :, None]
    spread = wide(of_mean)[:, None] / like.shape[1]
    return ((spread + torch.where(places == place[:, None], wide(of_maximum)[:, None], 0)).to(like.dtype),)


def weigh_forward(features: Rows, weights: Tensor) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Multiply channels by weights [image, channel]; then mean and maximum over channels, and the maxima's channels."""
    weighted = features * weights[:, None]
    maxima, channel = weighted.max(dim=2)
    return weighted, wide(weighted).mean(dim=2).to(features.dtype), maxima, channel


def weigh_backward(
    of_weighted: Rows, of_mean: Tensor, of_maximum: Tensor, features: Rows, weights: Tensor, channel: Tensor
) -> tuple[Rows, Tensor]:
    """Compute the gradients of features and weights."""
    channels = torch.arange(features.shape[2], device=features.device)
    gradient = wide(of_weighted) + wide(of_mean)[:, :, None] / features.shape[2]
    gradient = gradient + torch.where(channels == channel[:, :, None], wide(of_maximum)[:, :, None], 0)
    of_weights = (gradient * wide(features)).sum(1)
    return (gradient * wide(weights)[:, None]).to(features.dtype), of_weights.to(weights.dtype)


def gate_forward(features: Rows, weights: Tensor) -> tuple[Rows]:
    """Multiply places by weights [image, place]."""
    return (features * weights[:, :, None],)


def gate_backward(gradient: Rows, features: Rows, weights: Tensor) -> tuple[Rows, Tensor]:
    """Compute the gradients of features and weights."""
    of_weights = (wide(gradient) * wide(features)).sum(2)
    return gradient * weights[:, :, None], of_weights.to(weights.dtype)


POOL, POOL_BACK = Chain(pool_forward), Chain(pool_backward)
WEIGH, WEIGH_BACK = Chain(weigh_forward), Chain(weigh_backward)
GATE, GATE_BACK = Chain(gate_forward), Chain(gate_backward)


class _Pool(torch.autograd.Function):
    """Mean and maximum over places."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, maximum, place = POOL(rows(features))
        ctx.save_for_backward(features, place)
        return mean, maximum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_maximum: Tensor) -> Tensor:
        features, place = ctx.saved_tensors
        (of_features,) = POOL_BACK(of_mean.contiguous(), of_maximum.contiguous(), place, rows(features))
        return maps(of_features, features)


class _Weigh(torch.autograd.Function):
    """Channels weighted, and [image, 2, height, width] of their means and maxima."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        weighted, mean, maximum, channel = WEIGH(rows(features), weights)
        ctx.save_for_backward(features, weights, channel)
        image, _, height, width = features.shape
        return maps(weighted, features), torch.stack([mean, maximum], dim=1).view(image, 2, height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_weighted: Tensor, of_pooled: Tensor) -> tuple[Tensor, Tensor]:
        features, weights, channel = ctx.saved_tensors
        of_mean, of_maximum = (each.contiguous() for each in of_pooled.flatten(2).unbind(1))
        flat = rows(of_weighted), of_mean, of_maximum, rows(features), weights, channel
        of_features, of_weights = WEIGH_BACK(*flat)
        return maps(of_features, features), of_weights


class _Gate(torch.autograd.Function):
    """Places weighted by [image, 1, height, width]."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor) -> Tensor:
        flat = weights.flatten(1).contiguous()
        ctx.save_for_backward(features, flat)
        (gated,) = GATE(rows(features), flat)
        return maps(gated, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        features, weights = ctx.saved_tensors
        of_features, of_weights = GATE_BACK(rows(gradient), rows(features), weights)
        image, _, height, width = features.shape
        return maps(of_features, features), of_weights.view(image, 1, height, width)


def attend(
    features: Float[Tensor, "image channel height width"],
    channel_weights: Callable[[Float[Tensor, "2 image channel"]], Float[Tensor, "image channel"]],
    place_weights: Callable[[Float[Tensor, "image 2 height width"]], Float[Tensor, "image 1 height width"]],
) -> Float[Tensor, "image channel height width"]:
    """Weight channels by a function of mean and maximum over places, then places by one of those over channels."""
    pooled = torch.stack(_Pool.apply(features))
    weighted, pooled = _Weigh.apply(features, channel_weights(pooled))
    attended: Tensor = _Gate.apply(weighted, place_weights(pooled))
    return attended
