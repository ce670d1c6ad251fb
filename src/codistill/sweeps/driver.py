"""Many runs in processes and folders of their own; a sweep that was stopped, in whatever way, goes on."""

import contextlib
import dataclasses
import signal
import sys
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from codistill.core.console import LastingConsole
from codistill.core.errors import CodistillError, UsageError, WorkerError
from codistill.core.registry import near_matches
from codistill.core.signals import Interrupted, Terminated
from codistill.deploy.run import Run
from codistill.sweeps.engines.local import EXECUTORS
from codistill.sweeps.folder import find_folders, held
from codistill.sweeps.spec import PlannedRun, read_spec
from codistill.sweeps.table import Row, shown_tables, write_tables
from codistill.sweeps.work import Work, shares

# How often a run is tried whose process was killed, or lost a worker of its own: once, and two times again.
ATTEMPTS = 3


GOES_ON = "what the runs have saved is kept: the same command goes on"


PROGRAM = (sys.executable, "-m", "codistill")


def sweep(
    spec: str | Path,
    out: str | Path,
    *,
    executor: str = "local",
    slots: int | None = None,
    side_by_side: bool | None = None,
    program: Sequence[str] = PROGRAM,
    show: bool = True,
) -> list[Row]:
    """Train the runs of a spec, each in a folder below `out`, and write `table.json` and `table.md` there.

    Runs that are finished or have diverged are not repeated, and interrupted ones go on from their last checkpoint. A
    process that a signal killed, or that lost a worker, is started again, two times at most. Where one works on several
    runs, what is wrong with one of them does not cost the others.

    Args:
        spec: A TOML file: settings of all runs, `[grid]` and `[[runs]]`; see docs/sweep.md.
        out: The folder of the sweep; made where it does not exist.
        executor: What runs the processes: local.
        slots: How many processes at a time. None: one for each GPU, or one.
        side_by_side: Whether runs that can train side by side share a process. None: on CUDA, in one graph.
        program: What is put before `train ..` and `resume ..` to make a command.
        show: Whether to print progress and the final tables.

    Returns:
        A row for each run, in the order of the spec; a failed one says why.

    Raises:
        UsageError: The spec is wrong, or the folder cannot be used; no run was started.
    """
    if executor not in EXECUTORS:
        raise UsageError(f"unknown executor {executor!r}: {near_matches(executor, EXECUTORS)}")
    slots = max(1, torch.cuda.device_count()) if slots is None else slots
    if slots < 1:
        raise UsageError(f"slots is {slots}; it must be at least 1")
    runs, folder = read_spec(Path(spec)), Path(out)
    lock = held(folder)
    try:
        return Sweep(Path(spec), folder, runs, program, show).work(executor, slots, side_by_side)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {GOES_ON}") from None
    except Terminated:
        raise Terminated(f"terminated; {GOES_ON}") from None
    finally:
        lock.release()


