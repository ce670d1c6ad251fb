"""Fetch a published file: resumable, with progress, and under its final name only when its checksum is right."""

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from codistill.core.errors import DataError, UsageError, reason
from codistill.core.files import system_error
from codistill.data.untrusted import check_file

if sys.platform != "win32":
    import fcntl

PIECE = 1 << 18  # bytes
TIMEOUT = 60.0  # seconds without a byte
NETWORK_ERRORS = (OSError, HTTPException, ValueError)


def fetch(url: str, path: Path, size: int, digest: str, tries: int = 20) -> None:
    """Fetch a file of known size, bytes, and digest; an attempt continues where an earlier one stopped.

    The bytes gather in `<path>.part`; a cut connection leaves them there for the next attempt. Several processes that
    fetch the same file take turns, and all but the first find it ready. A file that is already there is left alone.

    Raises:
        DataError: The server cannot be reached, breaks off `tries` times or with no progress, or has another file.
        ResourceError: The file cannot be written; UsageError, where its place is the reason.
        UsageError: Not an http or https address.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(f"cannot download {url!r}: give an http or https address")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
            if not path.exists():
                _fill(url, file, size, tries)
                os.fsync(file.fileno())
                try:
                    check_file(part, size, digest, f"{url} has another file; try again or another address")
                except DataError:
                    file.truncate(0)  # the next attempt begins with none of the wrong bytes
                    raise
                os.replace(part, path)
            elif part.exists():
                part.unlink()
    except OSError as error:
        raise system_error(error, f"{path}: cannot be written") from error


def _fill(url: str, file: IO[bytes], size: int, tries: int) -> None:
    """Append to the file until it has its size."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        name = Path(str(file.name)).stem
        task = progress.add_task(name, total=size, completed=_length(file))
        trouble = "the connection broke"
        for _ in range(tries):
            start = _length(file)
            if start < size:
                trouble = _append(url, file, size, lambda: progress.update(task, completed=_length(file))) or trouble
            if _length(file) == start:
                break  # a connection that brought nothing is the last one
        if _length(file) < size:
            stopped = f"stopped at {_length(file)} of {size} bytes ({trouble})"
            raise DataError(f"{url}: {stopped}: run it again to continue, or put {name} there yourself")


def _append(url: str, file: IO[bytes], size: int, show: Callable[[], None]) -> str:
    """Request the missing bytes and append the response; return how the server or the connection failed, if it did."""
    start = _length(file)
    request = urllib.request.Request(url, headers={"User-Agent": "codistill", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        opened: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except NETWORK_ERRORS as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return reason(error)
    with opened as response:
        if start and response.headers.get("Content-Range", "").split("-")[0] != f"bytes {start}":
            file.truncate(0)  # the server does not resume: it sends the file from its first byte
        while _length(file) <= size:
            try:
                piece = response.read(PIECE)
            except NETWORK_ERRORS as error:
                return reason(error)
            if not piece:
                break
            file.write(piece)
            file.flush()
            show()
    return ""


def _length(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size
