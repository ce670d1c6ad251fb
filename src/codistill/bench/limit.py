"""A measured limit of a training step: its convolutions and matrix products alone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
PRODUCTS = (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
Call = tuple[Any, Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Form:
    """All of a tensor but its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """Return the form of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def filled(self) -> Tensor:
        """Make a tensor of this form with random values."""
        size = 1 + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))
        memory = torch.empty(size, dtype=self.dtype, device=self.device).uniform_(-1, 1)
        return memory.as_strided(self.shape, self.stride)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note down the convolutions and matrix products of what runs, with the forms of their tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, *tree_map_only(Tensor, Form.of, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def products_loop(train: Callable[[int], None], device: torch.device) -> Callable[[int], None]:
    """Make a loop whose steps are only the convolutions and matrix products of an eager step of another loop.

    Forward and backward, with the same shapes, layouts and types, in the same order; on CUDA as one graph.
    """
    with Products() as products:
        train(1)
    # One tensor for all of a form, so that hundreds of calls need little memory.
    filled = functools.cache(Form.filled)
    calls = [(func, *tree_map_only(Form, filled, (args, kwargs))) for func, args, kwargs in products.calls]

    def step() -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    graph: torch.cuda.CUDAGraph | None = None
    if device.type == "cuda":
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

    @torch.no_grad()
    def loop(steps: int) -> None:
        for _ in range(steps):
            if graph is None:
                step()
            else:  # it reads the tensors of `calls`, which `step` holds
                graph.replay()

    return loop
