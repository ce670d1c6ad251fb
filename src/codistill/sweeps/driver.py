"""Many runs in processes and folders of their own; a stopped sweep resumes with the same command."""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from codistill.core.console import lasting_console
from codistill.core.errors import CodistillError, UsageError, WorkerError
from codistill.core.files import write_json
from codistill.core.imports import import_flags, split_imports
from codistill.core.registry import near_matches
from codistill.core.signals import Interrupted, Terminated
from codistill.runs.folder import RunFolder
from codistill.runs.latency import read_latency
from codistill.sweeps.controls import with_controls
from codistill.sweeps.dealing import assign, find_folders
from codistill.sweeps.engines.engine import Engine, Work, ended, locked
from codistill.sweeps.engines.local import Local
from codistill.sweeps.engines.registry import ENGINES
from codistill.sweeps.folder import Claims, at_work
from codistill.sweeps.progress import MEASURE_SECONDS, Estimates, LiveTable, dry_run_lines
from codistill.sweeps.search import Search, read_search
from codistill.sweeps.spec import PlannedRun, engine_settings, read_spec
from codistill.sweeps.table import Row, write_tables

# How often a sweep looks again at a run on which another one works.
LOOK_SECONDS = 2.0
# How often a run is tried whose process was killed, or lost a worker of its own: once, and two times again.
ATTEMPTS = 3
RESUMES = "what the runs have saved is kept: the same command resumes them"
# What a row has of summary.json; runs without validation images, and of older versions, lack some.
RESULTS = (
    *("top1_error", "best_epoch_top1_error", "balanced_error", "top1_error_interval", "validation_top1_error"),
    *("best_student", "chosen_by"),
)
PROGRAM = (sys.executable, "-m", "codistill")


def sweep(
    spec: str | Path,
    out: str | Path,
    *,
    executor: str = "local",
    slots: int | None = None,
    side_by_side: bool | None = None,
    skip_bad: bool = False,
    controls: bool = False,
    dry_run: bool = False,
    program: Sequence[str] = PROGRAM,
    show: bool = True,
) -> list[Row]:
    """Train the runs of a spec, each in a folder below `out`, and write `table.json` and `table.md` there.

    Runs that are finished or have diverged are not repeated, and interrupted ones resume from their last checkpoint. A
    process that a signal killed, or that lost a worker, is started again, two times at most. Where a process works on
    several runs, an error of one of them does not cost the others.

    Args:
        spec: A TOML file: settings of all runs, `[grid]` and `[[runs]]`, or `[search]`; see docs/sweep.md.
        out: The folder of the sweep; made where it does not exist.
        executor: What runs the processes: local, slurm or ray; `[slurm]` and `[ray]` in the spec set these up.
        slots: How many processes at a time. None, local: one for each GPU; on a CPU by a short measurement of the first
            run. None, slurm: all that are to do, at most 250; ray: as many as the cluster holds.
        side_by_side: Whether runs that can train side by side share a process. None: on CUDA, in one graph.
        skip_bad: Whether the runs leave out images of a folder that cannot be read.
        controls: Whether to train the controls of the runs, too; see `codistill list`.
        dry_run: Whether only to print the runs in their order with estimated minutes; nothing is started or written.
        program: What is put before `train ..` and `resume ..` to make a command.
        show: Whether to print progress and the final tables.

    Returns:
        A row for each run, in the order of the spec, with the reason where it failed.

    Raises:
        UsageError: The spec is wrong, the folder cannot be used, or the engine cannot be reached; no run was started.
    """
    if executor not in ENGINES:
        raise UsageError(f"unknown executor {executor!r}: {near_matches(executor, ENGINES)}")
    if slots is not None and slots < 1:
        raise UsageError(f"slots is {slots}; it must be at least 1")
    wanted, settings, folder = read_search(Path(spec), skip_bad), engine_settings(Path(spec)), Path(out)
    if wanted and controls:
        raise UsageError("--controls: a search has none: train them beside its best trial")
    runs = read_spec(Path(spec), skip_bad) if wanted is None else []
    if dry_run:
        planned = find_folders(folder, with_controls(runs, folder, keep=False) if controls else runs)
        planned = wanted.draft() if wanted else planned
        engine = (Local if executor == "local" else Engine)(folder, {})  # no other one is reached
        return Sweep(Path(spec), folder, planned, engine, program, show).show_plan(slots, side_by_side)
    search = Search(wanted, folder, show) if wanted else None

    def plan() -> list[PlannedRun]:
        if search is not None:
            return search.begin()
        return find_folders(folder, with_controls(runs, folder) if controls else runs)

    with (
        contextlib.closing(ENGINES[executor](folder, settings[executor])) as engine,
        contextlib.closing(search) if search else contextlib.nullcontext(),
        at_work(folder, plan) as planned,
    ):
        try:
            return Sweep(Path(spec), folder, planned, engine, program, show, search).train(slots, side_by_side)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {RESUMES}") from None
        except Terminated:
            raise Terminated(f"terminated; {RESUMES}") from None


