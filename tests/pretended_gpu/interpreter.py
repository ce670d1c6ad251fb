"""Triton's kernels on a pretended GPU, in Triton's interpreter."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .device import GPU, GPUTensor, Operator, values


@contextlib.contextmanager
def interpreting(gpu: GPU) -> Iterator[None]:
    """Let kernels that are given tensors of the device be launched on it; TRITON_INTERPRET has to be set before."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(leaf, GPUTensor) for leaf in tree_leaves((args, kwargs))):
            launched(gpu, lambda a, k: run(executor, *a, **k), args, kwargs)
        else:
            run(executor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        yield


def launched(gpu: GPU, kernel: Callable[[Any, Any], None], args: Any, kwargs: Any) -> None:
    """Launch a kernel, or note it down where a graph is captured."""
    taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, GPUTensor)]
    changed = written_by(kernel, args, kwargs)
    memories = [each.memory for each in taken]
    gpu.timeline.launch(memories, changed)
    hosts = tree_map(values, (args, kwargs))
    if gpu._graph is None:
        kernel(*hosts)
        return
    gpu._graph.operators.append(Operator(lambda: kernel(*hosts)))
    gpu._graph.read += [weakref.ref(each) for each in memories if each.captured_by is not gpu._graph]
    gpu._graph.written += [weakref.ref(each) for each in changed if each.captured_by is not gpu._graph]


def written_by(kernel: Callable[[Any, Any], None], args: Any, kwargs: Any) -> list[Any]:
    """Find the memory that a kernel writes, by running it on copies with numbers of their own."""
    copies: list[tuple[GPUTensor, Tensor, Tensor]] = []

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, GPUTensor):
            return leaf
        copy = leaf.host.clone()
        if copy.is_floating_point():
            copy.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(copies)))
        copies.append((leaf, copy, copy.clone()))
        return copy

    kernel(*tree_map(copied, (args, kwargs)))
    return [leaf.memory for leaf, copy, before in copies if not torch.equal(copy, before)]
