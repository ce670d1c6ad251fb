"""Jobs of a SLURM cluster, submitted as arrays through submitit."""

import contextlib
import dataclasses
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from codistill.core.errors import UsageError
from codistill.core.extras import refuse_missing
from codistill.sweeps.engines.engine import Engine, Work, lost

if TYPE_CHECKING:
    from codistill.sweeps.spec import PlannedRun

LARGEST_ARRAY = 250  # each of its runs has two files open meanwhile, and a process often no more than 1,024
MINUTES = 60
REQUEUES = 1000
# How long the result of a job that is gone may take to be seen on a network drive.
RESULT_SECONDS = 10.0
STOP_SECONDS = 0.5
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands, and return its answer; one that takes a minute has failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer within a minute")


class SlurmWork(Work):
    """Work that goes on after the time limit of its job: the run saves, and the job is queued again."""

    def __call__(self) -> int:
        """Run the command; SIGTERM, which `scancel` sends to this process only, is passed on, so that the run saves."""
        signal.signal(signal.SIGTERM, self.cancelled)
        return super().__call__()

    def cancelled(self, *_: object) -> None:
        """Pass SIGTERM on; the exit status of the command is then that of the job."""
        if self.process is None:
            raise SystemExit(128 + signal.SIGTERM)
        self.process.terminate()

    def checkpoint(self) -> Any:
        """Save, within the 90 seconds between submitit's SIGUSR2 and the limit; return what runs after the requeue."""
        from submitit.helpers import DelayedSubmission

        self.halt()
        return DelayedSubmission(dataclasses.replace(self, process=None))


class Slurm(Engine):
    """Jobs of a SLURM cluster with a folder that its nodes share; arrays where several start at once."""

    seconds = 5.0
    settings: Mapping[str, type] = {
        **dict.fromkeys(("partition", "account", "qos", "constraint", "gres", "mem"), str),
        **dict.fromkeys(("time", "cpus_per_task"), int),
        "setup": list,
    }

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        refuse_missing("--executor slurm", "submitit")
        if not shutil.which("sbatch"):
            raise UsageError("--executor slurm: there is no sbatch here: start the sweep where SLURM's commands are")
        place = folder.resolve()
        # Another cluster, or one set up again, has jobs of the same numbers.
        self.folder = place / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.name = f"codistill-{hashlib.sha256(bytes(place)).hexdigest()[:8]}"
        self.given = {"time": MINUTES, **settings}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in self.given.items() if key != "setup"]
        tried = ask("sbatch", "--test-only", "--wrap=true", "--output=/dev/null", *flags)
        if tried.returncode:
            lines = [line.removeprefix("sbatch: error: ") for line in tried.stderr.splitlines()]
            raise UsageError(f"--executor slurm: {': '.join(lines)}: see [slurm] in the spec, and sinfo")
        self.states: dict[str, str] = {}
        self.asked = 0.0

    def room(self, runs: Sequence["PlannedRun"]) -> int:
        """Return the size of the largest array: SLURM has the jobs wait that it has no room for."""
        return LARGEST_ARRAY

    def start(self, works: Sequence[Work], logs: Sequence[Sequence[IO[bytes]]]) -> list["SlurmJob"]:
        """Submit jobs, several as an array; on their nodes they wait for the locks."""
        import submitit

        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=REQUEUES)
        given = dict(self.given)
        more = {"requeue": True, **{key: given.pop(key) for key in ("mem",) if key in given}}  # submitit has GB only
        executor.update_parameters(job_name=self.name, additional_parameters=more, **given)
        works = [SlurmWork(**vars(work)) for work in works]
        try:
            with executor.batch() if len(works) > 1 else contextlib.nullcontext():
                submitted = [executor.submit(work) for work in works]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            raise UsageError(f"--executor slurm: sbatch has refused: {error}: see [slurm] in the spec") from None
        self.asked = 0.0
        return [
            SlurmJob(self, job.job_id, job.paths.result_pickle, work)
            for job, work in zip(submitted, works, strict=True)
        ]

    def state(self, job: str) -> str:
        """Return the state of a job by the last answer of squeue, which is asked again after a while; empty: unknown.

        Accounting, which sacct and submitit's own watcher need, is not set up everywhere.
        """
        if time.monotonic() - self.asked > self.seconds:
            answer = ask("squeue", "--me", f"--name={self.name}", "--array", "--states=all", "-h", "--format=%i %T")
            if answer.returncode == 0:  # or else the controller may be back at the next time
                self.states = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())
            self.asked = time.monotonic()
        return self.states.get(job, "")

    def record(self, job: "SlurmJob") -> str:
        """Return the id of a job."""
        return f"SLURM job {job.name}"

    def alive(self, record: str) -> bool:
        """Return whether SLURM still has a job of such an id that waits or runs."""
        state = self.state(record.removeprefix("SLURM job "))
        return bool(state) and state not in ENDED

    def stop(self, jobs: Sequence["SlurmJob"]) -> None:
        """Cancel jobs, which sends them SIGTERM, and wait until they are gone."""
        if jobs:
            ask("scancel", *(job.name for job in jobs))
        while any(self.alive(self.record(job)) for job in jobs):
            time.sleep(STOP_SECONDS)
            self.asked = 0.0


class SlurmJob:
    """A job that was submitted."""

    def __init__(self, engine: Slurm, name: str, result: Path, work: Work) -> None:
        self.engine, self.name, self.result, self.work = engine, name, result, work
        self.gone: float | None = None

    def poll(self) -> int | None:
        """Return the exit status that the job has written, or LOST where SLURM has ended it."""
        record = self.engine.record(self)
        if self.result.exists():
            kind, found = pickle.loads(self.result.read_bytes())
            return int(found) if kind == "success" else lost(self.work, f"{record}: {found.strip().splitlines()[-1]}")
        if self.engine.alive(record):
            self.gone = None
        elif self.gone is None:
            self.gone = time.monotonic()
        elif time.monotonic() - self.gone > RESULT_SECONDS:
            return lost(self.work, f"{record} ended as {self.engine.state(self.name) or 'unknown'}")
        return None
