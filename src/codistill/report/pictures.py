"""Pictures of a report: test images, and the attention on some of them, kept small beside the run."""

import base64
import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from codistill.core.console import warn
from codistill.core.errors import CodistillError, DataError, reason
from codistill.core.files import replaced
from codistill.core.randomness import draws_kept
from codistill.data.affine import Affine
from codistill.data.dataset import Pixels, Split
from codistill.data.packed import read_array
from codistill.evaluation.analysis import confident_mistakes, disagreements
from codistill.evaluation.predictions import Predictions
from codistill.methods import Method
from codistill.runs.choice import evaluated, lowest_student
from codistill.runs.folder import RunFolder
from codistill.runs.predictions import NAME as PREDICTIONS
from codistill.runs.predictions import read_predictions

NAME = "report-images.npz"
LONGEST = 96
"""Of a picture's sides, pixels; larger images are made smaller."""
MISTAKES = 16
"""Of each predictor."""
DISPUTED = 8
"""Of each pair of students."""
ATTENDED = 8
"""Images that attention is laid over."""
MOST = 96

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Some test images of a run.

    Attributes:
        positions: int64 [picture], of each one in the test split.
        images: uint8 [picture, height, width, 3].
        attended: int64 [attended], positions of those that attention was computed for.
        channels: By predictor that weights them, float32 [attended, channel], weights of channels, 0 to 1.
        places: By predictor that weights them, float32 [attended, height, width], weights of places, 0 to 1.
    """

    positions: npt.NDArray[np.int64]
    images: Pixels
    attended: npt.NDArray[np.int64]
    channels: Mapping[str, Floats]
    places: Mapping[str, Floats]

    def of(self, position: int) -> str | None:
        """Return the image at a position of the test split as a data URI; None: it was not kept."""
        found = np.flatnonzero(self.positions == position)
        return png(self.images[found[0]]) if len(found) else None


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """Return an image, uint8 [height, width, 3 or 4], as the data URI of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shrunk(image: Pixels) -> Pixels:
    """Return an image whose longer side is at most `LONGEST` pixels, the other one in proportion."""
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= LONGEST:
        return image
    size = [max(1, round(side * LONGEST / longest)) for side in (width, height)]
    return np.asarray(Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.LANCZOS))


