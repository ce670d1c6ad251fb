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

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from codistill.core.errors import DataError, ResourceError, UsageError
from codistill.data.untrusted import check_file, reason

if sys.platform != "win32":
    import fcntl

PIECE = 1 << 18  # bytes
TIMEOUT = 60.0  # seconds without a byte


def fetch(url: str, path: Path, size: int, digest: str, tries: int = 20, console: Console | None = None) -> None:
    """Fetch a file of known size and digest, going on where an earlier attempt stopped.

    The bytes gather in `<path>.part`; a cut connection leaves them there for the next attempt. Several processes that
    fetch the same file take turns, and all but the first find it ready.

    Args:
        url: http or https address.
        path: Final name; a file that is already there is left alone.
        size: In bytes.
        digest: `md5:` or `sha256:` and the hexadecimal digest.
        tries: How often to connect, at most; a connection that brought nothing is the last one.
        console: Where progress is shown, if it is a terminal; None: standard error.

    Raises:
        DataError: The server cannot be reached, breaks off every time, or has another file.
        ResourceError: The file cannot be written.
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
                _fill(url, file, size, tries, console or Console(stderr=True))
                _finish(url, file, part, path, size, digest)
            elif part.exists():
                part.unlink()
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({reason(error)}): free the disk or choose another") from error


def _fill(url: str, file: IO[bytes], size: int, tries: int, console: Console) -> None:
    """Append to the file until it has its size."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        name = Path(str(file.name)).stem
        task = progress.add_task(name, total=size, completed=_length(file))
        trouble = "the connection broke"
        for _ in range(tries):
            start = _length(file)
            if start >= size:
                return
            try:
                _append(url, file, size, lambda: progress.update(task, completed=_length(file)))
            except _NetworkError as error:
                trouble = str(error)
            if _length(file) == start:
                break
        if _length(file) < size:
            raise DataError(
                f"{url}: stopped at {_length(file)} of {size} bytes ({trouble}): run it again to go on, or put "
                f"{name} there yourself"
            )


class _NetworkError(Exception):
    """The server or the way to it failed, as opposed to the disk."""


def _append(url: str, file: IO[bytes], size: int, show: Callable[[], None]) -> None:
    """Ask for the bytes that are missing and append what comes."""
    start = _length(file)
    request = urllib.request.Request(url, headers={"User-Agent": "codistill", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with _open(request) as response:
        if start and response.headers.get("Content-Range", "").split("-")[0] != f"bytes {start}":
            file.truncate(0)  # the server does not resume: it sends the file from its first byte
        while piece := _receive(response):
            file.write(piece)
            file.flush()
            show()
            if _length(file) > size:
                return


def _open(request: urllib.request.Request) -> HTTPResponse:
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise _NetworkError(reason(error)) from error
    return response


def _receive(response: HTTPResponse) -> bytes:
    try:
        return response.read(PIECE)
    except (OSError, HTTPException) as error:
        raise _NetworkError(reason(error)) from error


def _finish(url: str, file: IO[bytes], part: Path, path: Path, size: int, digest: str) -> None:
    """Check the bytes and give them their final name; bytes that are wrong are dropped."""
    os.fsync(file.fileno())
    try:
        check_file(part, size, digest, f"{url} has another file; try again or another address")
    except DataError:
        file.truncate(0)
        raise
    os.replace(part, path)


def _length(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size
