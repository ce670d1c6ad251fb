"""Where the weights of networks come from: drawn and not changed since, trained in a run, or their user's own."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DRAWN = "drawn"
"""Origin of weights that `network` or a method has drawn; those drawn from a run's seed have `drawn_from` it."""
_MARK = "codistill_origin"


def drawn_from(seed: int) -> str:
    """Return the origin of weights that were drawn from the seed of a run."""
    return f"{DRAWN} from seed {seed}"


def contents(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def mark(weights: nn.Module | Tensor, origin: str | Path, but: nn.Module | None = None) -> None:
    """Note where present weights come from, a run folder as its path; those of `but` are left out."""
    tensors = [weights] if isinstance(weights, Tensor) else weights.state_dict(keep_vars=True).values()
    left = {id(tensor) for tensor in but.state_dict(keep_vars=True).values()} if but is not None else set()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_meta and id(tensor) not in left:
            setattr(tensor, _MARK, (origin, hashlib.sha256(contents(tensor)).digest()))


def origin_of(tensor: Tensor) -> str | Path | None:
    """Return the origin that a tensor was marked with if it has not changed since; None: it is its user's own."""
    origin, digest = getattr(tensor, _MARK, (None, b""))
    return origin if origin is not None and hashlib.sha256(contents(tensor)).digest() == digest else None


class Marked(nn.Module):
    """A module whose weights keep their origins in copies of it; a copy of a parameter loses its own."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made from."""
        tensors = self.state_dict(keep_vars=True).items()
        return {**vars(self), _MARK: {name: vars(each)[_MARK] for name, each in tensors if hasattr(each, _MARK)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make this the copy."""
        marks = state.pop(_MARK, {})
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, each in self.state_dict(keep_vars=True).items():
            if name in marks:
                setattr(each, _MARK, marks[name])
