"""Files that are whole or absent, and checkpoints whose every byte is checked before it is parsed."""

import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from codistill.errors import CheckpointError

FORMAT = 1
ENTRY = {"file": str, "sha256": str, "epoch": int, "best": bool}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part.

    Temporary file, flush, fsync, replace, fsync of the folder.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is {path.parent} a run folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {' '.join(str(error).split())}") from None


class CheckpointStore:
    """The checkpoints of one run: at least the last two and the best, each named in an index with its SHA-256.

    Args:
        folder: Where they lie; made when the first one is saved.
        keep: How many of the last ones are kept, at least 2.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    @property
    def _index(self) -> Path:
        return self.folder / "index.json"

    def entries(self) -> list[dict[str, Any]]:
        """List what the index holds, oldest first: file, sha256, epoch (of completed epochs) and best."""
        if not self._index.exists():
            return []
        index = read_json(self._index)
        if not isinstance(index, dict) or index.get("format") != FORMAT or not isinstance(index.get("files"), list):
            raise CheckpointError(f"{self._index}: not an index of format {FORMAT}: made by another version")
        for entry in index["files"]:
            known = isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in ENTRY.items())
            if not known or Path(entry["file"]).name != entry["file"]:
                raise CheckpointError(f"{self._index}: damaged: no entry of an index: {str(entry)[:100]}")
        return list(index["files"])

    def save(self, state: dict[str, Any], epoch: int, best: bool) -> None:
        """Write a checkpoint, then the index, then delete what is no longer kept.

        Args:
            state: Tensors and plain JSON types only.
            epoch: Number of completed epochs.
            best: Whether it is the best one so far.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        content = buffer.getvalue()
        name = f"epoch-{epoch:06d}.pt"
        write_atomically(self.folder / name, content)
        old = [entry for entry in self.entries() if entry["file"] != name]
        if best:
            old = [{**entry, "best": False} for entry in old]
        entries = [*old, {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "epoch": epoch, "best": best}]
        kept = [entry for entry in entries if entry["best"] or entry in entries[-self.keep :]]
        write_json(self._index, {"format": FORMAT, "files": kept})
        for entry in entries:
            if entry not in kept:
                (self.folder / entry["file"]).unlink(missing_ok=True)

    def load(self, which: str = "last") -> dict[str, Any]:
        """Read the last or the best checkpoint; a damaged last one is passed over for the one before, with a warning.

        Raises:
            CheckpointError: There is none, or none that is whole.
        """
        entries = self.entries()
        wanted = [entry for entry in entries if entry["best"]] if which == "best" else entries[::-1]
        reasons = []
        for entry in wanted:
            try:
                return self._read(entry)
            except CheckpointError as error:
                reasons.append(str(error))
                if entry is not wanted[-1]:
                    print(f"codistill: warning: {error}; using the one before", file=sys.stderr)
        if not reasons:
            raise CheckpointError(f"{self.folder}: no {which} checkpoint; the run did not complete an epoch")
        raise CheckpointError("; ".join(reasons))

    def _read(self, entry: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / str(entry["file"])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry["sha256"]:
            raise CheckpointError(f"{path}: damaged: SHA-256 is {digest[:12]}.. instead of {entry['sha256'][:12]}..")
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load answers damage with five different types
            raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT}: made by another version")
        return state
