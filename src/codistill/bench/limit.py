"""A measured limit of a training step: its convolutions and matrix products alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
PRODUCTS = (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
Call = tuple[Any, Sequence[Any], Mapping[str, Any]]


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note down the convolutions and matrix products of what runs, with tensors that only look like theirs.

    Tensors of one shape, layout and type are one and the same, so that hundreds of calls need little memory.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, *tree_map_only(Tensor, self._like, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def _like(self, tensor: Tensor) -> Tensor:
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._tensors:
            size = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            memory = torch.empty(size, dtype=tensor.dtype, device=tensor.device).uniform_(-1, 1)
            self._tensors[key] = memory.as_strided(tensor.shape, tensor.stride())
        return self._tensors[key]


def products_loop(train: Callable[[int], None], device: torch.device) -> Callable[[int], None]:
    """Make a loop whose steps are only the convolutions and matrix products of an eager step of another loop.

    Forward and backward, with the same shapes, layouts and types, in the same order; on CUDA as one graph.
    """
    with Products() as products:
        train(1)

    def step() -> None:
        for func, args, kwargs in products.calls:
            func(*args, **kwargs)

    if device.type == "cuda":
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay

    def loop(steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                step()

    return loop
