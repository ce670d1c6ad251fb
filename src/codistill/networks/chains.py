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
from codistill.core.errors import typed_reason

Maps = Float[Tensor, "image channel height width"]
Rows = Float[Tensor, "image place channel"]
Channels = Float[Tensor, " channel"]
Code = Callable[..., Any]


class Compiler:
    """What turns the functions of chains into code, with options of Inductor.

    Attributes:
        failed: Whether a compilation has failed; from then on stock PyTorch runs.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.failed = options, False

    def compile(self, function: Code, arguments: Sequence[Tensor]) -> Code:
        """Compile a function for the shapes of arguments."""
        if self.failed:
            return function
        try:
            return inductor(function, arguments, self.options)
        except Exception as error:
            self.failed = True
            reason = typed_reason(error, 200)
            warn_once(f"compilation failed, training goes on without a compiler, more slowly: {reason}")
            return function


def inductor(function: Code, arguments: Sequence[Tensor], options: dict[str, Any]) -> Code:
    """Compile a function of tensors for their very shapes, strides and types, with Inductor."""
    # They take seconds to import, which runs without them need not wait for.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU on machines without one
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without a shape environment Inductor's cache is passed over: a second run would generate all code again.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    examples = [mode.from_tensor(each.detach(), static_shapes=True) for each in arguments]
    with torch.no_grad(), config.patch(options), tracing(TracingContext(mode)):
        with mode:
            traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*examples)
        for node in traced.graph.nodes:
            node.type = None  # annotations of ours, which the cache cannot pickle
        code = compile_fx_inner(traced, examples)
    return lambda *given: code(list(given))


_compiler: Compiler | None = None


@contextlib.contextmanager
def compiled_chains(compiler: Compiler | None) -> Iterator[None]:
    """Have chains run compiled in training until the context ends; None: have stock PyTorch run."""
    global _compiler
    before, _compiler = _compiler, compiler
    try:
        yield
    finally:
        _compiler = before


class Chain:
    """A function of tensors, called as its code for the number of them and for shape and type of the first one.

    It returns a tuple. Maps are in channels_last memory format (see `last`), all other tensors contiguous.
    """

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


def last(features: Maps) -> Maps:
    """Return maps in channels_last memory format."""
    return features.contiguous(memory_format=torch.channels_last)


def rows(features: Maps) -> Rows:
    """Return maps in channels_last memory format as [image, place, channel], a view."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def maps(of: Rows, like: Maps) -> Maps:
    """Return [image, place, channel] as maps of the height and width of others, a view."""
    return of.view(len(of), *like.shape[2:], -1).permute(0, 3, 1, 2)


