"""Export of one predictor to one file, compared with the run before it is kept."""

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from codistill.core.errors import CheckpointError, UsageError
from codistill.core.extras import install
from codistill.core.files import replaced, system_error
from codistill.data.dataset import Dataset
from codistill.deploy.classifier import (
    CARD_KEY,
    Classifier,
    from_module,
    load_classifier,
    make_card,
    on_pixels,
    run_predictor,
)
from codistill.networks.network import parameter_count
from codistill.networks.probe import in_words
from codistill.runs.folder import RunFolder
from codistill.runs.state import tensors_once

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
COMPARED_IMAGES = 1000
ALLOWED_DIFFERENCE = 1e-3
"""Of logits, relative to the largest one: float32 sums in another order stay far below it."""


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


def choose_format(file: Path | None, format: str | None) -> str:
    """Return the format by its name or the file's ending; raise `UsageError` where it is unknown, or the two differ."""
    chosen = format or next((name for name, suffix in SUFFIXES.items() if file and file.suffix == suffix), None)
    if chosen is None:
        raise UsageError(f"no format: give --format {' or '.join(SUFFIXES)}, or a file that ends accordingly")
    if chosen not in SUFFIXES:
        raise UsageError(f"unknown format {format!r}: choose from {', '.join(SUFFIXES)}")
    if file is not None and file.suffix != SUFFIXES[chosen]:
        raise UsageError(f"{file}: a {chosen} file must end in {SUFFIXES[chosen]}")
    return chosen


def export_predictor(
    run: RunFolder,
    predictor: str | None = None,
    file: Path | None = None,
    format: str | None = None,
    which: str = "last",
    data_dir: str | None = None,
    skip_bad: bool = False,
) -> Exported:
    """Write a predictor of a run, load the file again and compare the two on the run's test images.

    safetensors: the plain network's weights, for `codistill predict` and `torch`; takes normalised images. onnx and
    torch-export: the computation as a whole, normalisation included; takes uint8 [batch, 3, height, width].

    Args:
        run: A run with a checkpoint.
        predictor: `student0`, .., `ensemble` or `fused`; None: the best student.
        file: Where to write; None: RUN/exports/<predictor> with the format's ending.
        format: safetensors, onnx or torch-export; None: by the ending of the file.
        which: The `last` or the `best` checkpoint.
        data_dir: Where the data set is now, if not where it was in training.
        skip_bad: Whether a folder's images that cannot be read are left out, where the training had none.

    Raises:
        UsageError: Unknown predictor or format, or an optional package is missing.
        DataError: The data set to compare on is not there, or is another one.
        CheckpointError: The file does not answer as the run does; it was removed.
    """
    format = choose_format(file, format)
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
    except OSError as error:
        raise system_error(error, fix="choose another file") from None
    write = {"safetensors": _write_safetensors, "onnx": _write_onnx, "torch-export": _write_torch_export}[format]
    try:
        with replaced(path, path.suffix) as temporary:
            write(module, card, temporary)
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
    except OSError as error:
        raise system_error(error, fix="choose another file") from None
    return done


def compare(reference: Classifier, loaded: Classifier, data: Dataset) -> dict[str, Any]:
    """Compare two classifiers on test images, and return what `Exported` says of it."""
    images = data.test.images[:COMPARED_IMAGES]
    wanted, got = reference.logits(images), loaded.logits(images)
    return {
        "images": len(images),
        "difference": float((wanted - got).abs().max()),
        "allowed": ALLOWED_DIFFERENCE * max(1.0, float(wanted.abs().max())),
        "agreement": float((wanted.argmax(dim=1) == got.argmax(dim=1)).double().mean()),
    }


def _write_safetensors(module: nn.Module, card: dict[str, Any], path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in tensors_once(module).items()}
    # save_file would make a file that only its owner may read.
    path.write_bytes(safetensors.torch.save(weights, metadata={CARD_KEY: json.dumps(card)}))


def _traced(module: nn.Module, card: dict[str, Any]) -> torch.export.ExportedProgram:
    """Trace the map from pixels to logits, for batches of any size."""
    example = torch.zeros(2, 3, *card["image_size"], dtype=torch.uint8)
    batches = ({0: torch.export.Dim("batch")},)
    with quiet("torch"):
        try:
            return torch.export.export(on_pixels(module, card), (example,), dynamic_shapes=batches)
        except Exception as error:  # a type of its own for each thing that it cannot trace
            words = "torch.export cannot trace this predictor (a branch on values, TorchScript, a fixed batch size?)"
            raise UsageError(f"{words}: {in_words(error)}") from error


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Keep what a library logs, warns of and prints to itself until this context ends."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write_onnx(module: nn.Module, card: dict[str, Any], path: Path) -> None:
    packages = ("onnx", "onnxscript", "onnxruntime")
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(f"export to onnx needs the package {package}: {install(*packages)}") from None
    with quiet("torch.onnx"):
        program = torch.onnx.export(
            _traced(module, card), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
        )
    assert program is not None
    program.model.metadata_props[CARD_KEY] = json.dumps(card)
    program.save(str(path))


def _write_torch_export(module: nn.Module, card: dict[str, Any], path: Path) -> None:
    # torch's own writer answers a full disk with an error that does not say so.
    content = io.BytesIO()
    torch.export.save(_traced(module, card), content, extra_files={f"{CARD_KEY}.json": json.dumps(card)})
    path.write_bytes(content.getvalue())
