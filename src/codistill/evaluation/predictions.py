"""What predictors answered for each image of a split: on the device while it is evaluated, then as arrays."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

TOP = 5
"""How many classes are kept for each image, the most probable ones: memory does not grow with the number of classes."""


def students_among(predictors: Iterable[str]) -> list[str]:
    """Return those that are students themselves: neither moving averages of their weights nor their exits."""
    return [name for name in predictors if re.fullmatch(r"student\d+", name)]


class Ranking(NamedTuple):
    """The most probable classes of a batch, and how probable its labels are, on the device."""

    classes: Int[Tensor, "batch top"]  # best first; all of them where there are no more than `TOP`
    log_probabilities: Float[Tensor, "batch top"]  # of these classes, nats
    label: Float[Tensor, " batch"]  # log-probability of the label, nats


def ranking(logits: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"]) -> Ranking:
    """Return the classes of each image by softmax probability in float32."""
    log_probabilities = torch.log_softmax(logits.float(), dim=1)
    # Of equal ones the first class, as argmax names it.
    values, classes = (each[:, :TOP] for each in log_probabilities.sort(dim=1, descending=True, stable=True))
    return Ranking(classes, values, log_probabilities.gather(1, labels[:, None])[:, 0])


class RankingStore:
    """The rankings of all images of a split for one predictor, on the device; 44 bytes an image."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._kept: Ranking | None = None

    def write(self, start: int, batch: Ranking) -> None:
        """Keep the ranking of a batch whose first image is at `start`, in place of what was there."""
        if self._kept is None:
            kinds = (torch.int32, torch.float32, torch.float32)
            self._kept = Ranking(
                *(
                    each.new_zeros((self._images, *each.shape[1:]), dtype=kind)
                    for each, kind in zip(batch, kinds, strict=True)
                )
            )
        for kept, each in zip(self._kept, batch, strict=True):
            kept[start : start + len(each)].copy_(each)

    def read(self) -> "Ranked":
        """Return the rankings on the host."""
        assert self._kept is not None, "nothing was evaluated"
        return Ranked(*(each.cpu().numpy() for each in self._kept))


@dataclass(frozen=True, eq=False)
class Ranked:
    """What one predictor answered for each image of a split.

    Attributes:
        classes: int32 [image, top], the most probable classes, best first; `top` is 5, or the number of classes.
        log_probabilities: float32 [image, top], of these classes, nats.
        label_log_probability: float32 [image], of the label, nats.
    """

    classes: npt.NDArray[np.int32]
    log_probabilities: npt.NDArray[np.float32]
    label_log_probability: npt.NDArray[np.float32]

    @property
    def named(self) -> npt.NDArray[np.int32]:
        """int32 [image]: the class that is named, the most probable one."""
        first: npt.NDArray[np.int32] = self.classes[:, 0]
        return first

    @property
    def confidence(self) -> npt.NDArray[np.float64]:
        """float64 [image]: probability of the class that is named, 0 to 1."""
        return np.exp(self.log_probabilities[:, 0].astype(np.float64))


@dataclass(frozen=True, eq=False)
class Predictions:
    """What all predictors answered on one split, as `predictions.npz` of a run holds it.

    Attributes:
        labels: int64 [image], class indices in the order of the run's class names.
        positions: int64 [image], place of each image in the data set's split that it is of: `test`, or for validation
            images `train`.
        files: Path of each image relative to the root of the data set; empty where images are no files.
        predictors: By name: student0, .., ensemble, fused.
    """

    labels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    files: tuple[str, ...]
    predictors: Mapping[str, Ranked]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def students(self) -> tuple[str, ...]:
        """Names of the students, in order, see `students_among`."""
        return tuple(students_among(self.predictors))

    def place(self, image: int) -> str:
        """Return the file of an image, or where there is none its position in the split of the data set, as text."""
        return self.files[image] if self.files else str(self.positions[image])

    def correct(self, predictor: str) -> npt.NDArray[np.bool_]:
        """Return whether a predictor names the label: bool [image]."""
        right: npt.NDArray[np.bool_] = self.predictors[predictor].named == self.labels
        return right

    def as_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a .npz file by name; file names are UTF-8, each with a NUL byte after it."""
        encoded = "".join(f"{name}\0" for name in self.files).encode(errors="surrogateescape")
        arrays: dict[str, npt.NDArray[Any]] = {
            "labels": self.labels,
            "positions": self.positions,
            "files": np.frombuffer(encoded, np.uint8),
        }
        for name, each in self.predictors.items():
            arrays |= {f"{name}/{kind}": value for kind, value in vars(each).items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], num_classes: int) -> "Predictions":
        """Check arrays, whatever they are, and return what `as_arrays` was called on.

        Raises:
            ValueError: An array is missing, or has another type or shape, or values that cannot be.
        """
        labels = _checked(arrays, "labels", np.int64, (None,))
        images = len(labels)
        positions = _checked(arrays, "positions", np.int64, (images,))
        encoded = _checked(arrays, "files", np.uint8, (None,)).tobytes()
        files = tuple(encoded.decode(errors="surrogateescape").split("\0")[:-1])
        if files and len(files) != images:
            raise ValueError(f"{len(files)} file names for {images} images")
        _within("labels", labels, 0, num_classes - 1)
        _within("positions", positions, 0, np.iinfo(np.int64).max)
        predictors, top = {}, min(TOP, num_classes)
        for name in dict.fromkeys(_predictors(arrays)):
            each = Ranked(
                _checked(arrays, f"{name}/classes", np.int32, (images, top)),
                _checked(arrays, f"{name}/log_probabilities", np.float32, (images, top)),
                _checked(arrays, f"{name}/label_log_probability", np.float32, (images,)),
            )
            _within(f"{name}/classes", each.classes, 0, num_classes - 1)
            for kind in ("log_probabilities", "label_log_probability"):
                _within(f"{name}/{kind}", getattr(each, kind), -np.inf, 0)
            predictors[name] = each
        if not images or not predictors:
            raise ValueError("no images, or no predictors")
        return cls(labels, positions, files, predictors)


def _predictors(arrays: Iterable[str]) -> list[str]:
    return [name.rpartition("/")[0] for name in arrays if "/" in name]


def _checked(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, kind: type, shape: tuple[int | None, ...]
) -> npt.NDArray[Any]:
    array = arrays.get(name)
    if array is None:
        raise ValueError(f"no array {name}")
    fits = len(array.shape) == len(shape) and all(a == b or b is None for a, b in zip(array.shape, shape, strict=True))
    if array.dtype != kind or not fits:
        wanted = ["any" if length is None else length for length in shape]
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)} instead of {np.dtype(kind)} {wanted}")
    return array


def _within(name: str, array: npt.NDArray[Any], low: float, high: float) -> None:
    if not ((array >= low) & (array <= high)).all():  # NaN is within nothing
        raise ValueError(f"{name} has values outside {low} to {high}")
