"""The lock of a run folder, and removal of temporary files that a killed process left in it."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from codistill.core.errors import UsageError


class RunLock:
    """Hold a run folder for one process; the kernel releases it when the process ends, even when it is killed.

    Args:
        folder: The run folder, which exists.

    Raises:
        UsageError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] = open(folder / ".lock", "a+")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise UsageError(
                f"run folder {folder} is in use by {owner}: wait for it, or choose another --out"
            ) from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on host {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Release the folder."""
        self._file.close()


def remove_strays(folder: Path) -> None:
    """Remove temporary files that a killed process left; call it only under the lock."""
    for stray in folder.glob("*.tmp-*"):
        stray.unlink(missing_ok=True)
