"""A CUDA device that is not there: the same Python runs as on a GPU, and what a GPU would punish is an error.

Its tensors say that they are on cuda:0 and compute on the CPU. A captured graph is a list of operators; capturing
computes nothing, as on a GPU, and leaves garbage in what it gives; replaying computes them again in the same memory.
Streams are vector clocks: an operator that reads or overwrites what another stream may still be busy with is an error,
and so is memory that goes to another tensor while a stream may still use it, or a graph does. A copy to pinned memory
that does not wait arrives when the host waits for it. Backward passes run on the streams of their forward passes, which
wait for each other's gradients, as autograd's engine has it.

Not pretended: kernels, their speed, their rounding, memory that runs out, and torch.compile.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .device import GPU, CUDAGraph
from .timeline import Event, Race, Stream, Timeline, current

__all__ = ["GPU", "Race", "pretended"]


@contextlib.contextmanager
def pretended() -> Iterator[GPU]:
    """Pretend that torch.cuda has a device."""
    with current(Timeline()) as timeline:
        device = GPU(timeline)
        plain = torch.autocast
        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "get_device_name": lambda device=None: "Pretended GPU",
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda *options: True,
            "_lazy_init": lambda: None,
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": device.capture,
            "is_current_stream_capturing": lambda: device.capturing,
            "graph_pool_handle": lambda: (0, next(device.pools)),
            "set_device": lambda device: None,
            "stream": timeline.on,
            "current_stream": lambda device=None: timeline.stream(),
            "synchronize": timeline.synchronize,
            "memory_allocated": lambda device=None: 2**20,
            "max_memory_allocated": lambda device=None: 2**24,
            "max_memory_reserved": lambda device=None: 2**25,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
            "default_generators": (torch.default_generator,),
            "mem_get_info": lambda device=None: (2**33, 2**34),
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cuda.items():
                patch.setattr(torch.cuda, name, value)
            patch.setattr(torch.accelerator, "is_available", lambda: False)  # data loaders pin no memory
            patch.setattr(torch, "autocast", lambda kind, *options, **named: plain("cpu", *options, **named))
            grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype

            def by_device(tensors: Any, with_indices: bool = False) -> Any:  # it is written in C++, and sees the host
                found = grouped(tensors, with_indices).items()
                return {(tensors[0][0].device, kind): group for (_, kind), group in found}

            patch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(by_device))
            # Tensors of another kind cannot take a parameter's place: modules get new parameters.
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            try:
                with device:
                    yield device
            finally:
                torch.__future__.set_overwrite_module_params_on_conversion(False)
