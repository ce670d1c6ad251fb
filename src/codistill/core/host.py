"""The machine around the device: how many threads compute on its cores, and what becomes of memory that they free."""

import ctypes
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Of mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


KEPT_BLOCKS = (256 * 2**20, 32 * 2**20)
"""Bytes from which on a block is given back when it is freed: wished for, and the most that older libraries allow."""


KEPT_AT_THE_TOP = 2**30
"""Bytes of free memory at the end of the heap that are kept."""


def set_up_cpu(threads: int | None, device: torch.device) -> None:
    """Choose the number of threads, and on a CPU keep the memory that a training step frees for the next one.

    A step frees and takes back hundreds of megabytes. By default the C library gives much of it to the kernel, which
    hands it out again page by page, cleared; results/speed-cpu has what that costs.

    Args:
        threads: As in `TrainSettings.threads`; None: the smaller of torch's choice, one for each core, and the
            processor time that the process may use, or what OMP_NUM_THREADS says.
        device: Where is computed.
    """
    count = threads or default_threads()
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    if device.type == "cpu":
        keep_freed_memory()


def default_threads() -> int:
    """Give torch's number of threads, or fewer where a container may not use so many cores."""
    chosen = torch.get_num_threads()
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        return chosen
    quota = processor_quota()
    return chosen if quota is None else max(1, min(chosen, math.ceil(quota)))


def processor_quota(root: Path = Path("/")) -> float | None:
    """Give how many cores' time this process may use by its control group, as containers set it; None: no limit.

    Args:
        root: Where the file system begins.
    """
    limits = []
    for folder in _control_groups(root):
        try:
            if (folder / "cpu.max").exists():
                allowed, period = (folder / "cpu.max").read_text("utf-8").split()
            else:
                allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period"))
            if allowed != "max" and int(allowed) > 0:
                limits.append(int(allowed) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(limits, default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """List the folders of this process's control group and of all above it, version 2 and 1."""
    try:
        entries = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = Path(path.lstrip("/"))
        yield from (mounted / each for each in (group, *group.parents))


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the rest of the process, unless the user has set how it allocates.

    Returns:
        Whether it does; only glibc knows how.
    """
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"} & os.environ.keys()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if chosen or mallopt is None:
        return False
    return any(mallopt(MMAP_THRESHOLD, size) for size in KEPT_BLOCKS) and bool(mallopt(TRIM_THRESHOLD, KEPT_AT_THE_TOP))


def cache_folder() -> Path:
    """Give the folder for what can be made again, codistill in the user's cache folder; it need not be there.

    Raises:
        OSError: Nobody knows where that is.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codistill"
    except RuntimeError as error:
        raise OSError(str(error)) from None
