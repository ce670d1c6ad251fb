"""Export of one predictor to one file, compared with the run before it is kept."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codistill.core.errors import CheckpointError, UsageError
from codistill.core.files import replaced, system_error, write_atomically
from codistill.data.dataset import Dataset
from codistill.deploy.classifier import Classifier, from_module, load_classifier, make_card, run_predictor
from codistill.deploy.formats import SUFFIXES, WRITERS, calibration_images, quantise
from codistill.deploy.latency import onnx_pace
from codistill.networks.network import parameter_count
from codistill.runs.folder import RunFolder
from codistill.runs.latency import Runtime

COMPARED_IMAGES = 1000
COMPARED_BATCHES = (1, 2, 7)
"""Sizes of batches that are compared beside a large one: tracing may have fixed the one that it saw."""
ALLOWED_DIFFERENCE = 1e-3
"""Of logits, relative to the largest one: float32 sums in another order stay far below it."""
MAX_ACCURACY_LOSS = 1.0  # points of accuracy that int8 may cost

RUNTIMES: dict[str, Runtime] = {
    "onnx": "onnx",
    "onnx-int8": "onnx-int8",
    "safetensors": "torch",
    "torch-export": "torch",
}
"""What a file of each format runs in, as latency is measured."""


@dataclass(frozen=True)
class Quantised:
    """What 8 bits change: float32 before, int8 after, both as ONNX on this CPU."""

    images: int  # number of test images, all of them
    error: tuple[float, float]  # top-1, percent, before and after
    milliseconds: tuple[float, float]  # a call of one image with one thread, before and after
    bytes: tuple[int, int]  # size of the file, before and after
    calibration_images: int  # number of training images

    @property
    def loss(self) -> float:
        """Points of accuracy that were lost; below 0 where some were gained."""
        return self.error[1] - self.error[0]


@dataclass(frozen=True)
class Exported:
    """An exported file and how it compares with the run."""

    path: Path
    predictor: str
    parameters: int  # number of them
    images: int  # number of test images that were compared
    difference: float  # largest absolute difference of a logit
    allowed: float  # the largest one that is kept
    agreement: float  # images with the same highest logit, share from 0 to 1
    quantised: Quantised | None = None  # of onnx-int8, whose logits differ by more than rounding

    @property
    def line(self) -> str:
        """What was written and compared, in one line that ends a command."""
        agreement = f"top-1 agrees on {100 * self.agreement:.2f} %"
        what = f"{self.path}: {self.predictor}, {self.parameters:,} parameters"
        start = f"ok: {what}; loaded and compared on {self.images}"
        if (int8 := self.quantised) is None:
            return f"{start} test images: logits differ by at most {self.difference:.2g}, {agreement}"
        return (
            f"{start} test images with float32: {agreement}; error {int8.error[0]:.2f} % before, {int8.error[1]:.2f} % "
            f"after (all {int8.images} test images); one image with one thread takes {int8.milliseconds[0]:.3g} ms "
            f"before, {int8.milliseconds[1]:.3g} ms after; {int8.bytes[0] / 1024:,.0f} KiB before, "
            f"{int8.bytes[1] / 1024:,.0f} KiB after; calibrated on {int8.calibration_images} training images"
        )


def refuse_accuracy_loss(points: float) -> None:
    """Raise `UsageError` where the accuracy that onnx-int8 may lose is no number of points."""
    if not 0 <= points <= 100:
        raise UsageError(f"--max-accuracy-loss is {points:g}; it must be from 0 to 100 points of accuracy")


def choose_format(file: Path | None, format: str | None) -> str:
    """Return the format by its name or the file's ending; raise `UsageError` where it is unknown, or the two differ."""
    endings = [name for name, suffix in SUFFIXES.items() if file and file.name.endswith(suffix)]
    chosen = format or max(endings, key=lambda name: len(SUFFIXES[name]), default=None)  # .int8.onnx before .onnx
    if chosen is None:
        raise UsageError(f"no format: give --format {' or '.join(SUFFIXES)}, or a file that ends accordingly")
    if chosen not in SUFFIXES:
        raise UsageError(f"unknown format {format!r}: choose from {', '.join(SUFFIXES)}")
    suffix = "." + SUFFIXES[chosen].rpartition(".")[2]
    if file is not None and file.suffix != suffix:
        raise UsageError(f"{file}: the name of a file in {chosen} must end in {suffix}")
    return chosen