def chosen_images(predictions: Predictions, student: str, num_classes: int) -> tuple[list[int], list[int]]:
    """Return which images of the predictions are kept, and for which of them attention is computed.

    Kept are the most confident mistakes of each predictor and the images that two students are surest to see
    otherwise; attention is for mistakes of a student and for images of which it is right, each of another class.
    """
    surest = np.argsort(-predictions.predictors[student].confidence, kind="stable")
    correct = predictions.correct(student)
    right = [int(image) for image in surest if correct[image]]
    wrong = [int(image) for image in surest if not correct[image]]
    attended = _of_unlike_classes(predictions, wrong, ATTENDED // 2)
    attended += _of_unlike_classes(predictions, right, ATTENDED - len(attended))
    kept = dict.fromkeys(attended)
    for name in (student, *predictions.predictors):
        kept |= dict.fromkeys(each.image for each in confident_mistakes(predictions, name, MISTAKES))
    for pair in disagreements(predictions, num_classes, DISPUTED):
        kept |= dict.fromkeys(pair.confident)
    return list(kept)[:MOST], attended


def _of_unlike_classes(predictions: Predictions, images: Iterable[int], count: int) -> list[int]:
    by_class: dict[int, int] = {}
    for image in images:
        by_class.setdefault(int(predictions.labels[image]), image)
    return list(by_class.values())[:count]


@torch.no_grad()
def keep_pictures(run: RunFolder, method: Method, predictions: Predictions, student: str, test: Split) -> None:
    """Write report-images.npz into a run folder, whole or not at all.

    Args:
        run: The run.
        method: With the weights that the predictions are of, on any device; it is left in the mode that it was in.
        predictions: On the test split.
        student: The best one.
        test: The test split.

    Raises:
        OSError: What the system answers.
    """
    kept, attended = chosen_images(predictions, student, len(run.class_names))
    images = np.stack([shrunk(test.images[predictions.positions[each]]) for each in kept])
    arrays: dict[str, npt.NDArray[Any]] = {
        "positions": predictions.positions[kept],
        "images": images,
        "attended": predictions.positions[attended],
    }
    device = next(method.parameters()).device
    facts, training = run.metadata["dataset"], method.training
    pixels = torch.from_numpy(np.ascontiguousarray(test.images[predictions.positions[attended]]))
    method.eval()
    try:
        with draws_kept(device):
            normalise = Affine.normalise((facts["mean"], facts["std"])).to(device)
            found = method.attention_maps(normalise(pixels.permute(0, 3, 1, 2).to(device)))
    finally:
        method.train(training)
    for name, maps in found.items():
        for kind, weights in maps._asdict().items():
            if weights is None:
                continue
            arrays[f"{kind}/{name}"] = weights.float().cpu().numpy().astype(np.float32)
    with replaced(run.path / NAME) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def complete_pictures(run: RunFolder, data_dir: str | None = None, skip_bad: bool = False) -> None:
    """Make report-images.npz of a run that lacks it, from its last checkpoint and its data set, if they are there.

    Where they are not, a warning says so; a run without predictions.npz has none, as its page says.
    """
    if read_pictures(run.path) is not None or not (run.path / PREDICTIONS).exists():
        return
    try:
        test = read_predictions(run)["test"]
        data, method = run.load_data(data_dir, skip_bad), run.load_method()
        if len(data.test) <= int(test.positions.max()):
            raise DataError(f"data set {data.name}: its test set has {len(data.test)} images, less than in training")
        keep_pictures(run, method, test, lowest_student(evaluated(run.metrics())[-1])[0], data.test)
    except (CodistillError, OSError) as error:
        warn(f"{run.path}: its page has no pictures: {reason(error)}")


def read_pictures(folder: Path) -> Pictures | None:
    """Read report-images.npz of a run; None: it is absent, or not as `keep_pictures` writes it."""
    path = folder / NAME
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            arrays = {name: read_array(archive, path, name, "") for name in names}
        maps: dict[str, dict[str, Floats]] = {"channels": {}, "places": {}}
        for name in names:
            kind, slash, predictor = name.partition("/")
            if slash:
                maps[kind][predictor] = arrays[name]
        found = Pictures(arrays["positions"], arrays["images"], arrays["attended"], maps["channels"], maps["places"])
        _check(found)
    except Exception:  # whatever zipfile and NumPy raise on bad bytes: the page does without
        return None
    return found


def _check(pictures: Pictures) -> None:
    """Raise ValueError where arrays are not of the shapes and types that the page draws."""
    images, places = pictures.images, pictures.places
    whole = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and min(images.shape[1:3]) > 0
    listed = pictures.positions.dtype == np.int64 and pictures.positions.shape == images.shape[:1]
    attended = pictures.attended.dtype == np.int64 and pictures.attended.ndim == 1
    shaped = all(each.ndim == 3 and len(each) == len(pictures.attended) and each.size for each in places.values())
    beside = all(each.ndim == 2 and len(each) == len(pictures.attended) for each in pictures.channels.values())
    numbers = all(each.dtype == np.float32 for kind in (places, pictures.channels) for each in kind.values())
    if not (whole and listed and attended and shaped and beside and numbers):
        raise ValueError("no pictures of a report")


VEIL = (14, 20, 58)
THICKEST = 215
LEAST_SPAN = 0.5
"""Of logits: a smaller difference is not stretched over the whole range."""


def veil(weights: npt.NDArray[np.floating[Any]]) -> str:
    """Return weights [height, width], 0 to 1, as a veil over an image: thick where they are lowest.

    Between these by their logits, what the sigmoid was computed of, so that the order shows where it is saturated.
    """
    inside = np.clip(weights.astype(np.float64), 1e-7, 1 - 1e-7)
    logits = np.log(inside / (1 - inside))
    high, low = float(logits.max()), float(logits.min())
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = VEIL
    pixels[..., 3] = (THICKEST * (high - logits) / max(high - low, LEAST_SPAN)).round()
    return png(pixels)
