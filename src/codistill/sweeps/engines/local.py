"""Processes on this machine."""

import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import torch

from codistill.core.errors import CodistillError
from codistill.core.host import default_threads
from codistill.settings.build import load_named_data
from codistill.sweeps.engines.engine import Engine, Process, Work, launch
from codistill.training.prepare import DeviceSplits, build_taught, check
from codistill.training.sharing import share_cores

if TYPE_CHECKING:
    from codistill.sweeps.spec import PlannedRun


class Local(Engine):
    """Processes on this machine, which share its GPUs, or its cores."""

    def room(self, runs: Sequence["PlannedRun"]) -> int:
        """Return the number of GPUs; without any, what a short measurement of the first run finds fastest."""
        return torch.cuda.device_count() or measured_slots(runs)

    def start(self, works: Sequence[Work], logs: Sequence[Sequence[IO[bytes]]]) -> list[Process]:
        """Start processes that inherit the locks on the logs, and live on if this one is killed."""
        return [
            launch(work.command(), held, slot_environment(*work.slot, work.device), work.cwd)
            for work, held in zip(works, logs, strict=True)
        ]

    def stop(self, jobs: Sequence[Process]) -> None:
        """Make processes save and end, and wait for them; a second signal meanwhile kills them."""
        try:
            for process in jobs:
                process.terminate()
            for process in jobs:
                process.wait()
        except BaseException:
            for process in jobs:
                process.kill()
            for process in jobs:
                process.wait()
            raise


def measured_slots(runs: Sequence["PlannedRun"]) -> int:
    """Choose by a short measurement of the first run how many train at a time on a CPU; 1 where it cannot be built."""
    configs = [run.config for run in runs if run.config]
    if len(configs) < 2:
        return 1
    try:
        data = load_named_data(configs[0])
        plan = check(build_taught(configs[0], data), data, configs[0], torch.device("cpu"))
        splits = DeviceSplits(data, plan.device, plan.config.execution.stream)
        return share_cores([plan] * len(runs), splits)[0]
    except CodistillError:  # its process reports it
        return 1


def slot_environment(slot: int, slots: int, device: str) -> dict[str, str]:
    """Return the environment of the process in a slot: its share of the CPU threads and one of the GPUs.

    The number of threads that the user has set stays, and so does a device that the settings name.
    """
    variables = dict(os.environ)
    if slots > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, default_threads() // slots)))
    gpus = torch.cuda.device_count()
    if gpus > 1 and device in ("auto", "cuda"):
        visible = variables.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    return variables
