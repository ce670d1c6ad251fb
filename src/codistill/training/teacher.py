"""A frozen teacher beside the students of any method that allows one: where it comes from, and how good it is."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codistill.core.device import autocast
from codistill.core.errors import CheckpointError, UsageError
from codistill.core.randomness import draws_kept
from codistill.data.affine import Affine
from codistill.data.augment import DeviceImages
from codistill.deploy.classifier import load_predictor
from codistill.evaluation.evaluation import batch_for
from codistill.evaluation.metrics import ClassificationSums, read_together, scores
from codistill.methods.teacher import TeacherEnsemble
from codistill.networks import Network, network
from codistill.networks.weights import take
from codistill.settings.config import TeacherSettings


def load_teacher(
    settings: TeacherSettings,
    class_names: tuple[str, ...],
    statistics: tuple[Any, Any],
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Load a teacher for students of a data set; of several the `TeacherEnsemble`.

    Args:
        settings: Where it is, or they are.
        class_names: Of the data set, which must be the teacher's.
        statistics: Mean and standard deviation that the students' images are normalised with; a teacher from a run or
            an exported file gets its own, one from a checkpoint these.
        image_size: Height and width of the images, pixels, for networks that are made for one size.

    Raises:
        UsageError: Unlike classes, or a checkpoint without a network.
        CheckpointError: Missing, damaged, or weights of another network.
    """
    loaded = [load_one(Path(each), settings, class_names, statistics, image_size) for each in settings.teachers]
    return loaded[0] if len(loaded) == 1 else TeacherEnsemble(loaded, settings.teacher_temperature)


def load_one(
    path: Path,
    settings: TeacherSettings,
    class_names: tuple[str, ...],
    statistics: tuple[Any, Any],
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """Load the teacher of one place; see `load_teacher`."""
    if path.suffix in (".onnx", ".pt2") and path.is_file():
        raise UsageError(
            f"teacher {path}: {path.suffix} files do not teach: name the run, or export it as .safetensors"
        )
    if settings.teacher_network is not None:
        if path.is_dir():
            raise CheckpointError(f"teacher {path}: is a folder: a run knows its network: leave --teacher-network out")
        return read_checkpoint(path, settings.teacher_network, len(class_names), image_size)
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
    if settings.teacher_predictor not in (None, card["predictor"]):
        found = f"holds {card['predictor']}, not {settings.teacher_predictor}"
        raise UsageError(f"teacher {path}: {found}: leave --teacher-predictor out, or name the run folder")
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
def top1_error(
    teacher: nn.Module, images: DeviceImages, precision: str, memory_format: torch.memory_format
) -> tuple[float, str]:
    """Return the top-1 error of a teacher on a test set, percent, and why it teaches nothing; empty: it can teach."""
    sums: ClassificationSums | None = None
    with draws_kept(images.device), autocast(images.device, precision):
        for pixels, labels in images.batches(batch_for(images.images.shape[1:3])):
            logits = teacher(pixels.contiguous(memory_format=memory_format))
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


def read_checkpoint(path: Path, spec: str, num_classes: int, image_size: tuple[int, int] | None = None) -> Network:
    """Read the weights of a network from a checkpoint of RepDistiller, of mdistiller, or of any other repository.

    Raises:
        CheckpointError: Missing, damaged, more than plain values in it, or weights of another network; see `take`.
    """
    built = network(spec, num_classes, image_size=image_size, fresh=False)
    title = f"{spec} with {num_classes} classes"
    take(built, built.original_names(), path, f"teacher {path}", title, "name its network with --teacher-network")
    return built
