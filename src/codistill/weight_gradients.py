"""Gradients of convolutions' weights on streams of their own: in a backward pass nothing waits for them but its end."""

# mypy: disable-error-code="no-untyped-call"

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

IN_FLIGHT = 8
"""Gradients that may be under way beside a stream, at most: what they read is held until it is known to be read."""


class SideStream:
    """A stream that runs beside the one that gives it work, and that the GPU attends to where there is room.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._in_flight: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def compute(self, function: Callable[[], tuple[Tensor | None, ...]], *read: Tensor) -> tuple[Tensor | None, ...]:
        """Call a function on this stream, after what the current one has been given so far.

        Args:
            function: Gives tensors that may be used once `join` was called.
            read: The tensors that it reads; the allocator does not know that this stream does.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
            done = torch.cuda.Event()
            done.record(self._stream)
        self._in_flight.append((done, read))
        while len(self._in_flight) > IN_FLIGHT:
            oldest, _ = self._in_flight[0]
            current.wait_event(oldest)
            self._in_flight.popleft()
        return result

    def join(self) -> None:
        """Let the current stream wait for all that this one was given since the last time."""
        if self._in_flight:  # else it may not be part of what is captured
            torch.cuda.current_stream().wait_stream(self._stream)
            self._in_flight.clear()


class WeightGradients:
    """Side streams for the weights' gradients, one beside each stream that a forward pass uses.

    A chain of small layers is as long as its launches one after the other. In the backward pass of a convolution only
    the gradient of its input is needed for the next layer's; that of its weight can be computed meanwhile.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside: dict[torch.cuda.Stream, SideStream] = {}

    def side(self) -> SideStream:
        """Give the stream beside the current one."""
        return self._beside.setdefault(torch.cuda.current_stream(), SideStream(self._device))

    def join(self) -> None:
        """Let the current stream wait for all side streams."""
        for side in self._beside.values():
            side.join()

    def of(self, weights: Iterable[Tensor]) -> TorchFunctionMode:
        """Make the context of a forward pass whose convolutions with these weights have their gradients aside.

        Args:
            weights: Their gradients go, untouched, to a function that calls `join` first. A weight that is used twice
                in the pass has its gradients in the backward pass itself, which adds them up.
        """
        return _Watching(self, weights)


class _Watching(TorchFunctionMode):
    def __init__(self, gradients: WeightGradients, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._gradients = gradients
        # The weights themselves are kept, so that no other tensor can have the identity of one.
        self._uses = {id(weight): (weight, _Uses()) for weight in weights}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.conv2d or len(args) < 2 or id(args[1]) not in self._uses:
            return func(*args, **kwargs)
        return self._convolved(*args, **kwargs)

    def _convolved(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        uses = self._uses[id(weight)][1]
        uses.count += 1
        arguments = (_pair(stride), padding, _pair(dilation), groups)
        if isinstance(padding, str) or not weight.requires_grad or not torch.is_grad_enabled():
            return F.conv2d(features, weight, bias, *arguments)
        # What autocast would do inside; here the backward pass needs what was really convolved.
        features = features.to(weight.dtype)
        side = self._gradients.side()
        result: Tensor = _Convolution.apply(
            side, uses, features, weight, bias, (arguments[0], _pair(padding), *arguments[2:])
        )
        return result


@dataclass
class _Uses:
    """How often a weight was used in a forward pass."""

    count: int = 0


def _pair(value: Any) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [value, value]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, side: SideStream, uses: _Uses, features: Tensor, weight: Tensor, bias: Tensor | None, arguments: Any
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.side, ctx.uses, ctx.arguments = side, uses, arguments
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return F.conv2d(features, weight, bias, *arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        _, _, of_features, of_weight, of_bias, _ = ctx.needs_input_grad

        def gradients(wanted: list[bool]) -> tuple[Tensor | None, ...]:
            found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
                gradient, features, weight, ctx.bias_sizes, stride, padding, dilation, False, [0, 0], groups, wanted
            )
            return found

        parameters = [False, of_weight, of_bias]
        if ctx.uses.count > 1:
            _, weight_gradient, bias_gradient = gradients(parameters)
        else:
            _, weight_gradient, bias_gradient = ctx.side.compute(
                lambda: gradients(parameters), gradient, features, weight
            )
        feature_gradient = gradients([True, False, False])[0] if of_features else None
        return None, None, feature_gradient, weight_gradient, bias_gradient, None
