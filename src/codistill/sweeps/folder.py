"""The folder of a sweep: which sweeps are at work in it, on this machine and others, and which runs each has.

All of it is `flock` on files of the folder, which the kernel releases with the process.
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from codistill.core.errors import UsageError
from codistill.core.files import read_json, system_error, write_json
from codistill.runs.folder import ANOTHER
from codistill.runs.lock import owner, taken, this_process, write_line
from codistill.sweeps.naming import canonical, digest
from codistill.sweeps.spec import PlannedRun

PLAN = "sweep.json"
# How long another sweep may take to plan its runs; that measures steps where it has controls.
PLAN_SECONDS = 120.0
WAIT_SECONDS = 0.1


@contextlib.contextmanager
def at_work(folder: Path, plan: Callable[[], list[PlannedRun]]) -> Iterator[list[PlannedRun]]:
    """Yield the runs of a sweep while it is at work in a folder, alone or beside others with the same runs.

    The first one has the folder for itself while it plans and writes `sweep.json`; then all share it.

    Raises:
        UsageError: The folder cannot be used, or another sweep with other runs is at work in it.
    """
    if (folder / "config.json").exists():
        raise UsageError(f"sweep folder {folder} is a run folder: choose another --out")
    with contextlib.ExitStack() as opened:
        try:
            for each in ("logs", "recipes"):
                (folder / each).mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context(open(folder / ".lock", "a+"))
            late = time.monotonic() + PLAN_SECONDS
            while not (alone := taken(lock, fcntl.LOCK_EX)) and not taken(lock, fcntl.LOCK_SH):
                if time.monotonic() > late:
                    raise UsageError(f"sweep folder {folder} is in use by {owner(lock)}: wait for it, or {ANOTHER}")
                time.sleep(WAIT_SECONDS)
            if alone:
                write_line(lock, this_process())
                Claims.forget_failures(folder / "logs")
            runs = plan()
            planned = {run.name: digest(run.config) if run.config else canonical(run.recipe) for run in runs}
            if alone:
                write_json(folder / PLAN, {"runs": planned})
                fcntl.flock(lock, fcntl.LOCK_SH)
            others = read_json(folder / PLAN)["runs"]
        except OSError as error:
            raise system_error(error, f"sweep folder {folder}", fix=ANOTHER) from None
        if others != planned:
            unlike = sorted(dict(planned.items() ^ others.items()))
            some = ", ".join(unlike[:3]) + (", .." if len(unlike) > 3 else "")
            raise UsageError(
                f"sweep folder {folder} is in use by {owner(lock)} with another spec, whose runs differ ({some}): "
                f"wait for it, or {ANOTHER}"
            )
        yield runs


class Claims:
    """The runs that this sweep has in its hands: a locked file for each, which says what another sweep needs to know.

    Its contents: `by`, this process; `job`, where an engine has one that outlives the sweep; `failed`, the reason for
    which the run is not tried any more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._held = folder, dict[str, IO[str]]()

    @staticmethod
    def forget_failures(folder: Path) -> None:
        """Have a sweep that is alone in a folder try again what earlier ones did not try any more."""
        for claim in folder.glob("*.claim"):
            with claim.open(encoding="utf-8") as file:
                failed = "failed" in _contents(file)
            if failed:
                claim.unlink()

    def take(self, name: str) -> tuple[bool, dict[str, str]]:
        """Try to take a run; return whether it is in the hands of this sweep now, and what the last one has written."""
        file = self._held.get(name) or open(self._folder / f"{name}.claim", "a+")  # noqa: SIM115
        if mine := taken(file, fcntl.LOCK_EX):
            self._held[name] = file
        file.seek(0)
        found = _contents(file)
        if not mine:
            file.close()
        return mine, found

    def write(self, names: Sequence[str], **contents: str) -> None:
        """Note something about runs that are in the hands of this sweep."""
        for name in names:
            if name in self._held:
                write_line(self._held[name], json.dumps({"by": this_process(), **contents}))

    def release(self, *names: str) -> None:
        """Leave runs to other sweeps."""
        for name in names:
            if file := self._held.pop(name, None):
                file.close()

    def close(self) -> None:
        """Leave all runs."""
        self.release(*list(self._held))


def _contents(claim: IO[str]) -> dict[str, str]:
    """Return what a claim says; nothing: it is empty, just being written, or damaged."""
    with contextlib.suppress(ValueError):
        found = json.loads(claim.read())
        return found if isinstance(found, dict) else {}
    return {}
