"""Settings of what is done to training images and labels beyond crops and flips."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Int
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.core.kinds import take_kinds
from codistill.data.dataset import Dataset
from codistill.data.policy import LEVELS, Policy, Sampling, Transforms, balanced_weights


@dataclass(frozen=True, kw_only=True)
class AugmentSettings(Policy):
    """Augmentation, labels and sampling; all off by default."""

    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the cross-entropy: none, or balanced, as if all classes had equally many images."""
    sampling: Sampling = "shuffled"
    """Order of an epoch: all images once (shuffled), or as many but equally many of each class (balanced): of large
    classes some images are left out, those of small ones come several times. class-pairs: each batch has two images of
    each of its classes, which are drawn, for methods that compare images of a class."""

    def __post_init__(self) -> None:
        take_kinds(self)
        for name, low, high in (
            ("randaugment_operations", 1, 16),
            ("randaugment_magnitude", 0, LEVELS),
            ("color_jitter", 0, 1),
            ("random_erasing", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be a number, at least 0")
        if not 0 < self.resized_crop <= 1:
            raise UsageError(f"resized_crop is {self.resized_crop}; it must be above 0 and at most 1")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing is {self.label_smoothing}; it must be from 0 to below 1")
        if self.class_weights == "balanced" and self.sampling != "shuffled":
            both = "are both balanced" if self.sampling == "balanced" else f"are balanced and {self.sampling}"
            raise UsageError(f"class_weights and sampling {both}, which counts small classes twice: use one")

    def transforms(
        self, data: Dataset, training: Int[Tensor, " image"] | None = None, batch_size: int = 128
    ) -> Transforms | None:
        """Return what is done to the images of a data set, of which those at positions are used; None: nothing.

        Raises:
            UsageError: Batches of that size, or the classes, cannot be sampled by pairs.
        """
        if self == AugmentSettings():
            return None
        used = data.train.labels if training is None else data.train.labels[training.numpy()]
        if self.sampling == "class-pairs":
            self.check_pairs(data, used, batch_size)
        weights = balanced_weights(used, data.num_classes) if self.class_weights == "balanced" else None
        return Transforms(
            policy=self,
            size=data.image_size,
            classes=data.num_classes,
            class_weights=weights,
            sampling=self.sampling,
            batch_size=batch_size,
        )

    @staticmethod
    def check_pairs(data: Dataset, labels: npt.NDArray[np.int64], batch_size: int) -> None:
        """Refuse batches that pairs do not fill, and classes that have none."""
        if batch_size % 2:
            raise UsageError(
                f"sampling class-pairs fills batches by twos, but batch_size is {batch_size}: use an even one"
            )
        single = [data.class_names[each] for each in np.flatnonzero(np.bincount(labels) == 1)]
        if single:
            raise UsageError(
                f"sampling class-pairs needs two training images of each class, but of {', '.join(single[:3])}"
                f"{', ..' if len(single) > 3 else ''} there is one: train on more images, or use another sampling"
            )
