"""How runs share the cores of a CPU: threads of a run, processes of several, chosen by a short measurement."""

import contextlib
import functools
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from codistill.core.console import note
from codistill.core.host import BINDING, NUMBERS, cores, free_memory, set_threads
from codistill.data.augment import epoch_indices
from codistill.networks.probe import probing
from codistill.training.prepare import DeviceSplits, Plan
from codistill.training.processes import can_fork, run_in_processes
from codistill.training.step import make_step

WORTH_SECONDS = 20.0  # of training; for less nothing is measured
DISTINCTLY = 1.15  # results depend on the number of threads: another one must be worth it
ROUNDS = 3
PACE_SECONDS = 1.0
ALLOWANCE = 1.3  # evaluation and checkpoints take memory of their own
USED_SHARE = 0.9


def chosen_by_user(plan: Plan) -> bool:
    """Whether settings or variables name the number of threads, or where they run."""
    return plan.config.execution.threads is not None or bool((NUMBERS | BINDING) & os.environ.keys())


def steps_of(plan: Plan) -> int:
    """Return the number of steps of a run."""
    images = len(plan.data.train if plan.training is None else plan.training)
    return plan.config.train.epochs * math.ceil(images / plan.config.train.batch_size)


@contextlib.contextmanager
def timed_steps(plan: Plan, splits: DeviceSplits) -> Iterator[Callable[[int], float]]:
    """Yield a function that trains a copy of a run for a step with so many threads, and returns the seconds it took."""
    settings, images = plan.config.train, splits.subset(plan.training)
    with probing(plan.method, plan.device) as probe, torch.enable_grad():
        batch = min(settings.batch_size, len(images))
        images = images.for_steps(batch)
        step = make_step(probe, images, plan.augmentation, settings, plan.config.execution.precision)
        indices = epoch_indices(batch, 0, 0, plan.augmentation, plan.device, probe.views)
        indices = next(images.staged(indices, [(0, batch)]))
        progress = torch.zeros((), device=plan.device)

        def seconds(threads: int) -> float:
            set_threads(threads)
            started = time.perf_counter()
            step(indices, progress)
            return time.perf_counter() - started

        yield seconds


def choose_threads(plan: Plan, splits: DeviceSplits) -> None:
    """Set fewer threads for a run that is alone on a CPU, where its steps are distinctly faster with them.

    They are where other programs keep cores busy: at the end of each operator the threads wait for the slowest one.
    """
    most = torch.get_num_threads()
    if plan.device.type != "cpu" or most == 1 or chosen_by_user(plan):
        return
    chosen = most
    try:
        with timed_steps(plan, splits) as seconds:
            first = seconds(most // 2)
            if first * steps_of(plan) < WORTH_SECONDS:
                return
            while chosen > 1 and (gain := speed_up(seconds, chosen // 2, chosen)) >= DISTINCTLY:
                chosen //= 2
                times = gain
    finally:
        set_threads(chosen)
    if chosen < most:
        note(
            f"{chosen} of {most} threads: a step takes {times:.1f} times as long with {2 * chosen}, as where other "
            f"programs keep cores busy; --threads {most} uses all (results round otherwise)"
        )


def speed_up(seconds: Callable[[int], float], fewer: int, more: int) -> float:
    """Measure in turn how many times as long a step takes with more threads as with fewer, above or below 1."""
    ratios: list[float] = []
    for _ in range(ROUNDS):
        ratios.append(seconds(more) / seconds(fewer))
        if ratios[0] < 1 or ratios[0] > 2:  # clear
            break
    return statistics.median(ratios)


def share_cores(plans: Sequence[Plan], splits: DeviceSplits) -> tuple[int, int]:
    """Choose how many processes train runs at a time on a CPU, and the threads of each, by a short measurement.

    One process after the other with all threads is always among the choices, so that no other is taken that is slower.
    A number of threads that the user has chosen stays. No more processes than memory holds.

    Returns:
        Processes, 1 where the runs train in this one, and threads.
    """
    most = torch.get_num_threads()
    fixed = chosen_by_user(plans[0])
    largest = min(len(plans), cores() // most if fixed else most)
    if largest < 2 or plans[0].device.type != "cpu" or BINDING & os.environ.keys() or not can_fork():
        return 1, most
    _ = splits.train, splits.validation, splits.test  # once, for all processes
    kinds = {plan.kind: plan for plan in plans}
    runs = len(plans)
    alone = {name: measure([plan], splits, most, runs) for name, plan in kinds.items()}
    heaviest = kinds[min(alone, key=lambda name: alone[name][0])]
    steps_a_second, need = min(alone.values())[0], max(memory for _, memory in alone.values())
    if steps_a_second == 0 or runs * steps_of(heaviest) / steps_a_second < WORTH_SECONDS:
        return 1, most
    best, chosen = runs / steps_a_second, (1, most)
    count = int(max(1, min(largest, free_memory() * USED_SHARE / max(1, need * ALLOWANCE))))
    while count > 1:
        threads = most if fixed else most // count
        together = measure([heaviest] * count, splits, threads)[0]
        if together and (takes := math.ceil(runs / count) * count / together) < best:
            best, chosen = takes, (count, threads)
        count //= 2
    return chosen


def measure(plans: Sequence[Plan], splits: DeviceSplits, threads: int, runs: int | None = None) -> tuple[float, float]:
    """Return steps a second of runs that train at the same time, a process each, and the largest one's memory, bytes.

    Both are 0 where one of them fails. Where `runs` such runs take too little time to be worth it, one step is timed.
    """
    works = [functools.partial(measure_here, plan, splits, threads, runs) for plan in plans]
    found = [each for each in run_in_processes(works, len(works)) if not isinstance(each, Exception)]
    if len(found) < len(plans):
        return 0.0, 0.0
    return sum(steps for steps, _ in found), max(memory for _, memory in found)


def measure_here(plan: Plan, splits: DeviceSplits, threads: int, runs: int | None) -> tuple[float, float]:
    """Return steps a second of a run in this process, and the memory that it takes beside what was there, bytes."""
    before, times = peak_memory(), list[float]()
    with timed_steps(plan, splits) as seconds:
        first = seconds(threads)
        if runs is not None and runs * steps_of(plan) * first < WORTH_SECONDS:
            return 1 / first, peak_memory() - before
        while sum(times) < PACE_SECONDS or len(times) < 2:
            times.append(seconds(threads))
    return len(times) / sum(times), peak_memory() - before


def peak_memory() -> float:
    """Return the most memory that this process has held, bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
