"""Read members of a .tar.gz in memory. Nothing is ever extracted to disk."""

import gzip
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Self

from codistill.core.errors import DataError
from codistill.data.untrusted import reading

HEADER_LIMIT = 1 << 20  # bytes of one member's headers; long names and PAX records need some hundred


class _CappedGzip(gzip.GzipFile):
    """A gzip stream with limits, so that a bomb or a false header costs no memory."""

    def __init__(self, path: Path, total_limit: int, fix: str) -> None:
        super().__init__(path, mode="rb")
        self.allowance = HEADER_LIMIT  # bytes that may still be read
        self.total_limit = total_limit
        self.fix = fix

    def read(self, size: int | None = -1) -> bytes:
        # tarfile reads as much as a header claims, also for long names, PAX records and maps of sparse files.
        if size is None or not 0 <= size <= self.allowance:
            raise DataError(f"{self.name}: a member has headers of more than {HEADER_LIMIT} bytes: {self.fix}")
        self.allowance -= size
        content = super().read(size)
        self._check(self.tell())
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0:
            self._check(offset)
        return super().seek(offset, whence)

    def _check(self, position: int) -> None:
        if position > self.total_limit:
            raise DataError(f"{self.name}: unpacks to more than the {self.total_limit} bytes possible: {self.fix}")


class _StrictTarInfo(tarfile.TarInfo):
    """A member whose damaged header is an error, where tarfile takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the true end
                raise
            raise tarfile.ReadError(str(error)) from error


def members(
    path: Path, wanted: Callable[[str], bool], fix: str, member_limit: int, total_limit: int
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the wanted regular files of a .tar.gz, in the order of the archive.

    The archive is read to its end, so that every member is checked and gzip's own checksum compared. `wanted` is asked
    by name, without a leading `./`; limits are bytes of one member and of the unpacked archive.

    Raises:
        DataError: The archive is missing, cut or damaged, is larger than the limits, or holds anything but folders and
            regular files with distinct, relative names that stay inside it.
    """
    seen: set[str] = set()
    with (
        reading(path, fix),
        _CappedGzip(path, total_limit, fix) as stream,
        tarfile.open(fileobj=stream, mode="r:", tarinfo=_StrictTarInfo) as archive,
    ):
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # all headers of CINIC-10 would be hundreds of MB
            archive.pax_headers = {}  # nothing of them is used, and they would add up
            stream.allowance = HEADER_LIMIT
            name = _safe_name(path, member, seen)
            if member.isdir() or not wanted(name):
                continue
            if member.size > member_limit:
                raise DataError(f"{path}: {name} has {member.size} bytes, more than the {member_limit} possible: {fix}")
            stream.allowance += member.size
            file = archive.extractfile(member)
            assert file is not None  # a regular file has content
            content = file.read()
            if len(content) != member.size:
                raise DataError(f"{path}: {name} is cut at {len(content)} of {member.size} bytes: {fix}")
            yield name, content
        stream.allowance = sys.maxsize  # the rest is not kept: only the total counts
        while stream.read(1 << 20):
            pass


def _safe_name(path: Path, member: tarfile.TarInfo, seen: set[str]) -> str:
    name = PurePosixPath(member.name)
    bad = name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name
    problems = {
        "points outside the archive": bad,
        "is a symbolic link": member.issym(),
        "is a hard link": member.islnk(),
        "is a device or pipe": member.isdev(),
        "is neither a file nor a folder": not (member.isdir() or member.isreg()) or member.issparse(),
        "has a negative size": member.size < 0,
        "occurs twice": str(name) in seen,
    }
    for problem, found in problems.items():
        if found:
            raise DataError(f"{path}: member {member.name!r} {problem}: do not use this archive")
    if not member.isdir():
        seen.add(str(name))
    return str(name)
