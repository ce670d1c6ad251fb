"""Read files that may be missing, cut, altered or hostile: whatever goes wrong is one line, not a traceback.

In this package `where` is the file as an error line names it, and `fix` what the user can do about it.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path

from codistill.core.errors import CodistillError, DataError, ResourceError, reason

# Files that operating systems and archivers put beside pictures, in lower case; others (".DS_Store") are hidden.
FOREIGN = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r", "__macosx", "@eadir"}
FOREIGN |= {"$recycle.bin", "system volume information", "lost+found"}


@contextmanager
def reading(where: str | Path, fix: str) -> Iterator[None]:
    """Turn whatever a parser raises on bad bytes into one error that names the file.

    The parsers in use (zipfile, tarfile, gzip, pickle, Pillow, NumPy) raise a dozen different types on damaged input,
    so everything is caught here; keep the block as small as the call of the parser.
    """
    try:
        yield
    except CodistillError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{where}: no such file: {fix}") from error
    except MemoryError as error:
        raise ResourceError(f"{where}: not enough memory to read it: use a machine with more") from error
    except Exception as error:
        raise DataError(f"{where}: cannot be read ({reason(error)}): {fix}") from error


def visible(folder: Path, fix: str) -> list[Path]:
    """Return what a folder holds, sorted by name, without hidden files and those of operating systems."""
    with reading(folder, fix):
        names = [name for name in sorted(os.listdir(folder)) if name.lower() not in FOREIGN]
    return [folder / name for name in names if not name.startswith(".") and not name.endswith(":Zone.Identifier")]


def read_file(path: Path, limit: int, fix: str) -> bytes:
    """Read a whole file of at most `limit` bytes; a larger one is a DataError."""
    with reading(path, fix), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # memory for that many bytes is taken; 0 also of what is no plain file
        content = file.read(size + 1 if 0 < size < limit else limit + 1)
    if len(content) > limit:
        raise DataError(f"{path}: has {path.stat().st_size} bytes, more than the {limit} possible: {fix}")
    return content


def check_digest(where: Path, file: BytesIO | BufferedReader, digest: str, fix: str) -> None:
    """Compare a file, read piece by piece, with a published digest, `md5:` or `sha256:` and hexadecimal digits."""
    algorithm, expected = digest.split(":")
    actual = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if actual != expected:
        raise DataError(f"{where}: its {algorithm} is {actual} instead of {expected}: {fix}")


def check_file(path: Path, size: int, digest: str, fix: str) -> None:
    """Compare a file with a published size in bytes, then with a digest."""
    with reading(path, fix), path.open("rb") as file:
        actual_size = path.stat().st_size
        if actual_size != size:
            raise DataError(f"{path}: has {actual_size} bytes instead of {size}: {fix}")
        check_digest(path, file, digest, fix)