@dataclass(eq=False)
class Job:
    """One run, or several that train side by side: in the hands of this sweep, or of another one that works on them."""

    runs: list[PlannedRun]
    started: Any = None
    elsewhere: str = ""
    """Who works on them, if that has been found."""
    look: float = 0.0
    """When to look again whether the other one still does."""

    @property
    def name(self) -> str:
        """The names of the runs, or of the first ones."""
        more = f" and {len(self.runs) - 3} more" if len(self.runs) > 3 else ""
        return ", ".join(run.name for run in self.runs[:3]) + more


class Sweep:
    """A sweep at work in a folder: how far each run is, which ones wait, how often each was tried."""

    def __init__(
        self,
        spec: Path,
        folder: Path,
        runs: Sequence[PlannedRun],
        engine: Engine,
        program: Sequence[str],
        show: bool,
        search: Search | None = None,
    ) -> None:
        self.spec, self.folder, self.engine, self.program, self.search = spec, folder, engine, list(program), search
        self.console = lasting_console(show, markup=False)
        self.runs = list(runs)
        self.rows = {run.name: self.row(run) for run in self.runs}
        self.waiting: deque[Job] = deque()
        self.busy: dict[int, Job] = {}
        self.attempts = Counter[str]()
        self.claims = Claims(folder / "logs")
        self.estimates = Estimates(folder)
        for run in self.runs:
            if self.rows[run.name].status == "finished":
                self.estimates.learn(run)

    def show_plan(self, slots: int | None, side_by_side: bool | None) -> list[Row]:
        """Print what `train` would start, in which order, and how long it takes."""
        left = [run for run in self.runs if self.rows[run.name].status == "unfinished"]
        slots = slots or self.engine.room(left) or 1
        self.estimates.measure(left, math.inf)
        order = [run for part in assign(left, slots, side_by_side) for run in part]
        self.say("\n".join(dry_run_lines(order, self.rows, self.estimates, slots)))
        return list(self.rows.values())

    def train(self, slots: int | None, side_by_side: bool | None) -> list[Row]:
        """Train the runs without an end: start what there is room for, poll, act on each exit."""
        left = [run for run in self.runs if self.rows[run.name].status == "unfinished"]
        slots = slots or self.engine.room(left)
        self.say(f"{len(self.runs)} runs in {self.folder}: {len(left)} to do, {min(slots, len(left))} at a time")
        self.note(*(row for row in self.rows.values() if row.status != "unfinished"))
        self.waiting.extend(map(Job, assign(left, slots, side_by_side)))
        live = LiveTable(self.console, self.estimates)
        if live.shown and isinstance(self.engine, Local):
            self.estimates.measure(left, MEASURE_SECONDS)
        try:
            with live:
                while self.grow(slots, side_by_side) or self.waiting or self.busy:
                    self.fill(slots)
                    live.draw(self.rows.values(), *(self.open(jobs) for jobs in (self.busy.values(), self.waiting)))
                    time.sleep(self.engine.seconds)
                    for slot, job in list(self.busy.items()):
                        self.unfinished(job)  # the table has runs that ended while others of their process train
                        if (status := job.started.poll()) is not None:
                            del self.busy[slot]
                            self.on_exit(job, status)
        finally:
            try:
                self.engine.stop([job.started for job in self.busy.values()])
            finally:
                self.claims.close()
        self.say("\n" + (self.folder / "table.md").read_text(encoding="utf-8"))
        if self.search:
            self.say(self.search.result(self.rows))
        return list(self.rows.values())

    def open(self, jobs: Collection[Job]) -> list[PlannedRun]:
        """Return the runs of jobs that have not ended, as far as was noted."""
        return [run for job in jobs for run in job.runs if self.rows[run.name].status == "unfinished"]

    def grow(self, slots: int, side_by_side: bool | None) -> bool:
        """Take on new trials of a search while there is room; return whether there were any."""
        before = len(self.runs)
        while self.search and len(self.waiting) + len(self.busy) < slots and (new := self.search.more(self.rows)):
            self.runs += new
            self.rows |= {run.name: self.row(run) for run in new}
            left = [run for run in new if self.rows[run.name].status == "unfinished"]
            self.note(*(self.rows[run.name] for run in new if run not in left))
            self.waiting.extend(map(Job, assign(left, slots, side_by_side)))
        return len(self.runs) > before

    def fill(self, slots: int) -> None:
        """Start as many of the waiting jobs as there is room for, all at once; leave what others work on."""
        free = [slot for slot in range(slots) if slot not in self.busy]
        begun: list[tuple[Job, Work, list[IO[bytes]]]] = []
        # The contents of the folders are final only under the locks.
        with contextlib.ExitStack() as held:
            for job in [each for each in self.waiting if each.look <= time.monotonic()]:
                if len(begun) == len(free):
                    break
                self.waiting.remove(job)
                if logs := self.prepare(job, held):
                    slot, device = free[len(begun)], job.runs[0].config.execution.device if job.runs[0].config else ""
                    begun.append((job, self.work(job.runs, (slot, slots), device), logs))
            started = self.engine.start([work for _, work, _ in begun], [logs for _, _, logs in begun]) if begun else []
            for (job, work, _), job.started in zip(begun, started, strict=True):
                self.busy[work.slot[0]] = job
                self.claims.write([run.name for run in job.runs], job=self.engine.record(job.started))

    def prepare(self, job: Job, held: contextlib.ExitStack) -> list[IO[bytes]]:
        """Take the runs of a job that have no end and on which no other works; return their logs, locked.

        The others become jobs of their own that wait; so do, where some runs have a folder already, those without.
        """
        logs: dict[str, IO[bytes]] = {}
        busy: dict[str, list[PlannedRun]] = {}
        for run in self.unfinished(job):
            log, who = self.take(run, held)
            if log is not None:
                logs[run.name] = log
            elif who:
                busy.setdefault(who, []).append(run)
        for who, runs in busy.items():
            waits = Job(runs, elsewhere=who, look=time.monotonic() + LOOK_SECONDS)
            if not job.elsewhere:
                self.say(f"{waits.name}: waits for {who} that still works on it")
            self.waiting.append(waits)
        left = [run for run in self.unfinished(job) if run.name in logs]
        begun = [run for run in left if (self.folder / run.name / "config.json").exists()]
        new = [run for run in left if run not in begun]
        if begun and new:
            self.waiting.appendleft(Job(new))
        job.runs = begun or new
        if job.runs:
            self.say(f"{job.name}: {'resume' if begun else 'start'}{' side by side' if len(job.runs) > 1 else 's'}")
        return [logs[run.name] for run in job.runs]

    def take(self, run: PlannedRun, held: contextlib.ExitStack) -> tuple[IO[bytes] | None, str]:
        """Take a run into the hands of this sweep; return its log, locked, or who has it, or neither: it has failed."""
        mine, found = self.claims.take(run.name)
        if not mine:
            return None, found.get("job") or f"the sweep of {found.get('by', 'another process')}"
        if self.engine.alive(found.get("job", "")):
            self.claims.release(run.name)
            return None, found["job"]
        if found.get("failed"):  # tried by a sweep beside this one, as often as this would
            self.note(self.row(run, found["failed"]))
            return None, ""
        self.claims.write([run.name])
        if (logs := held.enter_context(locked([self.folder / "logs" / f"{run.name}.log"]))) is None:
            self.claims.release(run.name)
            return None, "a process of an earlier sweep"
        return logs[0], ""

    def work(self, runs: Sequence[PlannedRun], slot: tuple[int, int], device: str) -> Work:
        """Return what trains or resumes runs, and write their recipes."""
        recipes = [self.folder / "recipes" / f"{run.name}.json" for run in runs]
        for run, recipe in zip(runs, recipes, strict=True):
            write_json(recipe, run.recipe)
        return Work(
            program=self.program,
            runs=[(str(self.folder / run.name), str(recipe)) for run, recipe in zip(runs, recipes, strict=True)],
            logs=[str(self.folder / "logs" / f"{run.name}.log") for run in runs],
            more=import_flags(),
            data_dir=runs[0].recipe.get("data_dir"),
            slot=slot,
            device=device,
        )

    def on_exit(self, job: Job, status: int) -> None:
        """Note how the runs of a process ended, and put those that are tried again before all that wait."""
        self.claims.write([run.name for run in job.runs])  # its job is no more
        left = self.unfinished(job)
        if not left:
            return
        retried, reason = classify_exit(status, self.folder / "logs" / f"{job.runs[0].name}.log")
        if retried:
            self.attempts.update(run.name for run in left)
            again = [run for run in left if self.attempts[run.name] < ATTEMPTS]
            last = f"{reason}, the last of {ATTEMPTS} attempts"
            self.note(*(self.row(run, last) for run in left if run not in again))
            for run in again:
                self.say(f"{run.name}: {reason}: trying again, {self.attempts[run.name]} of {ATTEMPTS - 1}")
            # What kills a process may be one of its runs: each has its last attempt alone.
            alone = any(self.attempts[run.name] == ATTEMPTS - 1 for run in again)
            parts = [[run] for run in reversed(again)] if alone else [again] if again else []
            self.waiting.extendleft(map(Job, parts))
        elif len(job.runs) > 1:  # one of them may be the cause
            self.say(f"{job.name}: {reason}: trying them again in halves")
            parts = [left[len(left) // 2 :], left[: len(left) // 2]]
            self.waiting.extendleft(Job(part) for part in parts if part)
        else:
            self.note(self.row(left[0], reason))

    def unfinished(self, job: Job) -> list[PlannedRun]:
        """Return the runs of a job that have not ended; note those whose folder shows an end for the first time."""
        for run in job.runs:
            if self.rows[run.name].status == "unfinished" and (self.folder / run.name / "summary.json").exists():
                row = self.row(run)
                if row.status != "unfinished":
                    self.note(row)
        return [run for run in job.runs if self.rows[run.name].status == "unfinished"]

    def row(self, run: PlannedRun, reason: str = "") -> Row:
        """Return how far a run is by its folder, which is the whole truth; `reason` counts where that shows no end."""
        folder = self.folder / run.name
        row = Row(name=run.name, group=run.group, folder=str(folder), status="unfinished")
        summary: dict[str, Any] = {}
        try:
            summary = RunFolder(folder).summary
        except CodistillError as error:  # no run folder, or not yet or no longer a whole one
            if ended(folder):  # of no process that could report it
                reason = str(error)
        if summary.get("status") == "finished" and not run.problem:
            found = {key: summary[key] for key in RESULTS if key in summary}
            with contextlib.suppress(CodistillError):  # a damaged latency.json
                latency = read_latency(RunFolder(folder))
                found |= {"milliseconds": latency.milliseconds()} if latency else {}
            return dataclasses.replace(row, status="finished", **found)
        if summary.get("status") == "diverged":
            reason = str(summary.get("error", "diverged"))
        reason = run.problem or reason
        return dataclasses.replace(row, status="FAILED", reason=reason) if reason else row

    def note(self, *rows: Row) -> None:
        """Print how runs ended, and write the tables."""
        runs = {run.name: run for run in self.runs}
        for row in rows:
            self.rows[row.name] = row
            if row.status == "finished":
                self.estimates.learn(runs[row.name])
            errors = "  ".join(f"{name} {error:.2f}" for name, error in row.top1_error.items())
            if row.reason:
                self.claims.write([row.name], failed=row.reason)
            self.claims.release(row.name)
            self.say(f"{row.name}: {row.status}" + (f": {row.reason}" if row.reason else f"  test error %: {errors}"))
        write_tables(self.folder, self.spec, list(self.rows.values()))

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, soft_wrap=True)


def classify_exit(status: int, log: Path) -> tuple[bool, str]:
    """Return whether runs that a process left without an end are tried again as they are, and the reason.

    A signal ended it where the status is negative, or above 128 as a shell has it.
    """
    number = -status if status < 0 else status - 128
    if number > 0:
        known = {each.value: each.name for each in signal.Signals}
        return True, f"killed by {known.get(number, f'signal {number}')}"
    last = log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2].splitlines()
    errors = [line.partition("codistill: error: ")[2] for line in last if line.startswith("codistill: error: ")]
    reason = errors[-1] if errors else f"ended with status {status}: see {log}"
    if status == 0:
        reason = f"no summary.json shows how it ended: see {log}"
    return status == WorkerError.exit_status, reason


def own_program(arguments: Sequence[str]) -> list[str]:
    """Return the command line of this process without the arguments of its command, so that plug-ins are there too.

    For example python and the path of a script; `python -m codistill` where the process was started otherwise.
    """
    given = [each for each in split_imports(sys.orig_argv)[1] if each != "--debug"]
    own = len(given) - len(arguments)
    return [sys.executable, *given[1:own]] if own > 0 and given[own:] == list(arguments) else list(PROGRAM)
