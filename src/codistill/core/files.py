"""Files that are whole or absent: written beside their place, then renamed."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codistill.core.errors import CheckpointError, CodistillError, ResourceError, UsageError, reason

# What the user's choice of a place can change; all other answers of a system are about its resources.
PLACES = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EINVAL, errno.EXDEV, errno.ETXTBSY, errno.ENXIO),
}
FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ESTALE: "the network drive was lost: mount it again",
}


def system_error(
    error: OSError,
    path: str | Path | None = None,
    places: type[CodistillError] = UsageError,
    fix: str = "choose another place, or repair this one",
) -> CodistillError:
    """Return the one line of what the system answered, as an error that `places` makes, or a `ResourceError`.

    Args:
        error: Of any reading or writing.
        path: Where, if the error does not say it.
        places: The error where another place would help.
        fix: What to do about those.
    """
    where = error.filename if path is None else path
    where = "" if where is None else f"{os.fsdecode(where) if isinstance(where, (str, bytes, Path)) else where}: "
    if error.errno in PLACES:
        return places(f"{where}{reason(error)}: {fix}")
    fix = FIXES.get(error.errno or 0, "repair or replace the disk" if error.errno == errno.EIO else "free resources")
    return ResourceError(f"{where}{reason(error)}: {fix}; what was written before is kept")


@contextlib.contextmanager
def replaced(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename what was written there to `path` at the end.

    A crash leaves the old file or the new one, never a part: the file is flushed to disk before it is renamed, and its
    folder after that. The temporary file is removed if the body raises; one of a killed process has `.tmp-` in it, and
    ends in `suffix`, for writers that go by it. An `OSError` of the body names the file, not the temporary one.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}{suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        with _unless_unsupported():
            _flush(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # a second error would hide the first
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Pass over it where a network drive does not flush folders."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS):
            raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: It is absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        folder, there = path.parent, path.parent.exists()
        nothing = "there is no such folder" if not there else f"{folder} is a file, no run folder"
        if folder.is_dir():
            inner = sorted(each.parent.name for each in folder.glob(f"*/{path.name}"))
            nothing = f"is {folder} a run folder?" if any(folder.iterdir()) else f"{folder} is empty, no run folder"
            nothing = f"{folder} holds runs: name one of them, such as {folder / inner[0]}" if inner else nothing
        raise CheckpointError(f"{path}: no such file; {nothing}") from None
    except OSError as error:
        raise system_error(error, path, CheckpointError) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {' '.join(str(error).split())}") from None
