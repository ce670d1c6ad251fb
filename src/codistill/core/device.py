"""Device and precision."""

import os
import re
import time
from typing import Literal

import torch

from codistill.core.errors import UsageError


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Make the context that forward passes run in: bf16 autocast, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def fast_bf16(device: torch.device) -> Literal["Ampere", "AMX", "avx512_bf16", ""]:
    """Return what a device has that computes fast in bf16, an NVIDIA GPU of its generation or later; empty: nothing."""
    if device.type == "cuda":
        return "Ampere" if torch.cuda.get_device_capability(device) >= (8, 0) else ""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else ""


def choose_precision(asked: Literal["float32", "bf16", "auto"], device: torch.device) -> Literal["float32", "bf16"]:
    """Return the precision that a setting means on a device."""
    if asked == "auto":
        return "bf16" if fast_bf16(device) else "float32"
    return asked


def choose_device(name: str, precision: str) -> torch.device:
    """Return the device that a setting names.

    Raises:
        UsageError: No such device, or one that cannot compute in bf16; never a silent fall to the CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:(0|[1-9]\d?))?", name):
        raise UsageError(f"device {name!r}: choose cpu, cuda, cuda:<number> or auto")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"device {name!r}: this machine has {count} CUDA devices: choose --device cpu or auto")
        if precision == "bf16" and not torch.cuda.is_bf16_supported():
            raise UsageError(f"precision bf16: {torch.cuda.get_device_name(device)} cannot: use --precision float32")
    return device


def set_up_gpu(device: torch.device, deterministic: bool) -> None:
    """Make a GPU the current one and choose its algorithms, for the whole process; a CPU is left as it is.

    The fastest convolutions are found by trial and may differ between processes; deterministic ones, to be chosen
    before the first matrix product on the device, repeat bit for bit.
    """
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
        # All memory is written before it is read here: filling it first only costs launches.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = not deterministic


def critical_stream(device: torch.device) -> torch.cuda.Stream:
    """Make a stream for work that other work waits for: the GPU prefers it to that of side streams."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


class Stopwatch:
    """Measure the time that a device works between two moments, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        count = 2 if device.type == "cuda" else 0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]
        self._moments = [0.0, 0.0]

    def start(self) -> None:
        """Mark the beginning."""
        self._mark(0)

    def stop(self) -> None:
        """Mark the end."""
        self._mark(1)

    def _mark(self, index: int) -> None:
        self._moments[index] = time.perf_counter()
        if self._events:
            self._events[index].record()

    def seconds(self) -> float:
        """Return the time between both; on a GPU the host must have waited for the end."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._moments[1] - self._moments[0]
