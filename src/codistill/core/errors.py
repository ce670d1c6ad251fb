"""Errors, one class for each exit status of the command line.

An error is one line: what is wrong, where, and how to fix it.
"""

import sysconfig
import traceback
from pathlib import Path

LIBRARIES = (Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))


def place(error: BaseException) -> str:
    """Return the line of a user's own code in which an error was raised, ` at my_method.py:12`; empty: not in any."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.name.startswith(("<frozen", "<@")) and not any(each in path.parents for each in LIBRARIES):
            return f" at {path.name}:{frame.lineno}"
    return ""


def reason(error: BaseException) -> str:
    """Return an exception's message in one line, without the path that an OSError carries; without one, its type."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def typed_reason(error: BaseException, most: int = 300) -> str:
    """Return an exception's type and message in one line of at most `most` letters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def in_words(error: BaseException) -> str:
    """Return the text of an error of somebody else's code, at most 300 letters, with its type if that is needed."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, RuntimeError) and text else f"{type(error).__name__}: {text}"


def printable(text: str) -> str:
    """Return a text, such as a name from a hostile file, with what no terminal should get escaped."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class CodistillError(Exception):
    """Base of every error that codistill raises on purpose; `exit_status` is what the command line returns.

    Its text is one line of printable characters, also where it quotes names from hostile files.
    """

    exit_status = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(" ".join(message.split())))


class UsageError(CodistillError):
    """A setting, a name or a combination of them cannot work (exit status 2)."""

    exit_status = 2


class DataError(CodistillError):
    """A data set or an image is missing, damaged or not what it claims to be (exit status 3)."""

    exit_status = 3


class CheckpointError(CodistillError):
    """A checkpoint, a run folder or a model file cannot be used (exit status 4)."""

    exit_status = 4


class DivergedError(CodistillError):
    """A loss or a parameter became NaN or infinite (exit status 5)."""

    exit_status = 5


class ResourceError(CodistillError):
    """Memory or disk ran out (exit status 6)."""

    exit_status = 6


class WorkerError(CodistillError):
    """A worker process or a rank failed (exit status 7)."""

    exit_status = 7
