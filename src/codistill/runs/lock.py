"""The lock of a run folder, and removal of temporary files that a killed process left in it."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from codistill.core.errors import UsageError


def lock_folder(folder: Path) -> IO[str]:
    """Lock a folder until the returned file is closed or the process dies, or raise `UsageError` with who holds it."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UsageError(f"run folder {folder} is in use by {owner}: wait for it, or choose another --out") from None
    except OSError:  # a file system without locks
        file.close()
        raise
    with contextlib.suppress(OSError):  # the disk may be full; the lock holds
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}")
        file.flush()
    return file


def remove_strays(folder: Path) -> None:
    """Remove temporary files that a killed process left; call it only under the lock."""
    for stray in folder.glob("*.tmp-*"):
        stray.unlink(missing_ok=True)
