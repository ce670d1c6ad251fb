"""Class names for images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from codistill.data.images import open_image
from codistill.deploy.classifier import Classifier


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        image: The file.
        classes: Names of the most probable classes, best first.
        probabilities: Their softmax probabilities, from 0 to 1.
    """

    image: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(classifier: Classifier, images: Sequence[Path], top: int = 3) -> list[Prediction]:
    """Classify image files.

    An image of another size than the training's is scaled to cover it and cut to it, as the `folder` data set does.

    Args:
        classifier: From `load_classifier`.
        images: Files of any kind that `codistill.data.images.open_image` reads.
        top: How many classes to name for each.

    Raises:
        DataError: An image is missing or damaged; names it.
    """
    pixels = np.stack([open_image(path, classifier.image_size) for path in images])
    ranked = torch.softmax(classifier.logits(pixels).double(), dim=1).sort(dim=1, descending=True, stable=True)
    names = classifier.class_names
    return [
        Prediction(path, tuple(names[index] for index in indices[:top]), tuple(values[:top]))
        for path, indices, values in zip(images, ranked.indices.tolist(), ranked.values.tolist(), strict=True)
    ]
