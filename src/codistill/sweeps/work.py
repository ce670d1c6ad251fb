"""What one process does of a sweep, and how the runs are dealt out to the processes."""

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from codistill.core.files import write_atomically
from codistill.methods import METHODS
from codistill.sweeps.spec import PlannedRun
from codistill.training.fleet import shared

# How many runs one process gets at most: each holds a file open, and has its networks on the host.
LARGEST_SHARE = 64


class Owner(Protocol):
    """What a `Work` needs of the sweep that it is a part of.

    Attributes:
        folder: The folder of the sweep.
        program: What is put before `train ..` and `resume ..` to make a command.
        waiting: What no process has begun.
    """

    folder: Path
    program: list[str]
    waiting: deque["Work"]

    def say(self, line: str) -> None:
        """Print a line."""
        ...

    def noted(self, run: PlannedRun) -> bool:
        """Say whether a run has ended; where its folder says so for the first time, note it."""
        ...


class Work:
    """What one process does of a sweep; a `codistill.executor.Job`.

    Args:
        sweep: The sweep.
        runs: What is to be done: one run, or several that can train side by side.
    """

    def __init__(self, sweep: Owner, runs: Sequence[PlannedRun]) -> None:
        self.sweep, self.runs = sweep, list(runs)

    @property
    def name(self) -> str:
        """The names of the runs, or of the first ones."""
        names = [run.name for run in self.runs]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @property
    def logs(self) -> list[Path]:
        """A log for each run."""
        return [self.sweep.folder / "logs" / f"{run.name}.log" for run in self.runs]

    @property
    def choose_gpu(self) -> bool:
        """Whether the spec leaves it open which GPU it is."""
        config = self.runs[0].config
        return config is not None and config.execution.device in ("auto", "cuda")

    def say(self, line: str) -> None:
        """Print a line."""
        self.sweep.say(line)

    def look(self) -> None:
        """Note runs that have ended while others of the process go on."""
        for run in self.runs:
            self.sweep.noted(run)

    def command(self) -> list[str]:
        """Give the command that begins the runs, or goes on with those that are begun and leaves the others."""
        left = [run for run in self.runs if not self.sweep.noted(run)]
        if not left:
            return ["true"]  # a process of an earlier sweep has ended them while these waited
        begun = [run for run in left if (self.sweep.folder / run.name / "config.json").exists()]
        self.runs = begun or left
        others = [run for run in left if run not in self.runs]
        if others:
            self.sweep.waiting.appendleft(Work(self.sweep, others))
        several = len(self.runs) > 1
        if begun:
            self.say(f"{self.name}: {'go on side by side' if several else 'goes on'}")
            folders = [str(self.sweep.folder / run.name) for run in begun]
            data_dir = begun[0].recipe.get("data_dir")
            return [*self.sweep.program, "resume", *folders, *(["--data-dir", data_dir] if data_dir else [])]
        self.say(f"{self.name}: {'start side by side' if several else 'starts'}")
        recipes = [str(self.write_recipe(run)) for run in left]
        flags = ["--recipes" if several else "--recipe", *recipes]
        out = self.sweep.folder if several else self.sweep.folder / left[0].name
        return [*self.sweep.program, "train", *flags, "--out", str(out)]

    def write_recipe(self, run: PlannedRun) -> Path:
        """Write a run as a recipe that has its name."""
        path = self.sweep.folder / "recipes" / f"{run.name}.json"
        write_atomically(path, (json.dumps(run.recipe, indent=2) + "\n").encode())
        return path


def shares(runs: Sequence[PlannedRun], slots: int, side_by_side: bool | None) -> list[list[PlannedRun]]:
    """Put together what can train side by side, and deal it out to the slots.

    Args:
        runs: What is to be done.
        slots: How many processes at a time.
        side_by_side: See `codistill.sweep.sweep`.

    Returns:
        The runs of each process.
    """
    groups: dict[str, list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault(company(run, side_by_side), []).append(run)
    dealt: list[list[PlannedRun]] = []
    for group in groups.values():
        count = min(len(group), max(slots, math.ceil(len(group) / LARGEST_SHARE)))
        dealt += [group[number::count] for number in range(count)]
    return dealt


def company(run: PlannedRun, side_by_side: bool | None) -> str:
    """Say with which runs one can train side by side: a text that they have in common, or its name."""
    assert run.config is not None
    settings = run.config.execution
    if side_by_side is None:
        cuda = settings.device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
        side_by_side = cuda and METHODS[run.config.method_name].capturable
    return json.dumps(shared(run.config)) if side_by_side else run.name
