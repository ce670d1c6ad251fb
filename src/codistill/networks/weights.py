"""Weights from files that others have written: of torch.save or .safetensors, under their names or in their order."""

import argparse
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codistill.core.errors import CheckpointError

Weights = dict[str, Tensor]
_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "teacher", "student")
"""Where weights of several networks are in a file, the first of these that fits is taken."""


def take(
    module: nn.Module,
    names: Mapping[str, str],
    path: Path,
    what: str,
    title: str,
    fix: str,
    classifier: Collection[str] = (),
) -> list[str]:
    """Load the weights of a file into a network, whole or not at all.

    The file, by torch.save or .safetensors, holds weights by name or a dictionary of them, under any key. Equal names
    are matched by name, a prefix of all such as `module.` left out. Other names differ from repository to repository,
    the order of the layers does not: such tensors are taken in order. Every shape must agree, but for position
    embeddings of a square grid of patches, which are interpolated, and for the classifier.

    Args:
        module: The network.
        names: The names of its state_dict, each with the one that it may have in files.
        path: The file.
        what: What errors call the file.
        title: What errors call the network.
        fix: What to do where it is another one.
        classifier: Names of tensors that may be missing or for another number of classes; they stay as they are.

    Returns:
        Those of `classifier` that were not loaded.

    Raises:
        CheckpointError: Missing, damaged, more than plain values in it, or weights of another network.
    """
    content, ordered = _read_values(path, what)
    tables = _tables(content) or ({"": content} if _has_weights(content) else {})
    if not tables:
        raise CheckpointError(f"{what}: holds no weights by name{_found(content)}")
    state, reasons = module.state_dict(), []
    wanted = {name: value for name, value in state.items() if value.ndim > 0}
    for key in sorted(tables, key=lambda key: _KEYS.index(key) if key in _KEYS else len(_KEYS)):
        given = {name: value for name, value in tables[key].items() if isinstance(value, Tensor) and value.ndim > 0}
        given = _by_name(given, {name: names[name] for name in wanted}, classifier)
        given = {name: _resized(name, value, wanted.get(name)) for name, value in given.items()}
        fault = _mismatch(given, wanted, title, ordered, fix, classifier)
        if not fault:
            by_name = given.keys() <= wanted.keys()
            found = given if by_name else dict(zip(wanted, given.values(), strict=True))
            found = {name: value for name, value in found.items() if value.shape == wanted[name].shape}
            module.load_state_dict(found, strict=False)
            return [name for name in wanted if name not in found]
        reasons.append(fault)
    raise CheckpointError(f"{what}: {reasons[0]}{'' if '' in tables else _found(content)}")


def classifier_of(head: nn.Module, num_classes: int) -> list[str]:
    """Return the names of a head's tensors that have an entry for each class."""
    return [f"head.{name}" for name, value in head.state_dict().items() if value.shape[:1] == (num_classes,)]


