"""Tensors, operators and graphs of a pretended GPU."""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

from .timeline import CAPTURING, Memory, Race, Stream, Timeline, spoil

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
# What answers the host, and what gives a tensor of a size that depends on values.
ANSWERS = (aten._local_scalar_dense, aten.equal, aten.is_nonzero)
SIZED_BY_VALUES = (aten.nonzero, aten.masked_select)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
MOVING = (aten.copy_, aten._to_copy, aten._foreach_copy_)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to all leaves of tuples, lists and dicts, which operators take; faster than torch's."""
    if type(tree) is tuple:
        return tuple([tree_map(function, each) for each in tree])
    if type(tree) is list:
        return [tree_map(function, each) for each in tree]
    if type(tree) is dict:
        return {name: tree_map(function, each) for name, each in tree.items()}
    return function(tree)


def tree_leaves(tree: Any) -> list[Any]:
    if type(tree) is tuple or type(tree) is list:
        return [leaf for each in tree for leaf in tree_leaves(each)]
    if type(tree) is dict:
        return [leaf for each in tree.values() for leaf in tree_leaves(each)]
    return [tree]


class GPUTensor(Tensor):
    """A tensor of the pretended device; `host` holds its values."""

    host: Tensor
    memory: Memory
    gpu: "GPU"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, memory: Memory, gpu: "GPU") -> "GPUTensor":
        made: GPUTensor = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )
        made.host, made.memory, made.gpu = host, memory, gpu
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    def cpu(self, *options: Any, **named: Any) -> Tensor:
        return self.to("cpu")

    def to(self, *options: Any, **named: Any) -> Tensor:
        device, dtype, _, layout = torch._C._nn._parse_to(*options, **named)
        if device is not None and device.type == "cpu":
            self.gpu.timeline.host_reads([self.memory])
            return self.host.detach().to(dtype or self.dtype, copy=True)
        if device is not None and device.type == "meta":
            return self.host.to("meta", dtype=dtype or self.dtype)
        if dtype is None and layout is None:
            return self
        return super().to(dtype=dtype or self.dtype, memory_format=layout or torch.preserve_format)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        taken = [leaf for leaf in tree_leaves(given) if isinstance(leaf, GPUTensor)]
        return taken[0].gpu.run(func, given, tree_map(values, given), taken)


@dataclass
class Operator:
    """A captured operator, and the tensors that it gives in memory of the graph's; none where it changes others."""

    call: Callable[[], Any]
    given: Sequence[Tensor] = ()
    memory: weakref.ref[Memory] | None = None

    def overwrite(self) -> None:
        """Mark free memory as overwritten by another graph."""
        if self.memory is not None and self.memory() is None:
            for each in self.given:
                spoil(each)

    def again(self) -> None:
        made = self.call()
        if self.given:
            for there, new in zip(self.given, tensors_in(made), strict=True):
                there.copy_(new)


class CUDAGraph:
    """Operators that can be computed again where they were captured; what they use must still be there."""

    def __init__(self, **options: Any) -> None:
        self.operators: list[Operator] = []
        self.read: list[weakref.ref[Memory]] = []
        self.written: list[weakref.ref[Memory]] = []
        self.gpu: GPU | None = None
        self.pool: object = self

    def replay(self) -> None:
        assert self.gpu is not None, "nothing was captured"
        read, written = ([each() for each in uses] for uses in (self.read, self.written))
        there = [[each for each in uses if each is not None] for uses in (read, written)]
        if there != [read, written]:
            raise Race("a graph uses memory that has been freed")
        self.gpu.timeline.launch(*there)
        self.gpu.replays += 1
        with torch.no_grad():
            for operator in self.operators:
                operator.again()
            for other in self.gpu.graphs - {self}:
                if other.pool == self.pool:
                    for operator in other.operators:
                        operator.overwrite()


