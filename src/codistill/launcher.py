"""The launcher of processes that share a run: it starts and supervises them, and starts all again if one is lost."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from codistill.distributed import Ranks
from codistill.errors import CodistillError, WorkerError
from codistill.host import default_threads
from codistill.notices import warn
from codistill.run import Run
from codistill.signals import SAVING, Interrupted, Terminated, terminate

MAX_RESTARTS = 3
PASSED_ON = (signal.SIGTERM, *SAVING)
# How long a rank waits for the others: rank 0 evaluates alone, and may download data first.
PATIENCE = timedelta(hours=2)


def launch(
    work: Callable[..., None], arguments: Sequence[Any], out: Path, device: torch.device, processes: int, restarts: int
) -> None:
    """Let processes do the work of a run, and start all of them again where one is lost.

    Args:
        work: A function of a module; called with `Ranks`, with whether the run folder is there to go on with, and with
            the arguments. What it raises ends all processes.
        arguments: The rest of its arguments; they are pickled.
        out: The run folder; its config.json, once it is there, says that the run has begun.
        device: Where is computed; on CUDA, each process has the GPU of its number.
        processes: How many.
        restarts: How often all of them may be started again.

    Raises:
        CodistillError: What one of the processes has raised.
        WorkerError: One was killed, or met a bug, and no restart is left.
        Interrupted: After SIGINT; all processes have ended.
        Terminated: After SIGTERM, likewise.
    """
    for attempt in range(restarts + 1):
        begun = (out / "config.json").exists()
        with supervised(), tempfile.TemporaryDirectory(prefix="codistill-ranks-") as folder:
            lost = attempted(processes, folder, work, (device.type, begun, *arguments), out)
        if lost is None or finished(out):
            return
        if attempt < restarts:
            warn(f"{lost}: all processes start again, {attempt + 1} of {restarts}")
            continue
        mend = f": codistill resume {out} goes on from the last checkpoint" if (out / "config.json").exists() else ""
        raise WorkerError(f"{lost}, with no restart left{mend}")


def attempted(
    processes: int, folder: str, work: Callable[..., None], arguments: tuple[Any, ...], out: Path
) -> str | None:
    """Run the processes until all have done their work, or one is lost.

    Args:
        processes: How many.
        folder: For what they say of errors, and for what all but rank 0 print.
        work: See `launch`.
        arguments: The type of device, whether the run has begun, and the arguments of the work.
        out: The run folder.

    Returns:
        A line that says which rank was lost and how; None: all did their work.

    Raises:
        CodistillError: See `launch`.
    """
    # A second to import, and only for runs on several processes.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    heeded = [each.name for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        # Started again by us: on another port, and not after an error that would come again.
        max_restarts=0,
        # Processes fork from one that has imported everything already: they start at once, also again.
        start_method="forkserver",
        signals_to_handle=",".join(heeded),
        logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, processes), Std.ALL)),
    )
    start_server(work.__module__)
    with quiet_launcher():
        try:
            elastic_launch(config, as_rank)(work, *arguments)
        except SignalException as stopped:
            stop(stopped.sigval, out)
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            if failure.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT):
                stop(failure.exitcode - 128, out)
            message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
            kind, _, line = str(message).partition(": ")
            own = {each.__name__: each for each in CodistillError.__subclasses__()}
            if kind in own:
                raise own[kind](line) from None
            how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"failed: {message}"
            return f"rank {rank} of {processes} {' '.join(how.split())}"
    return None


def stop(number: int, out: Path) -> NoReturn:
    """End as a signal has it, once all processes have ended.

    Args:
        number: The signal.
        out: The run folder, in which rank 0 has left a word.

    Raises:
        Interrupted: The signal is SIGINT.
        Terminated: It is another.
    """
    line = "interrupted" if number == signal.SIGINT else "terminated"
    with contextlib.suppress(CodistillError):
        line = Run(out).summary.get("error") or line
    raise Interrupted(line) if number == signal.SIGINT else Terminated(line)


def finished(out: Path) -> bool:
    """Say whether a run came to its end; one process may have been lost after that."""
    return (out / "config.json").exists() and Run(out).finished


@contextlib.contextmanager
def supervised() -> Iterator[None]:
    """Pass SIGUSR1 and SIGUSR2 on to the processes; in the end, however it comes, none is left, and no handler."""

    def forward(number: int, _: object) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, *SAVING)}
        for each in SAVING:
            signal.signal(each, forward)
    known = set(multiprocessing.active_children())
    try:
        yield
    finally:
        for child in set(multiprocessing.active_children()) - known:
            child.kill()
            child.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def start_server(module: str) -> None:
    """Start the process that the ranks fork from; a signal to the whole process group is not its end."""
    # torch imports _dynamo when batch normalisation is first looked at without data, and takes seconds for it.
    multiprocessing.set_forkserver_preload([module, "torch._dynamo"])
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def quiet_launcher() -> Iterator[None]:
    """Keep torch's launcher from logging what becomes an error line anyway."""
    names = [each for each in logging.root.manager.loggerDict if each.startswith(("torch.dist", "torch.multi"))]
    levels = {each: logging.getLogger(each).level for each in names}
    for each in names:
        logging.getLogger(each).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in levels.items():
            logging.getLogger(each).setLevel(level)


def as_rank(work: Callable[..., None], device: str, begun: bool, *arguments: Any) -> None:
    """Do the work of one process; the launcher calls this in each."""
    # A Ctrl-C reaches the launcher only, which passes it on.
    os.setsid()
    signal.signal(signal.SIGTERM, terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    threading.Thread(target=end_with_launcher, daemon=True).start()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, default_threads() // ranks.count))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(ranks.number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        work(ranks, begun, *arguments)
    except KeyboardInterrupt:  # which torch's launcher would take for no end at all
        sys.exit(128 + signal.SIGINT)
    dist.destroy_process_group()


def end_with_launcher() -> None:
    """Save and end where the launcher is no more."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os.kill(os.getpid(), signal.SIGTERM)
