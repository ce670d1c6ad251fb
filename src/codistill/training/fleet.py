"""Runs that train side by side: on CUDA in one process, as many at a time as memory holds; on a CPU in several."""

import contextlib
import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from codistill.core.console import note, warn
from codistill.core.device import choose_device
from codistill.core.errors import DivergedError, UsageError, WorkerError
from codistill.core.host import set_threads
from codistill.core.imports import resuming
from codistill.core.torchrun import refuse_ranks
from codistill.data.augment import epoch_indices
from codistill.deploy.run import Run
from codistill.evaluation.evaluation import EVALUATION_BATCH, evaluate
from codistill.networks.probe import copied
from codistill.runs.folder import Continued, refuse_occupied
from codistill.runs.metadata import run_metadata
from codistill.runs.summary import write_summary_of_failure
from codistill.settings.build import load_named_data
from codistill.settings.config import SHARED, RunConfig
from codistill.training.loop import train_loop
from codistill.training.prepare import DeviceSplits, Plan, announce, build_taught, check, out_of_memory, set_up
from codistill.training.processes import run_in_processes
from codistill.training.sharing import share_cores
from codistill.training.step import make_step
from codistill.training.train import kept_if_used
from codistill.training.trainer import Trainer

ALLOWANCE = 1.3  # convolutions take memory to work in, and allocators leave gaps
USED_SHARE = 0.9


def memory_of_a_run(plan: Plan, splits: DeviceSplits) -> int:
    """Measure the memory of a run beside the data set, bytes, without changing its method.

    It is what it keeps from step to step, its graphs of a step and of an evaluation, and the first eager steps of the
    epoch's last size, which are assumed to take as much as a step.
    """
    device, settings, precision = plan.device, plan.config.train, plan.config.execution.precision
    few = splits.test.subset(torch.arange(min(EVALUATION_BATCH, len(splits.test))))
    progress = torch.zeros((), device=device)
    batch = min(settings.batch_size, len(plan.data.train if plan.training is None else plan.training))
    indices = epoch_indices(batch, 0, 0, plan.augmentation, device, plan.method.views)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    probe = copied(plan.method)
    with plan.execution.on(probe, device, plan.config.execution.deterministic):
        images = splits.train.for_steps(batch)
        indices = next(images.staged(indices, [(0, batch)]))
        step = make_step(probe, images, plan.augmentation, settings, precision)
        for _ in range(2):
            step(indices, progress)
        kept = torch.cuda.memory_allocated(device)
        within_step = torch.cuda.max_memory_allocated(device) - kept
        torch.cuda.reset_peak_memory_stats(device)
        averaged = step.average.method if step.average else None
        evaluate(probe, few, plan.config.execution.scored_in, averaged=averaged)
        within_evaluation = torch.cuda.max_memory_allocated(device) - kept
    del probe, step, images
    torch.cuda.empty_cache()
    return kept - before + (1 if settings.drop_last else 2) * within_step + within_evaluation


