"""The formats of exported files: who writes them, and what they are called."""

import contextlib
import importlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from codistill.core.errors import UsageError, in_words
from codistill.core.extras import install
from codistill.data.dataset import Pixels
from codistill.deploy.classifier import CARD_KEY, on_pixels
from codistill.runs.state import tensors_once

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "onnx-int8": ".int8.onnx", "torch-export": ".pt2"}
OPSET = 18
"""Of ONNX: the one that torch's exporter is written for, and that older runtimes and TensorRT read."""
CALIBRATION_IMAGES = 300
CALIBRATION_BATCH = 25

Card = Mapping[str, Any]


def write_safetensors(module: nn.Module, card: Card, path: Path) -> None:
    """Write the weights of a network and, as metadata, its card."""
    weights = {name: tensor.contiguous() for name, tensor in tensors_once(module).items()}
    # save_file would make a file that only its owner may read.
    path.write_bytes(safetensors.torch.save(weights, metadata={CARD_KEY: json.dumps(card)}))


def _traced(module: nn.Module, card: Card) -> torch.export.ExportedProgram:
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
def quiet(name: str | None) -> Iterator[None]:
    """Keep what a library logs, warns of and prints until this context ends; None: one that uses the root logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_onnx(module: nn.Module, card: Card, path: Path) -> None:
    """Write the map from pixels to logits as one ONNX file, its card among the metadata."""
    require_onnx()
    with quiet("torch.onnx"):
        program = torch.onnx.export(
            _traced(module, card),
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # Lines of source code with this machine's paths, larger than a small network.
    program.model.graph.metadata_props.clear()
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props[CARD_KEY] = json.dumps(card)
    program.save(str(path), external_data=False)  # a second file beside it would be lost when the first is copied


def require_onnx() -> None:
    """Raise `UsageError` where a package that writing ONNX needs is not installed."""
    packages = ("onnx", "onnxscript", "onnxruntime")
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(f"export to onnx needs the package {package}: {install(*packages)}") from None


def calibration_images(images: Pixels) -> Pixels:
    """Choose images evenly from the training images, which a folder has in the order of their classes."""
    places = np.linspace(0, len(images) - 1, min(CALIBRATION_IMAGES, len(images))).astype(int)
    chosen: Pixels = images[places]
    return chosen


def quantise(float_file: Path, card: Card, images: Pixels, path: Path) -> None:
    """Write an ONNX file again with weights and activations of 8 bits, as onnxruntime's static quantisation makes it.

    Weights are quantised by output channel, activations by tensor, to signed integers, in the form of pairs of
    QuantizeLinear and DequantizeLinear (QDQ). The range of an activation is that of the calibration images; its zero
    need not be 0, which onnxruntime and OpenVINO take, and TensorRT does not.

    Args:
        float_file: As `write_onnx` wrote it.
        card: Its card.
        images: Calibration images, uint8 [images, height, width, 3].
        path: Where to write.
    """
    require_onnx()
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(range(0, len(planes), CALIBRATION_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            start = next(self.batches, None)
            return None if start is None else {"images": planes[start : start + CALIBRATION_BATCH]}

    with tempfile.TemporaryDirectory() as folder, quiet(None):
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        # The symbolic shape inference fails on attention; that of ONNX itself, which follows, is enough.
        quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantised),
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            # Logits of 256 levels would be equal for many classes.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
        model = onnx.load(str(quantised))
    onnx.helper.set_model_props(model, {CARD_KEY: json.dumps(card)})
    path.write_bytes(model.SerializeToString())


def write_torch_export(module: nn.Module, card: Card, path: Path) -> None:
    """Write the map from pixels to logits as a .pt2 file, its card beside it in the archive."""
    # torch's own writer answers a full disk with an error that does not say so.
    content = io.BytesIO()
    torch.export.save(_traced(module, card), content, extra_files={f"{CARD_KEY}.json": json.dumps(card)})
    path.write_bytes(content.getvalue())


WRITERS: dict[str, Callable[[nn.Module, Card, Path], None]] = {
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "torch-export": write_torch_export,
}
"""Of the formats that a network alone decides; onnx-int8 takes calibration images, too."""
