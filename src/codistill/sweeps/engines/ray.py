"""Tasks of a Ray cluster, or of one that is started on this machine."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from codistill.core.errors import UsageError
from codistill.core.extras import refuse_missing
from codistill.sweeps.engines.engine import Engine, Work, lost

if TYPE_CHECKING:
    from codistill.sweeps.spec import PlannedRun

REACH_SECONDS = 5.0
HERE = "local"  # the address by which Ray starts a cluster on this machine
STORE_BYTES = 100 * 2**20  # what tasks hand over is a few kilobytes; Ray would take a third of the memory


class Ray(Engine):
    """Tasks of a Ray cluster whose nodes share a folder, or of one on this machine; runs may share a GPU."""

    seconds = 0.5
    settings: Mapping[str, type] = {"address": str, "cpus": float, "gpus": float}

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        refuse_missing("--executor ray", "ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ray: Any = importlib.import_module("ray")
        self.ours = not self.ray.is_initialized()
        if self.ours:
            reach(self.ray, settings.get("address") or os.environ.get("RAY_ADDRESS") or HERE)
        has = self.ray.cluster_resources()
        needs = {"CPU": settings.get("cpus", 1.0), "GPU": settings.get("gpus", 1.0 if has.get("GPU") else 0.0)}
        self.fits = min((int(has.get(name, 0) / need) for name, need in needs.items() if need), default=1)
        if self.fits < 1:
            self.close()
            shown = " and ".join(f"{need:g} {name}" for name, need in needs.items())
            raise UsageError(
                f"--executor ray: a run needs {shown}, which the cluster does not have: see [ray] in the spec"
            )
        self.task = self.ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_retries=0)(run)

    def room(self, runs: Sequence["PlannedRun"]) -> int:
        """Return how many runs the cluster holds at a time."""
        return self.fits

    def start(self, works: Sequence[Work], logs: Sequence[Sequence[IO[bytes]]]) -> list["RayJob"]:
        """Hand tasks in; on their nodes they wait for the locks."""
        # The environment is that of this process, but for what Ray sets on the node.
        kept = {
            name: each for name, each in os.environ.items() if name != "CUDA_VISIBLE_DEVICES" and name[:4] != "RAY_"
        }
        works = [dataclasses.replace(work, variables=kept) for work in works]
        return [RayJob(self.ray, self.task.remote(work), work) for work in works]

    def stop(self, jobs: Sequence["RayJob"]) -> None:
        """Cancel tasks, whose commands save and end, and wait for them; a second signal meanwhile kills them."""
        try:
            for job in jobs:
                self.ray.cancel(job.result)
            self.ray.wait([job.result for job in jobs], num_returns=len(jobs)) if jobs else None
        except BaseException:
            for job in jobs:
                self.ray.cancel(job.result, force=True)
            raise

    def close(self) -> None:
        """Leave the cluster, and end one that was started here."""
        if self.ours:
            self.ray.shutdown()


class RayJob:
    """A task that was handed in."""

    def __init__(self, ray: Any, result: Any, work: Work) -> None:
        self.ray, self.result, self.work = ray, result, work

    def poll(self) -> int | None:
        """Return the exit status of the command, or LOST where the task was cancelled or its worker died."""
        if not self.ray.wait([self.result], timeout=0)[0]:
            return None
        try:
            return int(self.ray.get(self.result))
        except self.ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            return lost(self.work, f"Ray lost its task: {type(error).__name__}: {last}")


def run(work: Work) -> int:
    """Run the command of a job in a worker of Ray."""
    return work()


def reach(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one here, without its dashboard and logs.

    Raises:
        UsageError: It cannot be reached.
    """
    how = {"include_dashboard": False, "object_store_memory": STORE_BYTES} if address == HERE else {}
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), REACH_SECONDS).close()
        with kept_signal():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **how)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        line = " ".join(str(error).split())[:300]
        raise UsageError(f"--executor ray: no cluster at {address}: {line}: see [ray] in the spec") from None


@contextlib.contextmanager
def kept_signal() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
