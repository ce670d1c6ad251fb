"""Interrupted runs that go on, alone or side by side."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.core.device import choose_device
from codistill.core.errors import UsageError
from codistill.runs.run import Run
from codistill.training.fleet import mark_diverged, shared, side_by_side, train_in_groups
from codistill.training.interrupted import InterruptedRun
from codistill.training.prepare import Resident, build_taught
from codistill.training.train import fail


def resume(
    path: str | Path,
    data_dir: str | None = None,
    show: bool = True,
    override: Mapping[str, Any] | None = None,
) -> Run:
    """Go on with an interrupted run from its last whole checkpoint, which may lie inside an epoch.

    On a CPU, and on CUDA with `deterministic`, it ends as it would have ended without the break, to the last bit. A run
    that was stopped before its first checkpoint begins anew.

    Args:
        path: The run folder.
        data_dir: Where the data set is now, if not where it was.
        show: Whether to print progress and the final table.
        override: New values of settings that do not belong to the experiment: data_dir, device, threads.

    Raises:
        UsageError: The run is finished, another process holds it, or its settings were changed.
        CheckpointError: Not a run folder, no whole checkpoint, or networks that only your program can build.
        DataError: The data set is missing, or not that of the run.
    """
    return resume_together([Path(path)], data_dir, show, override)[0]


def resume_together(
    paths: Sequence[Path],
    data_dir: str | None = None,
    show: bool = True,
    override: Mapping[str, Any] | None = None,
) -> list[Run]:
    """Go on with several runs: side by side where they stopped at the same step and share what a fleet shares.

    One of several that diverges is marked in its summary.json, and the others go on.

    Args:
        paths: Run folders, or folders of them, whose unfinished runs are meant.
        data_dir: Where the data set is now, if not where it was.
        show: Whether to print progress and the final tables.
        override: See `resume`.

    Raises:
        CodistillError: See `resume`.
    """
    overrides = {**(override or {}), **({"data_dir": data_dir} if data_dir else {})}
    interrupted = [InterruptedRun(run, overrides) for path in paths for run in unfinished(path)]
    groups: dict[str, list[InterruptedRun]] = {}
    for each in interrupted:
        groups.setdefault(json.dumps([each.position, shared(each.config)]), []).append(each)
    several = len(interrupted) > 1
    for group in groups.values():
        configs = [each.config for each in group]
        device = choose_device(configs[0].execution.device, configs[0].execution.precision)
        data = group[0].load_data()
        methods = [build_taught(config, data) for config in configs]
        sizes = side_by_side(methods, configs, data, device)
        resident = Resident(data.statistics, device)
        openings = [
            functools.partial(
                each.taken_up, method, data, device, show, label=several, resident=resident, runs=sizes[0]
            )
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
