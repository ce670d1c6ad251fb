"""Output for a person: a live bar on a terminal, a line in place in a notebook, plain lines elsewhere, tables, notices.

rich is imported by those who draw: `import codistill` leaves it alone.
"""

import contextlib
import functools
import importlib
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")
LINE_SECONDS = 10.0
BAR_SECONDS = 0.25


def duration(seconds: float) -> str:
    """Write a time as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def lasting_console(show: bool, **options: Any) -> "Console":
    """Make a rich console whose reader may go away (`| head -1`): later output is dropped, without an error.

    Brackets and colons are what they are, also in paths: no markup.
    """
    from rich.console import Console

    class LastingConsole(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            # Or else Python stumbles over the rest of the buffer when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    if Console().is_jupyter:  # where each print would be an output of its own
        plain |= {"force_jupyter": False, "force_terminal": False, "width": 115}
    return LastingConsole(quiet=not show, **(plain | options))


def track(items: Iterable[T], title: str, total: int | None) -> Iterable[T]:
    """Return items that show a progress bar on standard error, if that is a terminal, while they are used up."""
    import rich.progress
    from rich.console import Console

    console = Console(stderr=True)
    quiet = not console.is_terminal
    return rich.progress.track(items, title, total=total, console=console, transient=True, disable=quiet)


class CellLine:
    """A line in the output of a notebook's cell, which later ones replace there."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, line: str) -> None:
        """Show a line; without IPython, or a cell to show it in, nothing."""
        with contextlib.suppress(Exception):  # no display is worth a run
            display = importlib.import_module("IPython.display").display
            content = {"text/plain": line}
            if self._handle is None:
                self._handle = display(content, raw=True, display_id=True)
            else:
                self._handle.update(content, raw=True)


class TrainingDisplay:
    """Show epoch, step, images/s, loss terms and the time left of a run of so many epochs, each of steps and images.

    Every line begins with the label; nothing is printed unless `show`.
    """

    def __init__(self, epochs: int, steps: int, images: int, show: bool = True, label: str = "") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = lasting_console(show)
        self._cell = CellLine() if show and Console().is_jupyter else None
        self.epochs, self.steps, self.images = epochs, steps, images
        self.label = f"{label}: " if label else ""
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}  {task.fields[status]}"),
            console=self.console,
            disable=not (show and self.console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, epoch=1, status="")
        self._started = self._epoch_started = self._shown = time.monotonic()
        self._steps_before = 0

    def __enter__(self) -> "TrainingDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show_lines(self) -> None:
        """Print lines in place of the bar, where several processes share the terminal."""
        self._bar.disable, self._cell = True, None

    def resume(self, epochs: int, steps: int = 0) -> None:
        """Estimate the time left from the speed after this point, given in epochs and steps of the next one."""
        self._steps_before = epochs * self.steps + steps

    def begin_epoch(self, epoch: int) -> None:
        """Start the bar of an epoch, counted from 0."""
        self._epoch_started = time.monotonic()
        self._bar.reset(self._task, total=self.steps, epoch=epoch + 1, status="")

    def due(self) -> bool:
        """Whether enough time has passed to show a step again."""
        period = LINE_SECONDS if self._bar.disable and self._cell is None else BAR_SECONDS
        return time.monotonic() - self._shown >= period

    def step(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Show the state after a step, counted from 1; `terms` may be empty where reading them would stall a GPU."""
        self._shown = time.monotonic()
        done = epoch * self.steps + step
        images = min(step, done - self._steps_before) * self.images / self.steps
        rate = images / (self._shown - self._epoch_started)
        status = f"{rate:,.0f} images/s  {term_text(terms)}  {self._left(done)} left"
        self._bar.update(self._task, completed=step, status=status)
        line = f"epoch {epoch + 1}/{self.epochs}  step {step}/{self.steps}  {status}"
        if self._cell is not None:
            self._cell.show(self.label + line)
        elif self._bar.disable:
            self._print(line)

    def expect(self, epoch: int, step: int, seconds: float) -> None:
        """Print how long the rest of a run of minutes takes, by the seconds of a step, after a step counted from 1."""
        left = seconds * ((self.epochs - epoch) * self.steps - step)
        if left > 60:
            self._print(f"about {duration(left)} of training to go, by the first steps; evaluation comes to it")

    def note(self, line: str) -> None:
        """Print a line that is of no epoch, without the label."""
        self.console.print(line, soft_wrap=True)

    def _print(self, line: str) -> None:
        self.console.print(self.label + line, soft_wrap=True)

    def _left(self, done: int) -> str:
        """Estimate the time left after so many steps of the whole run."""
        pace = (time.monotonic() - self._started) / max(1, done - self._steps_before)
        return duration(pace * (self.epochs * self.steps - done))

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Print the line of a finished epoch."""
        epoch = row["epoch"] + 1
        speed, terms, left = f"{row['images_per_second']:,.0f}", term_text(row["train"]), self._left(epoch * self.steps)
        errors = [
            f"{split} error %: " + "  ".join(f"{name} {each['top1_error']:.2f}" for name, each in row[split].items())
            for split in ("validation", "test")
            if split in row
        ]
        self._print("  ".join([f"epoch {epoch}/{self.epochs}", f"{speed} images/s", terms, *errors, f"{left} left"]))
        for warning in row["warnings"]:
            self._print(f"warning: epoch {epoch}: {warning}")


def term_text(terms: Mapping[str, float]) -> str:
    """Write loss terms briefly, those of all students side by side."""
    grouped: dict[str, list[str]] = {}
    for name, value in terms.items():
        grouped.setdefault(name.rstrip("0123456789"), []).append(f"{value:.3f}")
    return "  ".join(f"{name} {' '.join(values)}" for name, values in grouped.items())


def summary_table(summary: Mapping[str, Any], keys: Mapping[str, str]) -> "Table":
    """Make the table that ends a run of summary.json, where `keys` name the top-1 errors of each split."""
    from rich.table import Table

    splits = [split for split in keys if split in summary]
    title = f"{summary['method']} on {summary['data']}, {summary['epochs']} epochs, seed {summary['seed']}"
    table = Table(title=f"{title}: errors{' on the test set' if len(splits) == 1 else ''}, %")
    table.add_column("predictor", no_wrap=True)
    if len(splits) > 1:
        table.add_column("images", no_wrap=True)
    table.caption = f"top-1 best: at epoch {summary['best_epoch']}, of a student's lowest {splits[0]} error"
    for heading in ("top-1 last", "top-1 best", "top-5", "ECE", "NLL", "parameters"):
        table.add_column(heading.replace(" ", "\n") if len(splits) > 1 else heading, justify="right")
    for name, parameters in summary["parameters"].items():
        for split in splits:
            scores, names = summary[split][name], [name, split] if len(splits) > 1 else [name]
            numbers = [f"{summary[prefix + keys[split]][name]:.2f}" for prefix in ("", "best_epoch_")]
            numbers += [f"{scores['top5_error']:.2f}", f"{scores['ece']:.2f}", f"{scores['nll']:.4f}"]
            table.add_row(*names, *numbers, f"{parameters:,}")
    return table


def warn(line: str) -> None:
    """Print a warning of one line."""
    print(f"codistill: warning: {line}", file=sys.stderr)


warn_once = functools.cache(warn)
"""Print a warning of one line, once in a process."""


def note(line: str) -> None:
    """Print a line about something that takes a while."""
    print(f"codistill: {line}", file=sys.stderr)


note_once = functools.cache(note)
"""Print a line, once in a process."""
