"""How long the runs of a sweep take, and how far they are: `--dry-run`, and the live table of a terminal."""

import contextlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from codistill.core.console import duration
from codistill.core.errors import CodistillError
from codistill.report.tables import markdown
from codistill.runs.choice import epochs_done
from codistill.settings.build import load_named_data
from codistill.settings.config import RunConfig
from codistill.sweeps.naming import canonical, identity
from codistill.sweeps.spec import PlannedRun
from codistill.sweeps.table import Row
from codistill.training.prepare import DeviceSplits, build_taught, check
from codistill.training.sharing import steps_of, timed_steps

if TYPE_CHECKING:
    from rich.console import Console

UNKNOWN = "unknown"
DRAW_SECONDS = 2.0
# How long steps are measured before a sweep starts; --dry-run measures all kinds of runs.
MEASURE_SECONDS = 20.0


class Estimates:
    """Seconds of an epoch of each kind of run, a kind being all runs that differ in seed and epochs only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.measured: dict[str, float | None] = {}
        self.finished: dict[str, float] = {}

    def learn(self, run: PlannedRun) -> None:
        """Learn from a run that is finished."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            summary = json.loads((self.folder / run.name / "summary.json").read_text(encoding="utf-8"))
            # Of a run that was resumed the first is that of its last process alone.
            seconds = max(summary["wall_seconds"], summary.get("train_seconds", 0))
            self.finished[kind(run)] = seconds / epochs_done(summary)

    def measure(self, runs: Sequence[PlannedRun], budget: float) -> None:
        """Time steps of the runs that train on this CPU, once for each kind of which nothing is known.

        Args:
            runs: They are tried in this order.
            budget: Seconds after which no other kind is begun.
        """
        late = time.monotonic() + budget
        for run in runs:
            if run.config and not {kind(run)} & {*self.measured, *self.finished} and time.monotonic() < late:
                self.measured[kind(run)] = measured_epoch(run.config)

    def seconds(self, run: PlannedRun) -> tuple[float | None, str]:
        """Return the seconds that are left of a run, if they can be told, and how that was estimated."""
        if run.config is None:
            return None, UNKNOWN
        rows = metrics(self.folder / run.name)
        own = [each for row in rows if isinstance(each := row.get("seconds"), float)]
        left = max(0, run.config.train.epochs - len(rows))
        if own:
            return left * sum(own) / len(own), "its own epochs"
        if (an_epoch := self.finished.get(kind(run))) is not None:
            return left * an_epoch, "a finished run"
        if (an_epoch := self.measured.get(kind(run))) is not None:
            return left * an_epoch, "steps measured on this CPU"
        return None, UNKNOWN

    def left(self, runs: Sequence[PlannedRun], at_a_time: int) -> str:
        """Return how long runs take, so many at a time."""
        known = [each for each in (self.seconds(run)[0] for run in runs) if each is not None]
        if not known:
            return UNKNOWN
        # Those of which nothing is known may take as long as the others.
        total = sum(known) * len(runs) / len(known)
        return f"about {duration(max([*known, total / min(at_a_time, len(runs))]))}"


def kind(run: PlannedRun) -> str:
    """Return what decides how long an epoch of a run takes."""
    assert run.config is not None
    return canonical({**identity(run.config), "seed": 0, "epochs": 0})


def measured_epoch(config: RunConfig) -> float | None:
    """Measure the seconds of an epoch's steps on this CPU, by the second of two; None: it runs elsewhere, or cannot."""
    if config.execution.device != "cpu" and (config.execution.device != "auto" or torch.cuda.is_available()):
        return None
    threads = torch.get_num_threads()
    with contextlib.suppress(CodistillError):  # its process reports it
        data, device = load_named_data(config), torch.device("cpu")
        plan = check(build_taught(config, data), data, config, device)
        try:
            with timed_steps(plan, DeviceSplits(data, device)) as step:
                step(config.execution.threads or threads)
                return step(config.execution.threads or threads) * steps_of(plan) / config.train.epochs
        finally:
            torch.set_num_threads(threads)
    return None


def metrics(folder: Path) -> list[Mapping[str, Any]]:
    """Return the epochs that a run has done, as far as its metrics.jsonl has them."""
    with contextlib.suppress(OSError, ValueError):
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return []


def dry_run_lines(
    order: Sequence[PlannedRun], rows: Mapping[str, Row], estimates: Estimates, at_a_time: int
) -> list[str]:
    """Return the lines of `--dry-run`: runs in the order of their starts, minutes, and how these were estimated."""
    cells = [["", "run (folder)", "action", "minutes", "estimated by"]]
    for number, run in enumerate(order, 1):
        begun, (seconds, how) = metrics(estimates.folder / run.name), estimates.seconds(run)
        there = (estimates.folder / run.name / "config.json").exists()
        action = f"resume after epoch {len(begun)}" if there else "start"
        cells.append([str(number), run.name, action, UNKNOWN if seconds is None else f"{seconds / 60:.1f}", how])
    for row in rows.values():
        if row.status != "unfinished":
            cells.append(["", row.name, f"none: {row.status}", "", row.reason])
    takes = f"{estimates.left(order, at_a_time)}, {at_a_time} at a time" if order else "nothing"
    return [*markdown(cells), "", f"{len(rows)} runs, {len(order)} to do: {takes}"]


class LiveTable:
    """The runs at work, and counts of all, in place on a terminal; elsewhere nothing."""

    def __init__(self, console: "Console", estimates: Estimates) -> None:
        from rich.live import Live

        self.estimates, self.drawn = estimates, 0.0
        self.shown = console.is_terminal and not console.quiet
        self.live = Live(console=console, auto_refresh=False, transient=True) if self.shown else None

    def __enter__(self) -> "LiveTable":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def draw(self, rows: Collection[Row], busy: Sequence[PlannedRun], waiting: Sequence[PlannedRun]) -> None:
        """Draw the table again, if it is time."""
        if not self.live or time.monotonic() - self.drawn < DRAW_SECONDS:
            return
        from rich.console import Group
        from rich.table import Table

        self.drawn = time.monotonic()
        counts = {word: sum(row.status == word for row in rows) for word in ("finished", "FAILED")}
        left = self.estimates.left([*busy, *waiting], len(busy)) if busy else UNKNOWN
        title = f"{counts['finished']} done, {len(busy)} running, {counts['FAILED']} failed, {len(waiting)} waiting"
        table = Table("running", "epochs", "time left", box=None)
        for run in busy[: max(3, self.live.console.height - 6)]:
            seconds, epochs = self.estimates.seconds(run)[0], run.config.train.epochs if run.config else 0
            done = f"{len(metrics(self.estimates.folder / run.name))} of {epochs}"
            table.add_row(run.name, done, UNKNOWN if seconds is None else duration(seconds))
        self.live.update(Group(f"{title}; time left: {left}", table), refresh=True)