def export_predictor(
    run: RunFolder,
    predictor: str | None = None,
    file: Path | None = None,
    format: str | None = None,
    which: str = "last",
    data_dir: str | None = None,
    skip_bad: bool = False,
    max_accuracy_loss: float = MAX_ACCURACY_LOSS,
    float_file: Path | None = None,
) -> Exported:
    """Write a predictor of a run, load the file again and compare the two on the run's test images.

    safetensors: the plain network's weights, for `codistill predict` and `torch`; takes normalised images. The others:
    the computation as a whole, normalisation included; takes uint8 [batch, 3, height, width]. onnx-int8 is quantised on
    training images, and its top-1 error on all test images is compared with that of the float32 file.

    Args:
        run: A run with a checkpoint.
        predictor: `student0`, .., `ensemble` or `fused`; None: the best student.
        file: Where to write; None: RUN/exports/<predictor> with the format's ending.
        format: safetensors, onnx, onnx-int8 or torch-export; None: by the ending of the file.
        which: The `last` or the `best` checkpoint.
        data_dir: Where the data set is now, if not where it was in training.
        skip_bad: Whether a folder's images that cannot be read are left out, where the training had none.
        max_accuracy_loss: Points of top-1 accuracy that onnx-int8 may lose on the test images.
        float_file: Where to keep the float32 ONNX file, too, that onnx-int8 is made of; None: it is not kept.

    Raises:
        UsageError: Unknown predictor or format, an optional package is missing, or the loss is more than allowed.
        DataError: The data set to compare on is not there, or is another one.
        CheckpointError: The file does not answer as the run does; it was removed.
    """
    format = choose_format(file, format)
    refuse_accuracy_loss(max_accuracy_loss)
    name, module = run_predictor(run, predictor, which)
    path = run.path / "exports" / f"{name}{SUFFIXES[format]}" if file is None else file
    if format == "safetensors" and run.unbuildable:
        raise UsageError(f"safetensors holds weights alone, and {run.unbuildable}: export to onnx")
    card = make_card(run, name)
    data = run.load_data(data_dir, skip_bad)
    try:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder: choose another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path, path.suffix) as temporary:
            WRITERS["onnx" if format == "onnx-int8" else format](module, card, temporary)
            if format == "torch-export":  # such a file can run code when it is loaded: no other than this one ever is
                loaded = Classifier(card, torch.export.load(io.BytesIO(temporary.read_bytes())).module())
            else:
                loaded = load_classifier(temporary)
            done = Exported(path, name, parameter_count(module), **compare(from_module(card, module), loaded, data))
            unlike = round((1 - done.agreement) * done.images)
            if not done.difference <= done.allowed or unlike > max(1, done.images // 1000):
                raise CheckpointError(
                    f"{path}: not kept, for it differs from the run by up to {done.difference:.3g} in a logit and "
                    f"agrees on {100 * done.agreement:.2f} % of {done.images} images"
                )
            if format == "onnx-int8":
                if float_file is not None:
                    write_atomically(float_file, temporary.read_bytes())
                done = quantised(done, temporary, card, data, max_accuracy_loss)
    except OSError as error:
        raise system_error(error, fix="choose another file") from None
    return done


def quantised(done: Exported, file: Path, card: dict[str, Any], data: Dataset, allowed: float) -> Exported:
    """Put int8 in the place of a float32 ONNX file, unless that costs more points of accuracy than allowed."""
    before, small = file.read_bytes(), calibration_images(data.train.images)
    floating = load_classifier(file)
    quantise(file, {**card, "int8": {"calibration_images": len(small)}}, small, file)
    int8 = load_classifier(file)
    # Its batches of 1, 2 and 7 must answer like a large one: logits of int8 do not depend on what is beside them.
    found = compare(int8, int8, data)
    if not found["difference"] <= found["allowed"]:
        raise CheckpointError(f"{done.path}: not kept, for int8 answers batches of 1, 2 or 7 unlike large ones")
    compared = compare(floating, int8, data)
    named = [each.logits(data.test.images).argmax(dim=1).numpy() for each in (floating, int8)]
    errors = [float(100 * (each != data.test.labels).mean()) for each in named]
    loss = errors[1] - errors[0]
    if not loss <= allowed:
        raise UsageError(
            f"{done.path}: not written: in int8 the error is {errors[1]:.2f} % of {len(data.test)} test images, in "
            f"float32 {errors[0]:.2f} %: {loss:.2f} points of accuracy lost, and --max-accuracy-loss is {allowed:g}: "
            "export another predictor, or to onnx"
        )
    sizes, pace = (len(before), file.stat().st_size), onnx_pace([before, file.read_bytes()], card)
    changes = Quantised(len(data.test), (errors[0], errors[1]), (pace[0], pace[1]), sizes, len(small))
    return Exported(done.path, done.predictor, done.parameters, **compared, quantised=changes)


def compare(reference: Classifier, loaded: Classifier, data: Dataset) -> dict[str, Any]:
    """Compare two classifiers on test images, and return what `Exported` says of it.

    `loaded` answers in batches of 1, 2 and 7 images, too.
    """
    images = data.test.images[:COMPARED_IMAGES]
    wanted, got = reference.logits(images), loaded.logits(images)
    difference = float((wanted - got).abs().max())
    for batch in COMPARED_BATCHES:
        places = np.arange(batch) % len(images)
        few = loaded.logits(images[places], batch)
        # `max` would drop NaN.
        difference = float(torch.tensor([difference, float((few - wanted[places]).abs().max())]).max())
    return {
        "images": len(images),
        "difference": difference,
        "allowed": ALLOWED_DIFFERENCE * max(1.0, float(wanted.abs().max())),
        "agreement": float((wanted.argmax(dim=1) == got.argmax(dim=1)).double().mean()),
    }