def _read_values(path: Path, what: str) -> tuple[Any, bool]:
    """Read a file of torch.save or, by its content, of .safetensors; whether its order is that of the layers."""
    # Options of argparse and numpy's scalars lie beside the weights of many; neither runs code when it is read.
    scalars: list[Any] = [np.dtype, *{type(np.dtype(kind)) for kind in (bool, int, "int32", float, "float32")}]
    rebuild = np.float64(0).__reduce__()[0]
    scalars += [(rebuild, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with path.open("rb") as file:
            if file.read(9)[8:] == b"{":
                return safetensors.torch.load(path.read_bytes()), False
        with torch.serialization.safe_globals([argparse.Namespace, *scalars]):
            return torch.load(path, map_location="cpu", weights_only=True), True
    except FileNotFoundError:
        raise CheckpointError(f"{what}: no such file") from None
    except Exception as error:  # torch.load answers damage with five different types
        system = isinstance(error, OSError) and error.strerror
        reason = system or "it is damaged, or no file of weights by torch.save or safetensors"
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {foreign[1]}, and only values are read: save the network's state_dict() alone"
        raise CheckpointError(f"{what}: cannot be read: {reason}") from None


def _has_weights(content: Any) -> bool:
    return isinstance(content, Mapping) and any(
        isinstance(name, str) and isinstance(value, Tensor) and value.ndim > 0 for name, value in content.items()
    )


def _tables(content: Any, depth: int = 2) -> dict[str, Any]:
    """Find the dictionaries of weights within a checkpoint, by their keys."""
    found: dict[str, Any] = {}
    for key, value in content.items() if isinstance(content, Mapping) and depth else ():
        inner = {str(key): value} if _has_weights(value) else _tables(value, depth - 1)
        found |= {name if name in _KEYS and key not in _KEYS else str(key): each for name, each in inner.items()}
    return found


def _found(content: Any) -> str:
    keys = ", ".join(list(map(str, content))[:12]) if isinstance(content, Mapping) else ""
    return f"; its keys are {keys}" if keys else ""


def _by_name(given: Weights, names: Mapping[str, str], classifier: Collection[str]) -> Weights:
    """Return weights under the network's own names if theirs are these or the original ones, a prefix left out."""
    needed = {name for name in names if name not in classifier}
    while True:
        for own in ({name: name for name in names}, {original: name for name, original in names.items()}):
            found = {own[name]: value for name, value in given.items() if name in own}
            if len(found) == len(given) and needed <= found.keys():
                return found
        if len({name.partition(".")[0] for name in given}) != 1 or not all("." in name for name in given):
            return given
        given = {name.partition(".")[2]: value for name, value in given.items()}


def _resized(name: str, value: Tensor, wanted: Tensor | None) -> Tensor:
    """Interpolate the position embeddings [1, tokens, channels] of a square grid of patches to another one."""
    if wanted is None or not name.endswith("pos_embed") or {value.ndim, wanted.ndim} != {3}:
        return value
    lengths = value.shape[1], wanted.shape[1]
    for prefix in range(min(lengths)) if lengths[0] != lengths[1] and value.shape[2] == wanted.shape[2] else ():
        sides = [math.isqrt(length - prefix) for length in lengths]
        if [side * side + prefix for side in sides] == list(lengths):  # the tokens before the patches' stay
            grid = value[:, prefix:].float().transpose(1, 2).reshape(1, -1, sides[0], sides[0])
            grid = F.interpolate(grid, (sides[1], sides[1]), mode="bicubic", antialias=True)
            return torch.cat([value[:, :prefix], grid.flatten(2).transpose(1, 2).to(value.dtype)], dim=1)
    return value


def _mismatch(
    given: Weights, wanted: Weights, network: str, ordered: bool, fix: str, classifier: Collection[str]
) -> str:
    """Return why tensors are not those of a network; empty: they are."""
    by_name = given.keys() <= wanted.keys() and wanted.keys() - given.keys() <= set(classifier)
    if not by_name and not ordered and len(given) == len(wanted):
        return f"{min(given.keys() - wanted.keys())} is not a name in {network}, and .safetensors has no order"
    if by_name:
        wanted = {name: value for name, value in wanted.items() if name in given}
    for name, (own, value) in zip(wanted if by_name else given, wanted.items(), strict=False):
        if value.is_floating_point() and not given[name].is_floating_point():
            return f"{name} is {str(given[name].dtype)[6:]}: such weights are rounded: save them as float32"
        other_classes = own in classifier and given[name].shape[1:] == value.shape[1:]
        if given[name].shape != value.shape and not other_classes:
            return f"{name} is {list(given[name].shape)}, but {network} has {list(value.shape)} there: {fix}"
        kinds = name.rpartition(".")[2], own.rpartition(".")[2]
        if kinds[0] != kinds[1] and {*kinds} <= {"weight", "bias", "running_mean", "running_var"}:
            return f"{name} is where {network} has {own}: not in the order of its layers"
    if len(given) != len(wanted):
        return f"has {len(given)} tensors, but {network.partition(' ')[0]} {len(wanted)}: not that network"
    return ""
