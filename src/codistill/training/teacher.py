"""A frozen teacher beside the students of any method that allows one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codistill.core.errors import CheckpointError, UsageError
from codistill.data.affine import Affine
from codistill.deploy.classifier import load_predictor
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
    if settings.teacher_network is not None:
        return read_checkpoint(path, settings.teacher_network, len(class_names))
    if not path.is_dir() and path.suffix != ".safetensors":
        if not path.exists():
            raise CheckpointError(f"teacher {path}: no such run folder or file")
        raise UsageError(f"teacher {path}: name the network whose weights it holds with --teacher-network")
    card, module = load_predictor(path, settings.teacher_predictor)
    if tuple(card["class_names"]) != tuple(class_names):
        raise UsageError(
            f"teacher {path} knows {len(card['class_names'])} classes ({card['trained_on']}) that are not the "
            f"{len(class_names)} of the data set: give a teacher of the same classes"
        )
    wanted = (card["mean"], card["std"])
    if all(list(a) == list(b) for a, b in zip(wanted, statistics, strict=True)):
        return module
    return nn.Sequential(Affine.renormalise(statistics, wanted), module)


def read_checkpoint(path: Path, spec: str, num_classes: int) -> Network:
    """Read the weights of a network from a checkpoint of RepDistiller, of mdistiller, or of plain weights.

    The file holds {"model": weights}, {"state_dict": weights} or weights; tensors and plain values only. Names differ
    from repository to repository, the order of the layers does not: tensors are taken in order, and every shape must
    agree.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"teacher {path}: no such file") from None
    except Exception as error:  # torch.load answers damage with five different types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"teacher {path}: cannot be read: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    built = network(spec, num_classes)
    if not isinstance(content, dict):
        raise CheckpointError(f"teacher {path}: holds no weights by name")
    given = [(name, value) for name, value in content.items() if isinstance(value, Tensor) and value.ndim > 0]
    wanted = [(name, value) for name, value in built.state_dict().items() if value.ndim > 0]
    for (name, value), (_, own) in zip(given, wanted, strict=False):
        if value.shape != own.shape:
            raise CheckpointError(
                f"teacher {path}: {name} is {list(value.shape)}, but {spec} with {num_classes} classes has "
                f"{list(own.shape)} there: name its network with --teacher-network"
            )
    if len(given) != len(wanted):
        raise CheckpointError(f"teacher {path}: has {len(given)} tensors, but {spec} {len(wanted)}: not that network")
    state = {name: value for (name, _), (_, value) in zip(wanted, given, strict=True)}
    built.load_state_dict(state, strict=False)
    return built