class Sweep:
    """The state of a sweep.

    Args:
        spec: Where its runs were read.
        folder: Its folder, which this process holds.
        runs: What is to be done.
        program: What is put before `train ..` and `resume ..` to make a command.
        show: Whether to print.

    Raises:
        UsageError: The folder of a run holds another one.
    """

    def __init__(self, spec: Path, folder: Path, runs: Sequence[PlannedRun], program: Sequence[str], show: bool):
        self.spec, self.folder, self.program = spec, folder, list(program)
        self.console = LastingConsole(quiet=not show, highlight=False, markup=False)
        self.runs = find_folders(folder, runs)
        self.rows = {run.name: self.row(run) for run in self.runs}
        self.waiting: deque[Work] = deque()
        self.attempts = Counter[str]()

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, soft_wrap=True)

    def row(self, run: PlannedRun, reason: str = "") -> Row:
        """Look at what there is of a run: its folder is the whole truth.

        Args:
            run: The run.
            reason: Why it failed, where that is known and its folder does not say how it ended.
        """
        folder = self.folder / run.name
        row = Row(name=run.name, group=run.group, folder=str(folder), status="unfinished")
        if run.problem:
            return dataclasses.replace(row, status="FAILED", reason=run.problem)
        summary: dict[str, Any] = {}
        with contextlib.suppress(CodistillError):  # no run folder, or not yet or no longer a whole one
            summary = Run(folder).summary if folder.exists() else {}
        if summary.get("status") == "finished":
            errors = {key: summary[key] for key in ("top1_error", "best_epoch_top1_error")}
            return dataclasses.replace(row, status="finished", **errors)
        if summary.get("status") == "diverged":
            reason = str(summary.get("error", "diverged"))
        return dataclasses.replace(row, status="FAILED", reason=reason) if reason else row

    def work(self, executor: str, slots: int, side_by_side: bool | None) -> list[Row]:
        """Do what is not done."""
        left = [run for run in self.runs if self.rows[run.name].status == "unfinished"]
        self.say(f"{len(self.runs)} runs in {self.folder}: {len(left)} to do, {slots} at a time")
        for run in self.runs:
            if run not in left:
                self.show_end(self.rows[run.name])
        write_tables(self.folder, self.spec, list(self.rows.values()))
        self.waiting.extend(Work(self, part) for part in shares(left, slots, side_by_side))
        with contextlib.closing(EXECUTORS[executor].run(self.waiting, slots)) as ends:
            for work, status in ends:
                self.settle(work, status)
        rows = list(self.rows.values())
        for table in shown_tables(self.folder, rows):
            self.console.print(table)
        return rows

    def settle(self, work: Work, status: int) -> None:
        """Note how the runs of a process ended, and put those that are worth it before all that wait.

        Args:
            work: What the process worked on.
            status: Its exit status.
        """
        left = [run for run in work.runs if not self.noted(run)]
        if not left:
            return
        reason, again = self.judge(work, left[0], status)
        if again:
            left = [run for run in left if self.may_try_again(run, reason)]
            # What kills a process may be one of its runs: each has its last attempt alone.
            alone = any(self.attempts[run.name] == ATTEMPTS - 1 for run in left)
            parts = [[run] for run in left] if alone else [left]
        elif len(work.runs) == 1:
            self.note(self.row(left[0], reason))
            return
        else:
            self.say(f"{work.name}: {reason}: trying them again in halves")
            parts = [left[: len(left) // 2], left[len(left) // 2 :]]
        self.waiting.extendleft(Work(self, part) for part in reversed(parts) if part)

    def may_try_again(self, run: PlannedRun, reason: str) -> bool:
        """Count an attempt, and say whether there is another one."""
        self.attempts[run.name] += 1
        count = self.attempts[run.name]
        if count < ATTEMPTS:
            self.say(f"{run.name}: {reason}: trying again, {count} of {ATTEMPTS - 1}")
            return True
        self.note(self.row(run, f"{reason}, the last of {ATTEMPTS} attempts"))
        return False

    def noted(self, run: PlannedRun) -> bool:
        """Say whether a run has ended; where its folder says so for the first time, note it."""
        if self.rows[run.name].status == "unfinished" and (self.folder / run.name / "summary.json").exists():
            row = self.row(run)
            if row.status != "unfinished":
                self.note(row)
        return self.rows[run.name].status != "unfinished"

    def note(self, row: Row) -> None:
        """Print how a run ended, and write the tables."""
        self.rows[row.name] = row
        self.show_end(row)
        write_tables(self.folder, self.spec, list(self.rows.values()))

    def show_end(self, row: Row) -> None:
        """Print how a run ended."""
        errors = "  ".join(f"{name} {error:.2f}" for name, error in row.top1_error.items())
        self.say(f"{row.name}: {row.status}" + (f": {row.reason}" if row.reason else f"  error %: {errors}"))

    def judge(self, work: Work, run: PlannedRun, status: int) -> tuple[str, bool]:
        """Say why a process ended, and whether it is worth another attempt.

        Args:
            work: What it worked on.
            run: Of that, one whose folder does not say how it ended.
            status: Its exit status; negative, or above 128 as a shell has it, where a signal ended it.
        """
        number = -status if status < 0 else status - 128
        if number > 0:
            known = {each.value: each.name for each in signal.Signals}
            return f"killed by {known.get(number, f'signal {number}')}", True
        if status == 0:
            try:
                Run(self.folder / run.name).summary  # noqa: B018
            except CodistillError as error:
                return str(error), False
        log = work.logs[0]
        said = log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2].splitlines()
        errors = [line.partition("codistill: error: ")[2] for line in said if line.startswith("codistill: error: ")]
        reason = errors[-1] if errors else f"ended with status {status}: {log} has what it said"
        return reason, status == WorkerError.exit_status


def own_program(arguments: Sequence[str]) -> list[str]:
    """Give what this process was started with before the arguments of its command, so that its plug-ins are there too.

    Args:
        arguments: The command and its arguments.

    Returns:
        For example python and the path of a script; `python -m codistill` where the process was started otherwise.
    """
    given = [each for each in sys.orig_argv if each != "--debug"]
    own = len(given) - len(arguments)
    return [sys.executable, *given[1:own]] if own > 0 and given[own:] == list(arguments) else list(PROGRAM)