def total(of: Rows) -> Channels:
    """Sum over places, then over images."""
    return of.sum(1).sum(0)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the type that is computed in: float32, or float64 for float64."""
    return tensor.float() if tensor.dtype != torch.float64 else tensor


# Batch normalisation with the statistics of the batch, then an addition, then ReLU.


def norm_forward(
    features: Maps, weight: Channels, bias: Channels, epsilon: float, act: bool, shortcut: Maps | None = None
) -> tuple[Maps, Channels, Channels, Channels]:
    """Compute act(norm(features) + shortcut), and mean, 1 / deviation and variance of the batch."""
    values = wide(rows(features))
    count = values.shape[0] * values.shape[1]
    # Sums of what is left after one of the values was taken from all: squares of large means would cancel.
    origin = values[0, 0]
    centred = values - origin
    shift = total(centred) / count
    variance = total(centred * centred) / count - shift * shift
    mean, inverse = origin + shift, torch.rsqrt(variance + epsilon)
    result = (values - mean) * (inverse * weight) + bias
    if shortcut is not None:
        result = result + wide(rows(shortcut))
    result = torch.relu(result) if act else result
    return maps(result.to(features.dtype), features), mean, inverse, variance


def norm_backward(
    gradients: Sequence[Maps],
    features: Maps,
    mean: Channels,
    inverse: Channels,
    weight: Channels,
    result: Maps | Channels | None,
) -> tuple[Maps, Channels, Channels, Maps]:
    """Compute the gradients of features, weight, bias and shortcut, from those of a result that is used once or twice.

    `result` is there where ReLU was applied; or, where nothing was added, the bias, from which its sign is computed
    again: maps of float32 take longer to read than that.
    """
    reached = rows(gradients[0] if len(gradients) == 1 else gradients[0] + gradients[1])
    centred = wide(rows(features)) - mean
    if result is not None:
        passed = rows(result) if result.ndim == 4 else centred * (inverse * weight) + result
        reached = torch.where(passed > 0, reached, 0)
    values, normalised = wide(reached), centred * inverse
    of_bias, of_weight = total(values), total(values * normalised)
    part = 1 / (values.shape[0] * values.shape[1])  # a division for each of all values would take longer
    of_features = (values - of_bias * part - normalised * (of_weight * part)) * (weight * inverse)
    return maps(of_features.to(features.dtype), features), of_weight, of_bias, maps(reached, features)


@functools.cache
def norm_forward_chain(epsilon: float, act: bool) -> Chain:
    """Return the chain of a batch normalisation and what follows it."""

    def forward(features: Maps, weight: Channels, bias: Channels, *shortcut: Maps) -> tuple[Tensor, ...]:
        return norm_forward(features, weight, bias, epsilon, act, *shortcut)

    return Chain(forward)


@functools.cache
def norm_backward_chain(act: bool, added: bool) -> Chain:
    """Return the chain of its gradients, with or without that of a shortcut; the result's are one or two."""

    def backward(features: Maps, mean: Channels, inverse: Channels, weight: Channels, *more: Tensor) -> Any:
        result, gradients = (more[0], more[1:]) if act else (None, more)
        return norm_backward(gradients, features, mean, inverse, weight, result)[: 3 + added]

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
        features, added = last(features), () if shortcut is None else (last(shortcut),)
        result, mean, inverse, variance = norm_forward_chain(epsilon, act)(features, weight, bias, *added)
        sign = bias if shortcut is None and features is wide(features) else result
        ctx.save_for_backward(features, mean, inverse, weight, *([sign] if act else []))
        ctx.act, ctx.added = act, shortcut is not None
        ctx.mark_non_differentiable(mean, variance)
        return result, result.detach(), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [last(each) for each in gradients[:2] if each is not None]
        # With neither ReLU nor a second use, the shortcut's gradient is the result's.
        computes = ctx.added and (ctx.act or len(given) > 1)
        of_features, of_weight, of_bias, *reached = norm_backward_chain(ctx.act, computes)(*ctx.saved_tensors, *given)
        of_shortcut = (reached[0] if computes else given[0]) if ctx.added else None
        return of_features, of_weight, of_bias, of_shortcut, None, None


def norm_act(norm: nn.BatchNorm2d, features: Maps, act: bool, shortcut: Maps | None = None) -> Maps | None:
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


def second_use(features: Maps) -> Maps:
    """Return the same features for another use of them, whose gradient the chain that made them adds itself."""
    twin: Tensor = getattr(features, "twin", features)
    return twin


# Dual attention: pooling over places, weights of channels and pooling over channels, weights of places.


