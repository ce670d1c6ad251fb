"""The checkpoints of a run: written whole or not at all, and every byte checked before it is parsed."""

import contextlib
import errno
import hashlib
import io
import json
import operator
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from codistill.core.console import warn
from codistill.core.errors import CheckpointError, UsageError
from codistill.core.files import system_error, write_atomically, write_json
from codistill.runs.state import FORMAT, TrainingState, other_format

ENTRY = {"file": str, "sha256": str, "epoch": int, "step": int, "best": bool}

# A file of an index and its SHA-256: names that stay in the folder, and lines without breaks.
NAMES = r"[0-9A-Za-z-]+\.pt [0-9a-f]{64}"


class UnreadableError(CheckpointError):
    """A checkpoint that is there, and that the system does not hand out."""


class CheckpointStore:
    """The checkpoints of one run: at least the last two and the best, each named in an index with its SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = folder / "index.json"
        self._damaged: set[str] = set()
        self._told = False

    def entries(self) -> list[dict[str, Any]]:
        """List what the index holds, oldest first: file, sha256, epoch, step and best.

        An index that is missing or damaged is rebuilt from the files, with a warning.

        Raises:
            CheckpointError: The index cannot be read, or is of another format.
        """
        try:
            content = self._index.read_bytes()
        except FileNotFoundError:
            return self._scanned("is missing") if any(self.folder.glob("*.pt")) else []
        except OSError as error:
            raise system_error(error, self._index, CheckpointError) from None
        try:
            index = json.loads(content)
            number, entries = index["format"], [dict(entry) for entry in index["files"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            return self._scanned("is damaged")
        if isinstance(number, int) and number != FORMAT:
            raise CheckpointError(f"{self._index}: {other_format(number)}")
        return entries if number == FORMAT and all(map(is_entry, entries)) else self._scanned("is damaged")

    def written(self) -> bytes | None:
        """Return the index as it is on the disk; None: it is not there, or cannot be read."""
        with contextlib.suppress(OSError):
            return self._index.read_bytes()
        return None

    def _scanned(self, trouble: str) -> list[dict[str, Any]]:
        """Return entries made from the files; zip's own checksums stand in for the SHA-256 that is lost."""
        found = []
        for path in sorted(self.folder.glob("*.pt")):
            with contextlib.suppress(Exception):  # what is damaged is not listed
                content = path.read_bytes()
                if zipfile.ZipFile(io.BytesIO(content)).testzip() is None:
                    found.append(index_entry(path.name, content, parsed(content, path)))
        found.sort(key=operator.itemgetter("epoch", "step"))
        for entry in [entry for entry in found if entry["best"]][:-1]:
            entry["best"] = False
        if not self._told:
            warn(f"{self._index} {trouble}: {len(found)} whole checkpoints were found by looking at the files")
        self._told = True
        return found

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, then the index, then delete what is no longer kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state.as_mapping(), buffer)
        content = buffer.getvalue()
        name = f"epoch-{state.epoch:06d}.pt" if state.step == 0 else f"epoch-{state.epoch:06d}-step-{state.step:06d}.pt"
        # Before anything is written: a missing index is made from the files that are there now.
        old = [entry for entry in self.entries() if entry["file"] != name and entry["file"] not in self._damaged]
        write_atomically(self.folder / name, content)
        if state.best:
            old = [{**entry, "best": False} for entry in old]
        entries = [*old, index_entry(name, content, state)]
        kept = [entry for entry in entries if entry["best"] or entry in entries[-2:]]
        write_json(self._index, {"format": FORMAT, "files": kept})
        for path in {*self.folder.glob("*.pt")} - {self.folder / entry["file"] for entry in kept}:
            path.unlink(missing_ok=True)

    def load(self, which: str = "last") -> TrainingState:
        """Read the last or the best checkpoint; a damaged last one is passed over for the one before, with a warning.

        Raises:
            UsageError: `which` is neither.
            CheckpointError: There is none, or none that is whole; names each file and what is wrong with it.
        """
        if which not in ("last", "best"):
            raise UsageError(f"checkpoint {which!r}: take last or best")
        reasons: list[str] = []
        for entry in reversed(self.entries()):
            if which == "best" and not entry["best"]:
                continue
            try:
                state = self._read(entry)
            except UnreadableError:
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                self._damaged.add(entry["file"])
                continue
            for reason in reasons:
                warn(f"{reason}; using {entry['file']}, the one before")
            return state
        what = "evaluate an epoch so far" if which == "best" and self.entries() else "complete an epoch"
        none = f"{self.folder}: no {which} checkpoint; the run did not {what}"
        raise CheckpointError("; ".join(reasons) or none)

    def _read(self, entry: dict[str, Any]) -> TrainingState:
        path = self.folder / str(entry["file"])
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        except OSError as error:
            if error.errno == errno.EIO:  # the disk has lost it
                raise CheckpointError(f"{path}: damaged: {error.strerror}") from None
            # It may be whole: an older one is not taken in its place.
            raise UnreadableError(str(system_error(error, path, CheckpointError))) from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry["sha256"]:
            raise CheckpointError(f"{path}: damaged: SHA-256 is {digest[:12]}.. instead of {entry['sha256'][:12]}..")
        return parsed(content, path)


def parsed(content: bytes, path: Path) -> TrainingState:
    """Read a state from the bytes of a checkpoint; tensors and plain types only, whatever the file asks for."""
    try:
        mapping = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load answers damage with five different types
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    return TrainingState.from_mapping(mapping, str(path))


def index_entry(name: str, content: bytes, state: TrainingState) -> dict[str, Any]:
    """Return what the index says of a checkpoint file."""
    digest = hashlib.sha256(content).hexdigest()
    return {"file": name, "sha256": digest, "epoch": state.epoch, "step": state.step, "best": state.best}


def is_entry(entry: dict[str, Any]) -> bool:
    """Whether an entry of an index from the disk is one that `index_entry` could have made."""
    typed = all(isinstance(entry.get(key), kind) for key, kind in ENTRY.items())
    return typed and re.fullmatch(NAMES, f"{entry['file']} {entry['sha256']}") is not None