def side_by_side(plans: Sequence[Plan], splits: DeviceSplits) -> list[int]:
    """Choose from free memory and a short measurement how many runs train at a time; return the sizes of the groups.

    The data set is placed first, so that free memory is free for the runs. On a CPU all fit in one process.
    """
    count, device = len(plans), plans[0].device
    if device.type != "cuda" or count == 1:
        return [count]
    gc.collect()  # runs that finished before; see `train_in_groups`
    kinds = {plan.kind: plan for plan in plans}
    need = 0
    for plan in kinds.values():
        try:
            need = max(need, memory_of_a_run(plan, splits))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(plan.config, plan.method, error) from error
    free = torch.cuda.mem_get_info(device)[0] * USED_SHARE
    fit = min(count, max(1, int(free // (need * ALLOWANCE))))
    groups = -(-count // fit)
    sizes = [count // groups + (index < count % groups) for index in range(groups)]
    if groups > 1:
        has, takes = (f"{bytes / 2**30:.2f} GiB" for bytes in (free, need * ALLOWANCE))
        warn(
            f"{count} runs, but {torch.cuda.get_device_name(device)} has {has} to use and a run takes about {takes}: "
            f"they train in {groups} groups of at most {sizes[0]}, one after the other"
        )
    return sizes


def train_seeds(config: RunConfig, seeds: Sequence[int], out: Path | None = None, show: bool = True) -> list[Run]:
    """Train one run for each seed, side by side; see `train_fleet`."""
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds are {list(seeds)}: name each once")
    configs = [dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)) for seed in seeds]
    with kept_if_used(config, out, "seeds") as folder:
        return train_fleet(configs, [folder / f"seed{seed}" for seed in seeds], show)


def train_fleet(configs: Sequence[RunConfig], outs: Sequence[Path], show: bool = True) -> list[Run]:
    """Train independent runs side by side on one device, each in its own folder and with the end of a run alone.

    One that diverges is marked in its summary.json; the others continue. The runs may differ in method, networks and
    seed. Nothing is written if one of them cannot work.
    """
    refuse_ranks("several runs side by side (--seeds, --recipes)")
    first = configs[0]
    for config in configs[1:]:
        for key, value in shared(config).items():
            if value != shared(first)[key]:
                raise UsageError(f"runs side by side must have one {key}: {shared(first)[key]!r} and another")
    if len(set(outs)) < len(outs):
        raise UsageError("runs side by side need a run folder each, but one is named twice")
    device = choose_device(first.execution.device, first.execution.precision)
    data = load_named_data(first)
    # All of them before the first run folder is made.
    plans = [check(build_taught(each, data), data, each, device, alone=len(configs) == 1) for each in configs]
    for out in outs:
        refuse_occupied(out)
    announce(plans)
    splits = DeviceSplits(data, device, first.execution.stream)
    processes, threads = share_cores(plans, splits)
    set_threads(threads)  # which config.json records
    sizes = side_by_side(plans, splits)
    at_once = 0 if processes > 1 else sizes[0]
    # The runs of later groups have a folder from the beginning, so that `resume` finds them.
    begun: list[Continued | None] = [None] * at_once
    for plan, out in list(zip(plans, outs, strict=True))[at_once:]:
        metadata = run_metadata(plan.config, data, device, plan.method, splits.digests, plan.initial, plan.asked)
        with Run.opened(out, metadata, plan.method, data):
            begun.append(Continued.read(Run(out)))
    openings = [
        functools.partial(set_up, plan, out, show, out.name, continued, splits=splits)
        for plan, out, continued in zip(plans, outs, begun, strict=True)
    ]
    if processes > 1:
        train_in_processes(openings, outs, processes, threads)
        return [Run(out) for out in outs]
    return train_in_groups(openings, sizes, mark_diverged)


Opening = Callable[[], contextlib.AbstractContextManager[Trainer]]


def train_in_processes(openings: Sequence[Opening], outs: Sequence[Path], processes: int, threads: int) -> None:
    """Train runs whose folders are there, each in a process of its own, so many at a time with so many threads each.

    One that diverges is marked, and one that fails is named at once; the others continue.

    Raises:
        Exception: What the first of those that failed has raised; a `WorkerError` where a process was killed.
    """

    def train_one(opening: Opening, out: Path) -> None:
        set_threads(threads)
        try:
            with opening() as trainer:
                trainer.display.show_lines()
                train_loop([trainer], mark_diverged)
        except Exception as error:
            warn(f"{out.name} is dropped: {error}")
            raise

    note(f"{len(outs)} runs, {processes} at a time, each in a process with {threads} thread{'s' * (threads > 1)}")
    works = [functools.partial(train_one, opening, out) for opening, out in zip(openings, outs, strict=True)]

    def kept() -> str:
        left = [str(out) for out in outs if Run(out).status not in ("finished", "diverged")]
        return f"and saved: {resuming(*left)}" if left else ""

    outcomes = run_in_processes(works, processes, kept)
    for out, outcome in zip(outs, outcomes, strict=True):
        if isinstance(outcome, WorkerError):
            raise WorkerError(f"{out}: {outcome}; what it saved is kept: {resuming(out)}")
        if outcome is not None:
            raise outcome


def train_in_groups(
    openings: Sequence[Opening],
    sizes: Sequence[int],
    diverged: Callable[[Trainer, DivergedError], None],
) -> list[Run]:
    """Train runs side by side, one group after the other; an opening puts a run on its device, and closes it."""
    waiting, runs = iter(openings), []
    for size in sizes:
        gc.collect()  # matplotlib leaves cycles that hold the trainers of finished runs, and with them all else
        with contextlib.ExitStack() as held:
            trainers = [held.enter_context(opening()) for opening in itertools.islice(waiting, size)]
            train_loop(trainers, diverged)
            for trainer in trainers:
                trainer.method.cpu()
        runs += [trainer.run for trainer in trainers]
        del trainers, trainer  # or they would hold the memory that the next group needs
    return runs


def shared(config: RunConfig) -> dict[str, Any]:
    """Return the settings that runs side by side have in common."""
    mapping = config.as_mapping()
    return {key: mapping[key] for key in SHARED}


def mark_diverged(trainer: Trainer, error: DivergedError) -> None:
    """Write the summary of a run that is dropped from a fleet, and warn."""
    write_summary_of_failure(trainer.run, trainer.config, trainer.method, error)
    warn(f"{trainer.run.path.name} is dropped: {error}")
