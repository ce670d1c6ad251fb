"""Measurement of loops that train: seconds a step, of several loops in turn, and operators or kernels of a step."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from codistill.core.device import set_up_gpu
from codistill.core.files import write_atomically

# Beside a GPU the plain loop's workers fill their queues while others are measured, so that turns must be long; on a
# CPU short turns see the same minute of a busy machine.
ROUNDS = {"cuda": 5, "cpu": 20}


@dataclass(frozen=True)
class Contestant:
    """A loop that is measured: its name, a function that trains so many steps, and whether its algorithms repeat."""

    name: str
    train: Callable[[int], None]
    deterministic: bool


def timed(contestant: Contestant, steps: int, device: torch.device) -> float:
    """Return seconds a step, with all of the device's work done before and after."""
    set_up_gpu(device, contestant.deterministic)
    synchronise(device)
    started = time.perf_counter()
    contestant.train(steps)
    synchronise(device)
    return (time.perf_counter() - started) / steps


def synchronise(device: torch.device) -> None:
    """Wait for all work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds_in_turn(
    contestants: Sequence[Contestant], pace: Mapping[str, float], seconds: float, device: torch.device
) -> Mapping[str, list[float]]:
    """Return seconds a step of each contestant, by round, measured in turn until the time is up, at least once each.

    They have run before, on a GPU until their steps are captured; `pace` is about how long a step of each takes.
    """
    share = seconds / ROUNDS[device.type] / len(contestants)
    rounds: dict[str, list[float]] = {each.name: [] for each in contestants}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or not rounds[contestants[-1].name]:
        for each in contestants:
            last = rounds[each.name][-1] if rounds[each.name] else pace[each.name]
            rounds[each.name].append(timed(each, max(1, round(share / last)), device))
    return rounds


def ratio(rounds: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """Return the median over rounds of the ratio of two contestants' times: a busy minute strikes both."""
    pairs = zip(rounds[numerator], rounds[denominator], strict=True)
    return statistics.median(above / below for above, below in pairs)


class OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the operators that a step dispatches, backward and optimiser included, but for views and allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        allocates = func.name().split(".")[0] in ("aten::empty", "aten::empty_like", "aten::new_empty")
        self.operators += not (func.is_view or allocates)
        return func(*args, **(kwargs or {}))


def count_launches(contestant: Contestant, device: torch.device, table: Path | None) -> tuple[str, int]:
    """Count the kernels that one step launches on CUDA, or its operators on a CPU; write the slowest ones to `table`.

    The loop has run before, so that a captured step is one replay.
    """
    set_up_gpu(device, contestant.deterministic)
    on_gpu = device.type == "cuda"
    if on_gpu or table:
        synchronise(device)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as seen:
            contestant.train(1)
            synchronise(device)
        if table:
            key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            text = seen.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=100)
            write_atomically(table, text.encode())
        if on_gpu:
            kernels = [event for event in seen.events() or [] if event.device_type.name == "CUDA"]
            return "kernels", sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)
    with OperatorCount() as count:
        contestant.train(1)
    return "operators", count.operators