class GPU(TorchFunctionMode):
    """The device and the operators that are asked of it.

    Attributes:
        timeline: Its streams.
        replays: How many graphs were replayed.
    """

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self.timeline = timeline
        self.replays = 0
        self.graphs: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()
        self.pools = itertools.count(1)
        self._graph: CUDAGraph | None = None
        self._pinned: set[int] = set()

    @property
    def capturing(self) -> bool:
        """Whether operators are noted down instead of computed."""
        return self._graph is not None

    @contextlib.contextmanager
    def capture(
        self, graph: CUDAGraph, pool: object = None, stream: Stream | None = None, **options: Any
    ) -> Iterator[None]:
        """Note operators down instead of computing them."""
        self.graphs.add(graph)
        graph.pool = pool or graph
        with self.timeline.capturing(graph, stream or Stream()):
            self._graph, graph.gpu = graph, self
            try:
                yield
            except BaseException:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
            finally:
                self._graph = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put what is made for the device, or sent to it, onto it."""
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            func(*args, **kwargs)
            self.timeline.join_after_backward()
            return None
        if func is Tensor.to and not isinstance(args[0], GPUTensor):
            asked = {name: value for name, value in kwargs.items() if name != "copy"}
            target, dtype, _, layout = torch._C._nn._parse_to(*args[1:], **asked)
            if target is not None and target.type == "cuda":
                return self._sent(args[0], dtype, layout or torch.preserve_format)
        if kwargs.pop("pin_memory", False) or func is Tensor.pin_memory:
            made = args[0].clone() if func is Tensor.pin_memory else func(*tree_map(values, args), **kwargs)
            self._pinned.add(made.untyped_storage().data_ptr())
            return made
        device = kwargs.get("device")
        if func is torch.device or device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        return self._made(func, args, {**kwargs, "device": "cpu"})

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        if any(isinstance(leaf, GPUTensor) for leaf in tree_leaves(args)):
            like: Tensor = func(*args, **{name: value for name, value in kwargs.items() if name != "device"})
            return like
        host, memory = func(*args, **kwargs), self.timeline.launch([])
        if self._graph is not None:
            if func in (torch.tensor, torch.as_tensor):
                raise RuntimeError(CAPTURING)
            self._graph.operators.append(Operator(lambda: func(*args, **kwargs), [host], weakref.ref(memory)))
        return GPUTensor(host.detach(), memory, self).requires_grad_(host.requires_grad)

    def _sent(self, tensor: Tensor, dtype: torch.dtype | None, layout: torch.memory_format) -> Tensor:
        self.timeline.refuse_in_capture()
        host = tensor.detach().to(dtype=dtype or tensor.dtype, copy=True, memory_format=layout)
        return GPUTensor(host, self.timeline.launch([]), self)

    def run(self, func: Any, given_to: Any, on_host: Any, taken: Sequence[GPUTensor]) -> Any:
        """Compute an operator that takes tensors of the device: its arguments, with their values, and the tensors."""
        packet, (args, kwargs), (host_args, host_kwargs) = func.overloadpacket, given_to, on_host
        memories = [each.memory for each in taken]
        if waits_for_host(func, args):
            self.timeline.host_reads(memories)
        if packet in ANSWERS:
            return func(*host_args, **host_kwargs)
        if packet is aten.copy_ and not isinstance(args[0], GPUTensor):
            return self._copied_to_host(args[0], args[1], waits=not (args[2:] and args[2]))
        self._refuse_mixed(packet, args, kwargs)
        changed = [each.memory for each in written_by(func, args, kwargs)]
        view = is_view(func)
        fresh = memories[0] if view else self.timeline.launch(memories, changed)
        if self._graph is None or view:
            given = func(*host_args, **host_kwargs)
        else:
            given = self._noted(self._graph, fresh, func, host_args, host_kwargs)
            outside = [each for each in memories if each.captured_by is not self._graph]
            self._graph.read += map(weakref.ref, outside)
            self._graph.written += [weakref.ref(each) for each in changed if each in outside]
        places = {each.host.untyped_storage().data_ptr(): each.memory for each in taken}

        def wrapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return GPUTensor(leaf, places.get(leaf.untyped_storage().data_ptr(), fresh), self)

        return return_and_correct_aliasing(func, args, kwargs, tree_map(wrapped, given))

    def _noted(self, graph: CUDAGraph, memory: Memory, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute an operator on copies, for the shapes only, and note it down."""
        given = func(*tree_map(copied, args), **tree_map(copied, kwargs))
        changes = any(result.alias_info for result in func._schema.returns) or not func._schema.returns
        new = [] if changes else [spoil(each) for each in tensors_in(given)]
        operator = Operator(lambda: func(*args, **kwargs), new, weakref.ref(memory))
        graph.operators.append(operator)
        return given

    def _copied_to_host(self, target: Tensor, source: GPUTensor, waits: bool) -> Tensor:
        if waits or target.untyped_storage().data_ptr() not in self._pinned:
            self.timeline.host_reads([source.memory])
            return target.copy_(source.host)
        self.timeline.send_to_host(target, source.host, source.memory)
        return target

    def _refuse_mixed(self, packet: Any, args: Any, kwargs: dict[str, Any]) -> None:
        plain = [each for each in tensors_in((args, kwargs)) if not isinstance(each, GPUTensor)]
        if packet in MOVING and plain:
            self.timeline.refuse_in_capture()
        elif packet not in INDEXING and any(each.ndim for each in plain):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two: cuda:0 and cpu!")


def waits_for_host(func: Any, args: Any) -> bool:
    """Whether an operator gives the host a value, or a tensor whose size depends on values."""
    packet = func.overloadpacket
    masked = packet in INDEXING and any(each.dtype in (torch.bool, torch.uint8) for each in tensors_in(args[1]))
    return masked or packet in ANSWERS + SIZED_BY_VALUES


def values(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, GPUTensor) else leaf


def copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@functools.cache
def is_view(func: Any) -> bool:
    """Whether what an operator returns is in the memory of an argument."""
    return any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)


@functools.cache
def written_places(func: Any) -> list[tuple[int, str]]:
    """List the arguments that an operator changes, by place and name."""
    # Batch normalisation does not say that it changes its running statistics.
    hidden = ("running_mean", "running_var") if func is aten.native_batch_norm.default else ()
    arguments = enumerate(func._schema.arguments)
    written = ((at, each.name, each.alias_info) for at, each in arguments)
    return [(at, name) for at, name, alias in written if (alias and alias.is_write) or name in hidden]


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[GPUTensor]:
    """List the tensors that an operator changes."""
    changed = [args[at] if at < len(args) else kwargs.get(name) for at, name in written_places(func)]
    return [each for each in tree_leaves(changed) if isinstance(each, GPUTensor)]
