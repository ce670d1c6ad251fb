"""Find CINIC-10's image files in a folder or in its archive."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from codistill.core.errors import DataError
from codistill.data.archive import members
from codistill.data.reading import reading

PARTS = ("train", "valid", "test")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE = "CINIC-10.tar.gz"
ADDRESS = "https://datashare.ed.ac.uk/handle/10283/3192"
FILE_LIMIT = 1 << 20  # bytes; a 32x32 PNG has about 2 kB
ARCHIVE_LIMIT = 4 << 30  # bytes, unpacked
MAX_DEPTH = 4  # folders below the root in which train, valid and test are looked for
MEND = f"fetch {ARCHIVE} again from {ADDRESS}, or give the option check=false for files of your own"


class Entry(NamedTuple):
    """One image file.

    Attributes:
        part: train, valid or test.
        class_name: One of `CLASSES`.
        file: File name.
        content: Its bytes, or where they are.
    """

    part: str
    class_name: str
    file: str
    content: bytes | Path


def find(root: Path) -> Path:
    """Find the folder that holds train, valid and test, or the archive.

    Raises:
        DataError: Neither is there.
    """
    with reading(root, "make it readable"):
        if root.is_file():
            return root
        if (root / ARCHIVE).is_file() and not _holds_parts(root):
            return root / ARCHIVE
        level = [root] if root.is_dir() else []
        for _ in range(MAX_DEPTH + 1):
            for folder in level:
                if _holds_parts(folder):
                    return folder
            level = [child for folder in level for child in _folders(folder)]
    raise DataError(f"{root}: holds no cinic10: expected {ARCHIVE} or train, valid and test; get it from {ADDRESS}")


def _holds_parts(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in PARTS)


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def identity(place: Path) -> str:
    """Say which files these are, so that a change is noticed: names, sizes and times of change.

    Args:
        place: As `find` gives it.
    """
    if place.is_file():
        return _stamp(place.name, place)
    lines = (_stamp(f"{entry.part}/{entry.class_name}/{entry.file}", entry.content) for entry in folder_files(place))
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()


def _stamp(name: str, path: bytes | Path) -> str:
    assert isinstance(path, Path)
    with reading(path, MEND):
        about = path.stat()
    return f"{name} {about.st_size} {about.st_mtime_ns}\n"


def folder_files(folder: Path) -> Iterator[Entry]:
    """List the images of a folder that holds train, valid and test, sorted; contents are paths.

    Raises:
        DataError: Something else than class folders with PNG files.
    """
    for part in PARTS:
        for class_folder in _visible(folder / part):
            for path in _visible(class_folder):
                yield _checked(Entry(part, class_folder.name, path.name, path), path)


def _visible(folder: Path) -> list[Path]:
    with reading(folder, MEND):
        return [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]


def archive_files(archive: Path) -> Iterator[Entry]:
    """Read the images of the archive, in its order; contents are bytes.

    Raises:
        DataError: The archive is damaged, or holds something else than PNG files in class folders.
    """

    def is_image(name: str) -> bool:
        parts = name.split("/")
        return len(parts) >= 3 and parts[-3] in PARTS and not parts[-1].startswith(".")

    prefixes = set()
    for name, content in members(archive, is_image, MEND, FILE_LIMIT, ARCHIVE_LIMIT):
        *prefix, part, class_name, file = name.split("/")
        prefixes.add("/".join(prefix))
        if len(prefixes) > 1:
            raise DataError(
                f"{archive}: holds train, valid and test twice, in {' and '.join(sorted(prefixes))}: {MEND}"
            )
        yield _checked(Entry(part, class_name, file, content), f"{archive}/{name}")


def _checked(entry: Entry, where: str | Path) -> Entry:
    if entry.class_name not in CLASSES:
        raise DataError(f"{where}: {entry.class_name} is not a class of cinic10 ({' '.join(CLASSES)}): {MEND}")
    if not entry.file.lower().endswith(".png"):
        raise DataError(f"{where}: is not a PNG file: {MEND}")
    return entry
