"""Trainings of a fraction of a second: networks of some hundred weights, and 8x8 images whose class is their colour."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import codistill as cd
from codistill.methods.cohort import Cohort
from codistill.networks import NETWORKS, Network, PooledLinear
from codistill.networks.layers import conv_bn_act, initialise

from .pretended_gpu.device import waits_for_host

COLOURS = np.array([[190, 60, 60], [60, 190, 60], [60, 60, 190]])
CLASSES = ("red", "green", "blue")


def network(num_classes: int, width: int = 8) -> Network:
    """A tiny network for tests."""
    widths, strides = (4, 6, width), (1, 1, 2)
    stages = [
        conv_bn_act(before, after, 3, stride)
        for before, after, stride in zip((3, *widths), widths, strides, strict=False)
    ]
    return Network(stages, PooledLinear(width, num_classes), widths)


class Drawing(nn.Module):
    """Draws in every pass, in evaluation too: a dropout of torch's and, on the host, whether a layer is passed."""

    def __init__(self, width: int, host: bool = False) -> None:
        super().__init__()
        self.host = host
        self.skipped = nn.BatchNorm2d(width)

    def forward(self, features: Tensor) -> Tensor:
        if self.host:
            features = self.skipped(features) if random.random() < 0.5 else features
            features = features * float(np.random.uniform(0.9, 1.1))
        return F.dropout(features, 0.2, training=True)


def drawing(num_classes: int, host: bool = True) -> Network:
    """A tiny network that draws numbers."""
    plain = network(num_classes)
    stages = [*plain.stages[:-1], nn.Sequential(plain.stages[-1], Drawing(plain.widths[-1], host))]
    return Network(stages, plain.head, plain.widths)


def own_students(count: int = 2, classes: int = 3) -> list[Network]:
    """Make networks of one's own, which no name can rebuild."""
    students = [network(classes) for _ in range(count)]
    for student in students:
        initialise(student)
    return students


def method(kind: type[cd.Method] = cd.MFEF, seed: int = 0, students: int = 2, **settings: Any) -> cd.Method:
    torch.manual_seed(seed)
    return kind(own_students(students), 3, kind.Settings(**settings) if settings else None, image_size=(8, 8))


def feature_maps(cohort: Cohort, images: Tensor) -> list[Tensor]:
    """Return the last map of each student, through the stages that they share."""
    return cohort.each_branch(cohort.trunk(images), lambda _, each: each)


def split(count: int, seed: int, size: tuple[int, int] = (8, 8)) -> cd.Split:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 3)
    noise = rng.integers(-60, 61, (count, *size, 3))
    return cd.Split((COLOURS[labels][:, None, None] + noise).astype(np.uint8), labels)


def first(whole: cd.Split, count: int) -> cd.Split:
    return cd.Split(whole.images[:count], whole.labels[:count])


def data(train: int = 24, test: int = 9, size: tuple[int, int] = (8, 8), name: str = "colours") -> cd.Dataset:
    return cd.Dataset(name, split(train, 1, size), split(test, 2, size), CLASSES)


EXECUTION = {each.name for each in dataclasses.fields(cd.ExecutionSettings)}


def both_settings(**changes: Any) -> tuple[cd.TrainSettings, cd.ExecutionSettings]:
    """Return settings of a tiny training and of its execution, with changes to either."""
    execution = {name: changes.pop(name) for name in EXECUTION & changes.keys()}
    return settings(**changes), cd.ExecutionSettings(**({"threads": 1} | execution))


def settings(**changes: Any) -> cd.TrainSettings:
    return cd.TrainSettings(**({"epochs": 2, "batch_size": 8, "learning_rate": 0.05} | changes))


def write_npz(path: Path, whole: cd.Dataset) -> Path:
    np.savez(
        path,
        train_images=whole.train.images,
        train_labels=whole.train.labels,
        test_images=whole.test.images,
        test_labels=whole.test.labels,
        class_names=np.array(whole.class_names),
    )
    return path


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Register the tiny network as `tiny`, and the one that draws as `drawing`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS._entries, "drawing", drawing)
        patch.setitem(NETWORKS._entries, "tiny", network)
        yield


def untimed(value: Any) -> Any:
    """Leave out times, and the choices of execution that may depend on them, at any depth."""
    if isinstance(value, Mapping):
        return {key: untimed(each) for key, each in value.items() if "second" not in key and key != "execution"}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with contents."""
    return {str(each.relative_to(folder)): each.read_bytes() if each.is_file() else None for each in folder.rglob("*")}


class HostReads(TorchDispatchMode):
    """Find operators that make a CUDA step wait for the host or a shape depend on data; `Tensor.tolist` counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._within_tolist = False
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "HostReads":
        plain = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.found.append("tolist")
            self._within_tolist = True
            try:
                return plain(tensor)
            finally:
                self._within_tolist = False

        self._patch.setattr(Tensor, "tolist", tolist)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits_for_host(func, args) and not self._within_tolist:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
