"""Locks of run folders, who holds them, and removal of temporary files that a killed process left."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from codistill.core.errors import UsageError


def lock_folder(folder: Path, otherwise: str = "") -> IO[str]:
    """Lock a folder until the returned file is closed or the process dies, or raise `UsageError` with who holds it.

    `otherwise` ends its line: what else than waiting would do.
    """
    file = open(folder / ".lock", "a+")  # noqa: SIM115
    try:
        if not taken(file, fcntl.LOCK_EX):
            raise UsageError(f"run folder {folder} is in use by {owner(file)}: wait for it{otherwise}")
    except BaseException:  # or a file system without locks
        file.close()
        raise
    write_line(file, this_process())
    return file


def this_process() -> str:
    """Return what names this process to a person."""
    return f"pid {os.getpid()} on host {socket.gethostname()}"


def taken(file: IO[str], how: int) -> bool:
    """Return whether a lock could be had at once."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def owner(lock: IO[str]) -> str:
    """Return who has written its name into a locked file."""
    lock.seek(0)
    return lock.read().strip() or "another process"


def write_line(file: IO[str], line: str) -> None:
    """Replace the contents of an open file."""
    with contextlib.suppress(OSError):  # the disk may be full; the lock holds
        file.seek(0)
        file.truncate(0)
        file.write(line)
        file.flush()


def remove_strays(folder: Path) -> None:
    """Remove temporary files that a killed process left; call it only under the lock."""
    for stray in folder.glob("*.tmp-*"):
        stray.unlink(missing_ok=True)
