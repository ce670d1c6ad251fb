"""From a method and a data set to a finished run folder."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from codistill.checkpoint import warn
from codistill.config import RunConfig, TeacherSettings, TrainSettings
from codistill.data.dataset import Dataset
from codistill.device import choose_device
from codistill.distributed import MAX_RESTARTS, Ranks, launch, one_device_each
from codistill.epochs import run_epochs
from codistill.errors import DivergedError, UsageError
from codistill.fleet import side_by_side
from codistill.interrupted import InterruptedRun
from codistill.loop import Loop
from codistill.methods import Method
from codistill.prepare import (
    Resident,
    build_taught,
    check_shapes,
    check_teacher,
    load_named_data,
    placed,
    prepared,
    run_record,
    split_training,
)
from codistill.run import Run
from codistill.summary import write_summary_of_failure
from codistill.teacher import Taught

SHARED_IN_A_FLEET = (
    "data",
    "data_dir",
    "epochs",
    "batch_size",
    "drop_last",
    "train_limit",
    "validation",
    "device",
    "precision",
    "deterministic",
    "threads",
)
# Puts a run on its device, and closes it at the end.
Opening = Callable[[], contextlib.AbstractContextManager[Loop]]


def free_folder(config: RunConfig, ending: str | None = None) -> Path:
    """Find a new folder name below runs/ for a run, or for several that `ending` names."""
    names = [spec.partition(":")[0].replace("/", "-") for spec in config.networks]
    networks = "+".join(f"{name}x{len(list(same))}" for name, same in itertools.groupby(names))
    stem = f"{config.data.partition(':')[0]}-{config.method_name}-{networks}-{ending or f'seed{config.train.seed}'}"
    for number in itertools.count(1):
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists():
            return path
    raise AssertionError


def train_from_config(
    config: RunConfig, out: Path | None = None, show: bool = True, max_restarts: int = MAX_RESTARTS
) -> Run:
    """Load the data set, build the networks and train, on several processes where the settings say so; see `train`.

    Args:
        config: The run.
        out: Its folder; None: a new one below runs/.
        show: Whether to print progress and the final table.
        max_restarts: How often several processes start again from the last checkpoint because one was lost.

    Raises:
        CodistillError: See `train`.
        WorkerError: One of several processes was lost once too often.
    """
    if config.train.processes > 1:
        out = out or free_folder(config)
        Run.refuse_taken(out)
        return train_on_processes(config, out, {}, show, max_restarts)
    device = choose_device(config.train.device, config.train.precision)
    data = load_named_data(config)
    return _train(build_taught(config, data), data, config, out or free_folder(config), device, show)


def train(
    method: Method,
    data: Dataset,
    *,
    epochs: int | None = None,
    out: str | Path | None = None,
    settings: TrainSettings | None = None,
    show: bool = True,
) -> Run:
    """Train the students of a method together.

    Args:
        method: Students with whatever teaches them; trained in place and left on the training device.
        data: What they are trained and tested on.
        epochs: How often each image is seen; overrides the settings.
        out: The run folder, which must not hold anything; None: a new one below runs/.
        settings: Everything else; None: the defaults, which are the paper's recipe.
        show: Whether to print progress and the final table.

    Returns:
        The finished run.

    Raises:
        UsageError: Settings, networks and data do not go together, or the folder is not empty; nothing was written.
        DivergedError: A loss became NaN or infinite; the last whole checkpoint is kept.
    """
    inner, teaching = method, TeacherSettings()
    if isinstance(method, Taught):
        inner = method.method
        teaching = TeacherSettings(teacher_weight=method.weight, teacher_temperature=method.temperature)
    check_teacher(type(inner), inner is not method)
    settings = settings or TrainSettings()
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    config = RunConfig(
        method_name=method.name,
        networks=tuple(student.spec for student in method.cohort),
        data=data.spec or data.name,
        data_dir=data.root or None,
        train=settings,
        teaching=teaching,
        method=method.settings,
    )
    if settings.processes > 1:
        raise UsageError("processes: only a run that a recipe or a command line describes can be on several of them")
    device = choose_device(settings.device, settings.precision)
    return _train(method, data, config, Path(out) if out else free_folder(config), device, show)


def _train(method: Method, data: Dataset, config: RunConfig, out: Path, device: torch.device, show: bool) -> Run:
    with prepared(method, data, config, out, device, show) as loop:
        run_epochs([loop], fail)
    return loop.run


def train_on_processes(config: RunConfig, out: Path, override: Mapping[str, str], show: bool, max_restarts: int) -> Run:
    """Begin a run on several processes, or go on with the one that is in the folder; see `train_from_config`."""
    settings = config.train
    if max_restarts < 0:
        raise UsageError(f"max_restarts is {max_restarts}; it must be at least 0")
    if config.method.whole_batch:
        raise UsageError(
            f"{config.method_name} with {config.method.whole_batch} needs the whole batch in one process: "
            "use --processes 1"
        )
    device = choose_device(settings.device, settings.precision)
    one_device_each(device, settings.processes)
    launch(train_as_rank, (config, out, override, show), out, device, settings.processes, max_restarts)
    return Run(out)


def train_as_rank(
    ranks: Ranks, begun: bool, config: RunConfig, out: Path, override: Mapping[str, str], show: bool
) -> None:
    """Do one process's part of a run on several.

    Args:
        ranks: This process among them.
        begun: Whether to go on with the run in the folder.
        config: The run, where it is to begin.
        out: Its folder.
        override: See `resume`.
        show: Whether rank 0 prints.
    """
    interrupted = InterruptedRun(Run(out), override) if begun else None
    config = interrupted.config if interrupted else config
    device = choose_device(config.train.device, config.train.precision)
    if device.type == "cuda":
        device = torch.device("cuda", ranks.number)
    with ranks.leader_first():  # data may be downloaded, and cached
        data = interrupted.load_data() if interrupted else load_named_data(config)
    method = build_taught(config, data)
    show = show and ranks.leads
    with (
        interrupted.taken_up(method, data, device, show, ranks=ranks)
        if interrupted
        else prepared(method, data, config, out, device, show, ranks=ranks)
    ) as loop:
        if device.type == "cuda":
            loop.display.console.print("note: on several processes a step is not captured as a CUDA graph")
        run_epochs([loop], fail)


def train_fleet(configs: Sequence[RunConfig], outs: Sequence[Path], show: bool = True) -> list[Run]:
    """Train independent runs side by side on one device, each in its own run folder.

    Each run ends as it would have ended alone; one that diverges is marked in its summary.json, and the others go on.

    Args:
        configs: Runs with the same data set, epochs, batch size, device and precision; they may differ in method,
            networks and seed.
        outs: A run folder for each.
        show: Whether to print progress and the final tables.

    Returns:
        The runs, in order; `summary["status"]` says how each ended.

    Raises:
        UsageError: The runs do not go together, or one of them cannot work; nothing was written.
    """
    first = configs[0]
    if any(config.train.processes > 1 for config in configs):
        raise UsageError("runs side by side share one process: leave --processes out, or train one seed at a time")
    for config in configs[1:]:
        for key, value in shared(config).items():
            if value != shared(first)[key]:
                raise UsageError(f"runs side by side must have one {key}: {shared(first)[key]!r} and another")
    if len(set(outs)) < len(outs):
        raise UsageError("runs side by side need a run folder each, but one is named twice")
    device = choose_device(first.train.device, first.train.precision)
    data = load_named_data(first)
    methods = [build_taught(config, data) for config in configs]
    # All of them before the first run folder is made.
    for method, config, out in zip(methods, configs, outs, strict=True):
        config.train.augmentation(data)
        split_training(data, config.train)
        check_shapes(method, data)
        Run.refuse_taken(out)
    sizes = side_by_side(methods, configs, data, device)
    waiting: dict[Path, Run] = {}
    # The runs of later groups have a folder from the beginning, so that `resume` knows them.
    for method, config, out in list(zip(methods, configs, outs, strict=True))[sizes[0] :]:
        waiting[out], lock = Run.create(out, run_record(placed(config, data), data, device), method, data)
        lock.release()
    resident = Resident(data.statistics, device)
    openings = [
        functools.partial(
            prepared, method, data, config, out, device, show, out.name, waiting.get(out), resident=resident
        )
        for method, config, out in zip(methods, configs, outs, strict=True)
    ]
    return train_in_groups(openings, sizes, mark_diverged)


def train_in_groups(
    openings: Sequence[Opening], sizes: Sequence[int], diverged: Callable[[Loop, DivergedError], None]
) -> list[Run]:
    """Train runs side by side, one group after the other.

    Args:
        openings: What puts each run on its device.
        sizes: How many runs each group has.
        diverged: See `run_epochs`.

    Returns:
        The runs, in order.
    """
    waiting = iter(openings)
    return [run for size in sizes for run in train_side_by_side(list(itertools.islice(waiting, size)), diverged)]


def train_side_by_side(openings: Sequence[Opening], diverged: Callable[[Loop, DivergedError], None]) -> list[Run]:
    """Train one group of runs, and leave its methods on the host; see `train_in_groups`."""
    with contextlib.ExitStack() as held:
        loops = [held.enter_context(opening()) for opening in openings]
        run_epochs(loops, diverged)
        for loop in loops:
            loop.method.cpu()
    return [loop.run for loop in loops]


def shared(config: RunConfig) -> dict[str, Any]:
    """Give the settings that runs side by side have in common."""
    mapping = config.as_mapping()
    return {key: mapping[key] for key in SHARED_IN_A_FLEET}


def resume(
    path: str | Path,
    data_dir: str | None = None,
    show: bool = True,
    override: Mapping[str, str] | None = None,
    max_restarts: int = MAX_RESTARTS,
) -> Run:
    """Go on with an interrupted run from its last whole checkpoint, which may lie inside an epoch.

    On a CPU, and on CUDA with `deterministic`, it ends as it would have ended without the break, to the last bit. A run
    that was stopped before its first checkpoint begins anew.

    Args:
        path: The run folder.
        data_dir: Where the data set is now, if not where it was.
        show: Whether to print progress and the final table.
        override: New values of settings that do not belong to the experiment: data_dir, device, threads.
        max_restarts: How often the processes of a run on several start again because one was lost.

    Raises:
        UsageError: The run is finished, another process holds it, or its settings were changed.
        CheckpointError: Not a run folder, no whole checkpoint, or networks that only your program can build.
        DataError: The data set is missing, or not that of the run.
        WorkerError: One of several processes was lost once too often.
    """
    return resume_together([Path(path)], data_dir, show, override, max_restarts)[0]


def resume_together(
    paths: Sequence[Path],
    data_dir: str | None = None,
    show: bool = True,
    override: Mapping[str, str] | None = None,
    max_restarts: int = MAX_RESTARTS,
) -> list[Run]:
    """Go on with several runs: side by side where they stopped at the same step and share what a fleet shares.

    One of several that diverges is marked in its summary.json, and the others go on.

    Args:
        paths: Run folders, or folders of them, whose unfinished runs are meant.
        data_dir: Where the data set is now, if not where it was.
        show: Whether to print progress and the final tables.
        override: See `resume`.
        max_restarts: See `resume`.

    Raises:
        CodistillError: See `resume`.
    """
    overrides = {**(override or {}), **({"data_dir": data_dir} if data_dir else {})}
    interrupted = [InterruptedRun(run, overrides) for path in paths for run in unfinished(path)]
    split = [each for each in interrupted if each.config.train.processes > 1]
    if split:
        if len(interrupted) > 1:
            raise UsageError(f"{split[0].run.path} is a run on several processes: resume it alone")
        run = split[0].run
        return [train_on_processes(split[0].config, run.path, overrides, show, max_restarts)]
    groups: dict[str, list[InterruptedRun]] = {}
    for each in interrupted:
        groups.setdefault(json.dumps([each.position, shared(each.config)]), []).append(each)
    several = len(interrupted) > 1
    for group in groups.values():
        configs = [each.config for each in group]
        device = choose_device(configs[0].train.device, configs[0].train.precision)
        data = group[0].load_data()
        methods = [build_taught(config, data) for config in configs]
        sizes = side_by_side(methods, configs, data, device)
        resident = Resident(data.statistics, device)
        openings = [
            functools.partial(each.taken_up, method, data, device, show, label=several, resident=resident)
            for each, method in zip(group, methods, strict=True)
        ]
        train_in_groups(openings, sizes, mark_diverged if several else fail)
    return [each.run for each in interrupted]


def unfinished(path: Path) -> list[Run]:
    """Find the run in a folder, or those of its folders that neither are finished nor have diverged.

    Raises:
        UsageError: All of them are or have.
        CheckpointError: It is no run folder and holds none.
    """
    inner = sorted(each.parent for each in path.glob("*/config.json")) if not (path / "config.json").exists() else []
    if not inner:
        return [Run(path)]
    runs = [Run(each) for each in inner]
    left = [run for run in runs if run.status not in ("finished", "diverged")]
    if not left:
        raise UsageError(f"all {len(runs)} runs in {path} are finished or diverged: there is nothing to resume")
    return left


def train_seeds(config: RunConfig, seeds: Sequence[int], out: Path | None = None, show: bool = True) -> list[Run]:
    """Train one run for each seed, side by side; see `train_fleet`.

    Raises:
        UsageError: A seed twice; otherwise as `train_fleet`.
    """
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds are {list(seeds)}: name each once")
    configs = [dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)) for seed in seeds]
    folder = out or free_folder(config, "seeds")
    return train_fleet(configs, [folder / f"seed{seed}" for seed in seeds], show)


def fail(_: Loop, error: DivergedError) -> None:
    """End with the one run that there is."""
    raise error


def mark_diverged(loop: Loop, error: DivergedError) -> None:
    """Write how a run ended that is dropped from a fleet, and say so."""
    write_summary_of_failure(loop.run.path, loop.config, loop.method, error)
    warn(f"{loop.run.path.name} is dropped: {error}")
