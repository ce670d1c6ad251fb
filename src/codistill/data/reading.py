"""Read files that may be missing, cut, altered or hostile: whatever goes wrong is one line, not a traceback."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codistill.core.errors import CodistillError, DataError, ResourceError


@contextmanager
def reading(where: str | Path, mend: str) -> Iterator[None]:
    """Turn whatever a parser raises on bad bytes into one error that names the file.

    The parsers in use (zipfile, tarfile, gzip, pickle, Pillow, NumPy) raise a dozen different types on damaged input,
    so everything is caught here; keep the block as small as the call of the parser.

    Args:
        where: The file, for the error line.
        mend: What the user can do, for the error line.

    Raises:
        DataError: Anything went wrong inside the block.
        ResourceError: Memory ran out inside the block.
    """
    try:
        yield
    except CodistillError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{where}: no such file: {mend}") from error
    except MemoryError as error:
        raise ResourceError(f"{where}: not enough memory to read it: use a machine with more") from error
    except Exception as error:
        raise DataError(f"{where}: cannot be read ({reason(error)}): {mend}") from error


def reason(error: BaseException) -> str:
    """Say in one line what an exception means, without repeating the path that an OSError carries."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def read_file(path: Path, limit: int, mend: str) -> bytes:
    """Read a whole file that should be small.

    Args:
        path: The file.
        limit: Most bytes that such a file can have.
        mend: What the user can do, for the error line.

    Returns:
        Its bytes.

    Raises:
        DataError: It is missing, unreadable or larger than the limit.
    """
    with reading(path, mend), path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{path}: has {path.stat().st_size} bytes, more than the {limit} that can be right: {mend}")
    return content


def check_digest(where: str | Path, content: bytes, digest: str, mend: str) -> None:
    """Compare bytes with a published digest.

    Args:
        where: The file, for the error line.
        content: Its bytes.
        digest: `md5:` or `sha256:` and the hexadecimal digest.
        mend: What the user can do, for the error line.

    Raises:
        DataError: With both digests.
    """
    algorithm, expected = digest.split(":")
    _compare(where, algorithm, expected, hashlib.new(algorithm, content, usedforsecurity=False).hexdigest(), mend)


def check_file(path: Path, size: int, digest: str, mend: str) -> None:
    """Compare a file with a published size, then with a published digest.

    Args:
        path: The file; read piece by piece.
        size: In bytes.
        digest: `md5:` or `sha256:` and the hexadecimal digest.
        mend: What the user can do, for the error line.

    Raises:
        DataError: With both sizes, or both digests.
    """
    with reading(path, mend), path.open("rb") as file:
        actual_size = path.stat().st_size
        if actual_size != size:
            raise DataError(f"{path}: has {actual_size} bytes instead of {size}: {mend}")
        algorithm, expected = digest.split(":")
        actual = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    _compare(path, algorithm, expected, actual, mend)


def _compare(where: str | Path, algorithm: str, expected: str, actual: str, mend: str) -> None:
    if actual != expected:
        raise DataError(f"{where}: its {algorithm} is {actual} instead of {expected}: {mend}")
