"""Class names for images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from codistill.core.console import note
from codistill.core.errors import DataError
from codistill.data.dataset import Pixels
from codistill.data.images import SUFFIXES, open_image
from codistill.data.untrusted import visible
from codistill.deploy.classifier import Classifier

FIX = "name an image, or a folder of images"
BATCH = 250


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
        images: Files of any kind that `codistill.data.images.open_image` reads, or folders; see `image_files`.
        top: How many classes to name for each.

    Returns:
        An entry for each image file, in the order of `images`; those of a folder by their names.

    Raises:
        DataError: An image is missing or damaged; names it.
    """
    found = []
    for each in answers(classifier, images, top):
        if isinstance(each, DataError):
            raise each
        found.append(each)
    return found


def answers(classifier: Classifier, images: Sequence[Path], top: int = 3) -> Iterator[Prediction | DataError]:
    """Yield what `predict` returns, as soon as it is known; the error of an image that cannot be read in its place."""
    paths = [each for place in images for each in image_files(place)]
    for start in range(0, len(paths), BATCH):
        part = [_pixels(each, classifier) for each in paths[start : start + BATCH]]
        good = [each for each in part if not isinstance(each, DataError)]
        if good:
            logits = classifier.logits(np.stack(good))
            ranked = torch.softmax(logits.double(), dim=1).sort(dim=1, descending=True, stable=True)
            rows = zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)
        for path, found in zip(paths[start : start + BATCH], part, strict=True):
            if isinstance(path, DataError):
                yield path
            elif isinstance(found, DataError):
                yield found
            else:
                indices, values = next(rows)
                yield Prediction(path, tuple(classifier.class_names[i] for i in indices[:top]), tuple(values[:top]))


def _pixels(path: Path | DataError, classifier: Classifier) -> Pixels | DataError:
    if isinstance(path, DataError):
        return path
    try:
        return open_image(path, classifier.image_size, classifier.interpolation)
    except DataError as error:
        return error


def image_files(place: Path) -> list[Path | DataError]:
    """Return the image files of a folder, at any depth, sorted by name, or a file itself.

    Hidden files and those without the suffix of an image are passed over; where a folder cannot be read or holds no
    images, its error is in its place.
    """
    if not place.exists():
        return [DataError(f"{place}: no such file or folder: {FIX}")]
    if not place.is_dir():
        return [place]
    found: list[Path | DataError] = []
    others, seen, waiting = 0, set(), [place]
    while waiting:
        path = waiting.pop()
        try:
            if not path.is_dir():
                is_image = path.suffix.lower() in SUFFIXES and not path.is_fifo()  # which nobody may ever write to
                found += [path] * is_image
                others += not is_image
            elif (real := path.resolve()) not in seen:  # links may lead back
                seen.add(real)
                waiting += reversed(visible(path, FIX))
        except DataError as error:
            found.append(error)
    if others:
        note(f"{place}: passed over {others} files that are no images by their names")
    return found or [DataError(f"{place}: holds no images ({' '.join(SUFFIXES)}): {FIX}")]
