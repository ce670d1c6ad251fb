"""A frozen teacher beside the students of any method that allows one: where it comes from, and how good it is."""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from codistill.core.device import autocast
from codistill.core.errors import CheckpointError, UsageError
from codistill.core.randomness import draws_kept
from codistill.data.affine import Affine
from codistill.data.augment import DeviceImages
from codistill.deploy.classifier import load_predictor
from codistill.evaluation.evaluation import EVALUATION_BATCH
from codistill.evaluation.metrics import ClassificationSums, read_together, scores
from codistill.networks import Network, network
from codistill.settings.config import TeacherSettings


def load_teacher(settings: TeacherSettings, class_names: tuple[str, ...], statistics: tuple[Any, Any]) -> nn.Module:
    """Load a teacher for students of a data set.

    Args:
        settings: Where it is.
        class_names: Of the data set, which must be the teacher's.
        statistics: Mean and standard deviation that the students' images are normalised with; a teacher from a run or
            an exported file gets its own, one from a checkpoint these.

    Raises:
        UsageError: Unlike classes, or a checkpoint without a network.
        CheckpointError: Missing, damaged, or weights of another network.
    """
    assert settings.teacher is not None
    path = Path(settings.teacher)
    if path.suffix in (".onnx", ".pt2") and path.is_file():
        raise UsageError(
            f"teacher {path}: {path.suffix} files do not teach: name the run, or export it as .safetensors"
        )
    if settings.teacher_network is not None:
        return read_checkpoint(path, settings.teacher_network, len(class_names))
    if not path.is_dir() and path.suffix != ".safetensors":
        if not path.exists():
            raise CheckpointError(f"teacher {path}: no such run folder or file")
        raise UsageError(f"teacher {path}: name the network whose weights it holds with --teacher-network")
    try:
        card, module = load_predictor(path, settings.teacher_predictor)
    except CheckpointError as error:
        if path.is_file():
            raise CheckpointError(f"{error}; plain weights teach with --teacher-network") from None
        raise
    if tuple(card["class_names"]) != tuple(class_names):
        raise UsageError(
            f"teacher {path} knows {len(card['class_names'])} classes ({card['trained_on']}) that are not the "
            f"{len(class_names)} of the data set: give a teacher of the same classes"
        )
    wanted = (card["mean"], card["std"])
    if all(list(a) == list(b) for a, b in zip(wanted, statistics, strict=True)):
        return module
    return nn.Sequential(Affine.renormalise(statistics, wanted), module)


@torch.no_grad()
def top1_error(teacher: nn.Module, images: DeviceImages, precision: str) -> tuple[float, str]:
    """Return the top-1 error of a teacher on a test set, percent, and why it teaches nothing; empty: it can teach."""
    sums: ClassificationSums | None = None
    with draws_kept(images.device), autocast(images.device, precision):
        for start in range(0, len(images), EVALUATION_BATCH):
            pixels, labels = images.batch(start, start + EVALUATION_BATCH)
            logits = teacher(pixels)
            sums = sums or ClassificationSums(logits.shape[1], images.device)
            sums.update(logits, labels)
    assert sums is not None  # a split has images
    found = scores(read_together(sums.tensors()))
    if not math.isfinite(found.nll):
        return found.top1_error, "its logits are NaN or infinite"
    count, errors = len(images), found.top1_error / 100
    guess = 1 - images.labels.bincount().max().item() / count  # the error of whoever names the commonest class
    # By chance a teacher at random is better than by two standard deviations once in forty times.
    at_chance = errors >= guess - 2 * (guess * (1 - guess) / count) ** 0.5
    return found.top1_error, f"a guess has an error of {100 * guess:.2f} %" if at_chance else ""


def read_checkpoint(path: Path, spec: str, num_classes: int) -> Network:
    """Read the weights of a network from a checkpoint of RepDistiller, of mdistiller, or of any other repository.

    The file, by torch.save or .safetensors, holds weights by name or a dictionary of them, under any key. Equal names
    are matched by name, a prefix of all such as `module.` left out. Other names differ from repository to repository,
    the order of the layers does not: such tensors are taken in order, and every shape must agree.

    Raises:
        CheckpointError: Missing, damaged, more than plain values in it, or weights of another network.
    """
    content, ordered = _read_values(path)
    tables = _tables(content) or ({"": content} if _has_weights(content) else {})
    if not tables:
        raise CheckpointError(f"teacher {path}: holds no weights by name{_found(content)}")
    reasons = []
    for key in sorted(tables, key=lambda key: _KEYS.index(key) if key in _KEYS else len(_KEYS)):
        built = network(spec, num_classes)
        wanted = {name: value for name, value in built.state_dict().items() if value.ndim > 0}
        given = {name: value for name, value in tables[key].items() if isinstance(value, Tensor) and value.ndim > 0}
        while len({name.partition(".")[0] for name in given}) == 1 and all("." in name for name in given):
            given = {name.partition(".")[2]: value for name, value in given.items()}
        fault = _mismatch(given, wanted, f"{spec} with {num_classes} classes", ordered)
        if not fault:
            order = wanted if given.keys() == wanted.keys() else given
            built.load_state_dict({name: given[own] for name, own in zip(wanted, order, strict=True)}, strict=False)
            return built
        reasons.append(fault)
    raise CheckpointError(f"teacher {path}: {reasons[0]}{'' if '' in tables else _found(content)}")


_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "teacher", "student")
"""Where weights of several networks are in a file, the first of these that fits is taken."""


def _read_values(path: Path) -> tuple[Any, bool]:
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
        raise CheckpointError(f"teacher {path}: no such file") from None
    except Exception as error:  # torch.load answers damage with five different types
        system = isinstance(error, OSError) and error.strerror
        reason = system or "it is damaged, or no file of weights by torch.save or safetensors"
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {foreign[1]}, and only values are read: save the network's state_dict() alone"
        raise CheckpointError(f"teacher {path}: cannot be read: {reason}") from None


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


def _mismatch(given: dict[str, Tensor], wanted: dict[str, Tensor], network: str, ordered: bool) -> str:
    """Return why tensors are not those of a network; empty: they are."""
    by_name = given.keys() == wanted.keys()
    if not by_name and not ordered and len(given) == len(wanted):
        return f"{min(given.keys() - wanted.keys())} is not a name in {network}, and .safetensors has no order"
    for name, (own, value) in zip(wanted if by_name else given, wanted.items(), strict=False):
        if value.is_floating_point() and not given[name].is_floating_point():
            return f"{name} is {str(given[name].dtype)[6:]}: such weights are rounded: save them as float32"
        if given[name].shape != value.shape:
            return (
                f"{name} is {list(given[name].shape)}, but {network} has {list(value.shape)} there: "
                "name its network with --teacher-network"
            )
        kinds = name.rpartition(".")[2], own.rpartition(".")[2]
        if kinds[0] != kinds[1] and {*kinds} <= {"weight", "bias", "running_mean", "running_var"}:
            return f"{name} is where {network} has {own}: not in the order of its layers"
    if len(given) != len(wanted):
        return f"has {len(given)} tensors, but {network.partition(' ')[0]} {len(wanted)}: not that network"
    return ""
