"""The host: cores, CPU threads, free memory and that which the C library keeps, the cache folder."""

import contextlib
import ctypes
import functools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from codistill.core.console import warn_once

# Of mallopt(3): smallest blocks that are given back when freed, bytes (wanted, and the most that older libraries
# allow), and free memory at the end of the heap that is kept, bytes.
MMAP_THRESHOLD, KEPT_BLOCKS = -3, (256 * 2**20, 32 * 2**20)
TRIM_THRESHOLD, KEPT_AT_THE_TOP = -1, 2**30


NUMBERS = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
BINDING = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}
_in_place_of: tuple[int, int] | None = None  # torch's own number of threads, and the one that `set_threads` set


def set_up_cpu(threads: int | None, device: torch.device) -> None:
    """Choose the number of threads, and on a CPU keep the memory that a training step frees for the next one.

    A step frees and takes back hundreds of megabytes. By default the C library gives much of it to the kernel, which
    hands it out again page by page, cleared; results/speed-cpu has the cost. Without `threads`, OMP_NUM_THREADS
    decides, or else there is one for each core that a container may use. More threads than cores are warned of.
    """
    count = threads or default_threads()
    set_threads(count)
    if device.type == "cpu":
        keep_freed_memory()
        if count > (have := cores()) and not BINDING & os.environ.keys():
            fewer = f"--threads {have}, or of a run that resumes --override threads={have}"
            warn_once(f"{count} threads, but {have} cores to use: each step waits for the slowest thread: {fewer}")


def set_threads(count: int) -> None:
    """Set the number of threads; torch's own is remembered for `default_threads`."""
    global _in_place_of
    if count != torch.get_num_threads():
        _in_place_of = (_own_threads(), count)
        torch.set_num_threads(count)


def _own_threads() -> int:
    now = torch.get_num_threads()
    return _in_place_of[0] if _in_place_of and _in_place_of[1] == now else now


def default_threads() -> int:
    """Return torch's number of threads, or fewer where a container may not use so many cores."""
    chosen = _own_threads()
    quota = None if NUMBERS & os.environ.keys() else processor_quota()
    return chosen if quota is None else max(1, min(chosen, math.ceil(quota)))


def cores() -> int:
    """Return how many cores this process may use."""
    bound = BINDING & os.environ.keys() or not hasattr(os, "sched_getaffinity")
    count = os.cpu_count() or 1 if bound else len(os.sched_getaffinity(0))
    quota = processor_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def free_memory(root: Path = Path("/")) -> float:
    """Return the memory that processes may still take, bytes: of the machine, or of the control groups if less."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text("utf-8").splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    for folder in _control_groups(root, "memory"):
        new = (folder / "memory.max").exists()
        names = ("max", "current") if new else ("limit_in_bytes", "usage_in_bytes")
        with contextlib.suppress(OSError, ValueError):
            most, used = (int((folder / f"memory.{name}").read_text("utf-8")) for name in names)
            # Contents of files, which the kernel drops when others need the memory.
            kept = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text("utf-8"), re.M)
            found.append(most - used + (int(kept[1]) if kept else 0))
    return max(0, min(found, default=math.inf))


def processor_quota(root: Path = Path("/")) -> float | None:
    """Return the number of cores that the control group of this process, a container's, allows; None: no limit."""
    limits = []
    for folder in _control_groups(root, "cpu"):
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


def _control_groups(root: Path, kind: str) -> Iterator[Path]:
    """Yield the folders of this process's control group of cpu or memory and of all above it, version 2 and 1."""
    try:
        entries = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if not controllers or kind in controllers.split(","):
            mounted, group = root / "sys/fs/cgroup" / (kind if controllers else ""), Path(path.lstrip("/"))
            yield from (mounted / each for each in (group, *group.parents))


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the rest of the process, unless the user has; return whether it does."""
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"} & os.environ.keys()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if chosen or mallopt is None:
        return False
    return any(mallopt(MMAP_THRESHOLD, size) for size in KEPT_BLOCKS) and bool(mallopt(TRIM_THRESHOLD, KEPT_AT_THE_TOP))


def release_freed_memory() -> None:
    """Return to the kernel what `keep_freed_memory` has kept for a next step, where there is none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def cache_folder() -> Path:
    """Return codistill's folder in the user's cache folder; it need not exist.

    Raises:
        OSError: The user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codistill"
    except RuntimeError as error:
        raise OSError(str(error)) from None