def pool_forward(features: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean and maximum over places, [image, channel] each, and the places of the maxima."""
    maxima, place = rows(features).max(dim=1)
    return wide(rows(features)).mean(dim=1).to(features.dtype), maxima, place


def pool_backward(features: Maps, place: Tensor, of_mean: Tensor, of_maximum: Tensor) -> tuple[Maps]:
    """Compute the gradient of the features."""
    places = torch.arange(features.shape[2] * features.shape[3], device=features.device)[None, :, None]
    of_maxima = torch.where(places == place[:, None], wide(of_maximum)[:, None], 0)
    gradient = wide(of_mean)[:, None] / places.shape[1] + of_maxima
    return (maps(gradient.to(features.dtype), features),)


def weigh_forward(features: Maps, weights: Tensor) -> tuple[Maps, Tensor, Tensor]:
    """Multiply channels by weights [image, channel]; then mean and maximum over channels, and the maxima's channels."""
    weighted = rows(features) * weights[:, None]
    maxima, channel = weighted.max(dim=2)
    pooled = torch.stack([wide(weighted).mean(dim=2).to(features.dtype), maxima], dim=1)
    return maps(weighted, features), pooled.view(-1, 2, *features.shape[2:]), channel


def weigh_backward(
    features: Maps, weights: Tensor, channel: Tensor, of_weighted: Maps, of_pooled: Tensor
) -> tuple[Maps, Tensor]:
    """Compute the gradients of features and weights."""
    channels = torch.arange(features.shape[1], device=features.device)
    of_mean, of_maximum = wide(of_pooled).flatten(2).unsqueeze(3).unbind(1)
    gradient = wide(rows(of_weighted)) + of_mean / features.shape[1]
    gradient = gradient + torch.where(channels == channel[:, :, None], of_maximum, 0)
    of_weights = (gradient * wide(rows(features))).sum(1)
    of_features = (gradient * wide(weights)[:, None]).to(features.dtype)
    return maps(of_features, features), of_weights.to(weights.dtype)


def gate_forward(features: Maps, weights: Tensor) -> tuple[Maps]:
    """Multiply places by weights [image, 1, height, width]."""
    return (maps(rows(features) * weights.flatten(1)[:, :, None], features),)


def gate_backward(features: Maps, weights: Tensor, gradient: Maps) -> tuple[Maps, Tensor]:
    """Compute the gradients of features and weights."""
    of_weights = (wide(rows(gradient)) * wide(rows(features))).sum(2)
    return gate_forward(gradient, weights)[0], of_weights.to(weights.dtype).view(weights.shape)


POOL, POOL_BACK = Chain(pool_forward), Chain(pool_backward)
WEIGH, WEIGH_BACK = Chain(weigh_forward), Chain(weigh_backward)
GATE, GATE_BACK = Chain(gate_forward), Chain(gate_backward)


class _Pool(torch.autograd.Function):
    """Mean and maximum over places."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        features = last(features)
        mean, maximum, place = POOL(features)
        ctx.save_for_backward(features, place)
        return mean, maximum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_maximum: Tensor) -> Tensor:
        (of_features,) = POOL_BACK(*ctx.saved_tensors, of_mean.contiguous(), of_maximum.contiguous())
        gradient: Tensor = of_features
        return gradient


class _Weigh(torch.autograd.Function):
    """Channels weighted, and [image, 2, height, width] of their means and maxima."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        features, weights = last(features), weights.contiguous()
        weighted, pooled, channel = WEIGH(features, weights)
        ctx.save_for_backward(features, weights, channel)
        return weighted, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_weighted: Tensor, of_pooled: Tensor) -> Any:
        return WEIGH_BACK(*ctx.saved_tensors, last(of_weighted), of_pooled.contiguous())


class _Gate(torch.autograd.Function):
    """Places weighted by [image, 1, height, width]."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor) -> Tensor:
        features, weights = last(features), weights.contiguous()
        ctx.save_for_backward(features, weights)
        gated: Tensor = GATE(features, weights)[0]
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return GATE_BACK(*ctx.saved_tensors, last(gradient))


def attend(
    features: Maps,
    channel_weights: Callable[[Float[Tensor, "2 image channel"]], Float[Tensor, "image channel"]],
    place_weights: Callable[[Float[Tensor, "image 2 height width"]], Float[Tensor, "image 1 height width"]],
) -> Maps:
    """Weight channels by a function of mean and maximum over places, then places by one of those over channels."""
    pooled = torch.stack(_Pool.apply(features))
    weighted, pooled = _Weigh.apply(features, channel_weights(pooled))
    attended: Tensor = _Gate.apply(weighted, place_weights(pooled))
    return attended
