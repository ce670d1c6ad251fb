"""Settings of what is done to training images and labels beyond crops and flips."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from jaxtyping import Int
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches
from codistill.data.dataset import Dataset
from codistill.data.policy import LEVELS, Policy, Transforms, balanced_weights
from codistill.settings.kinds import take_kinds

CHOICES = ("auto_augment", "class_weights", "sampling")


@dataclass(frozen=True, kw_only=True)
class AugmentSettings(Policy):
    """Augmentation, labels and sampling; all off by default."""

    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the cross-entropy: none, or balanced, as if all classes had equally many images."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """Order of an epoch: all images once (shuffled), or as many but equally many of each class (balanced): of large
    classes some images are left out, those of small ones come several times."""

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
        for name in CHOICES:
            value, choices = getattr(self, name), get_args(get_type_hints(type(self))[name])
            if value not in choices:
                raise UsageError(f"{name} is {value!r}: {near_matches(str(value), choices)}")
        if self.class_weights == self.sampling == "balanced":
            raise UsageError("class_weights and sampling are both balanced, which counts small classes twice: use one")

    def transforms(self, data: Dataset, training: Int[Tensor, " image"] | None = None) -> Transforms | None:
        """Return what is done to the images of a data set, of which those at positions are used; None: nothing."""
        if self == AugmentSettings():
            return None
        used = data.train.labels if training is None else data.train.labels[training.numpy()]
        weights = balanced_weights(used, data.num_classes) if self.class_weights == "balanced" else None
        return Transforms(
            policy=self,
            size=data.image_size,
            classes=data.num_classes,
            class_weights=weights,
            balanced=self.sampling == "balanced",
        )
