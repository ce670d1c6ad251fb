"""A trained predictor, loaded from a run folder or an exported file, that maps pixels to logits."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from codistill.core.errors import CheckpointError, CodistillError, UsageError, typed_reason
from codistill.core.extras import lacks
from codistill.core.files import system_error
from codistill.core.imports import trained_with
from codistill.core.kinds import shown
from codistill.data.affine import Affine, usable
from codistill.data.dataset import Pixels
from codistill.data.images import Interpolation, preprocessing
from codistill.data.mapped import pieces
from codistill.evaluation.evaluation import batch_for
from codistill.evaluation.metrics import AVERAGED
from codistill.runs.folder import RunFolder
from codistill.runs.state import load_weights
from codistill.settings.build import build_method, unbuildable
from codistill.settings.mapping import run_from_mapping

CARD_KEY = "codistill"
CARD_FORMAT = 1


def scaling(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return how images become the size of a model, from its card or the facts of a data set in config.json.

    Those of older versions record nothing: they are of the default.
    """
    return preprocessing("bilinear") | dict(facts.get("preprocessing", {}))


def on_pixels(module: nn.Module, card: Mapping[str, Any]) -> nn.Module:
    """Put a network's normalisation in front of it, in evaluation mode: it maps RGB pixels, 0 to 255, to logits."""
    return nn.Sequential(Affine.normalise((card["mean"], card["std"])), module).eval()


@dataclass(frozen=True)
class Classifier:
    """A predictor that is ready to use.

    Attributes:
        card: Facts about it: predictor, method, networks, class_names, image_size, mean, std.
        compute: Maps uint8 [batch, 3, height, width] to logits.
    """

    card: Mapping[str, Any]
    compute: Callable[[UInt8[Tensor, "batch 3 height width"]], Float[Tensor, "batch class"]]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.card["class_names"])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it was trained on, pixels."""
        height, width = self.card["image_size"]
        return int(height), int(width)

    @property
    def interpolation(self) -> Interpolation:
        """How images of other sizes are scaled."""
        return cast(Interpolation, scaling(self.card)["interpolation"])

    def logits(self, images: Pixels, batch_size: int = 250) -> Float[Tensor, "images class"]:
        """Compute the logits of RGB images, uint8 [images, height, width, 3].

        At most `batch_size` are computed, and read from the file of mapped ones, at a time; above 64x64 pixels fewer.
        """
        found = []
        with torch.no_grad():
            for part in pieces(images, batch_for(images.shape[1:3], batch_size)):
                found.append(self.compute(torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2)))))
        return torch.cat(found)


def make_card(run: RunFolder, predictor: str) -> dict[str, Any]:
    """Return the card of an exported file: what it holds, and what images it takes."""
    data = run.metadata["dataset"]
    return {
        "format": CARD_FORMAT,
        "predictor": predictor,
        **{key: run.metadata[key] for key in ("method", "networks", "environment")},
        **{key: data[key] for key in ("class_names", "image_size", "mean", "std")},
        "preprocessing": scaling(data),
        "trained_on": data["name"],
        **{key: run.metadata[key] for key in ("imports",) if key in run.metadata},
    }


def from_module(card: Mapping[str, Any], module: nn.Module) -> Classifier:
    """Make a classifier of a network that takes normalised images, on the CPU."""
    return Classifier(card, on_pixels(module, card).cpu())


def run_predictor(run: RunFolder, predictor: str | None = None, which: str = "last") -> tuple[str, nn.Module]:
    """Load a predictor of a run, with its name; None: the best student. Raise `UsageError` where the run lacks it."""
    predictors = run.predictors(which)
    name = run.best_student(which) if predictor is None else predictor
    if name not in predictors:
        raise UsageError(f"{run.path} has no predictor {name!r}: choose from {', '.join(predictors)}")
    return name, predictors[name].eval()


def load_classifier(path: str | Path, predictor: str | None = None) -> Classifier:
    """Load a run folder, a .safetensors or an .onnx file that `codistill export` wrote.

    Args:
        path: The folder or file.
        predictor: Which predictor of a run; None: its best student. A file holds one, and only that is in it.

    Raises:
        CheckpointError: Missing, damaged, or not written by codistill.
        UsageError: A predictor that the run or file does not have, or a kind of file that is not read.
    """
    path = Path(path)
    if path.is_dir() and (models := sorted(path.glob("model.*onnx"))) and not (path / "config.json").exists():
        raise UsageError(f"{path}: is a folder that export wrote: name the file in it, {' or '.join(map(str, models))}")
    if path.is_dir() or path.suffix == ".safetensors" or not path.exists():
        return _of(path, predictor, from_module(*load_predictor(path, predictor)))
    if path.suffix != ".onnx":
        reason = " (a .pt2 file can run code when it is loaded)" if path.suffix == ".pt2" else ""
        raise UsageError(f"{path}: not a kind of file that is read here{reason}: give .safetensors, .onnx or a run")
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise UsageError(f"{path}: {lacks('onnxruntime')}") from None
    with _damage(path):
        session = onnx_session(path.read_bytes())
        card = _card(session.get_modelmeta().custom_metadata_map.get(CARD_KEY), path)

    def compute(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return _of(path, predictor, Classifier(card, compute))


def onnx_session(content: bytes, threads: int = 0, provider: str = "CPUExecutionProvider") -> Any:
    """Return an ONNX file in ONNX Runtime, with so many CPU threads; 0: one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(content, options, providers=[provider])


def _of(path: Path, predictor: str | None, classifier: Classifier) -> Classifier:
    """Return a classifier; a `UsageError` where it is another predictor than the one that was asked for."""
    if predictor not in (None, found := classifier.card["predictor"]):
        raise UsageError(f"{path}: holds {found}, not {predictor}: leave --predictor out, or name the run folder")
    return classifier


def load_predictor(path: Path, predictor: str | None = None) -> tuple[dict[str, Any], nn.Module]:
    """Load a run folder or a .safetensors file, as a card and a network; see `load_classifier`."""
    if path.is_dir():
        run = RunFolder(path)
        name, module = run_predictor(run, predictor)
        return make_card(run, name), module
    with _damage(path):
        # Read here: safetensors does not say why a file cannot be opened, and takes no path that is no UTF-8.
        content = path.read_bytes()
        weights = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        card = _card(header.get("__metadata__", {}).get(CARD_KEY), path)
        if why := unbuildable(str(card["method"]["name"]), card["networks"]):
            raise CheckpointError(f"{path}: {why}: import the module that registers it: {trained_with(card)}")
        config = run_from_mapping({key: card[key] for key in ("method", "networks")}, lambda key: str(path))
        height, width = card["image_size"]
        what = f"{path}: {card['predictor']}"

        def build() -> nn.Module:
            built = build_method(config, len(card["class_names"]), (height, width)).predictors()
            return built[card["predictor"].removesuffix(AVERAGED)]

        # Whether they fit, before memory is taken for a network that the file may claim; own ones may need values.
        with contextlib.suppress(RuntimeError, UsageError), torch.device("meta"):
            load_weights(build(), weights, what)
        module = build()
        load_weights(module, weights, what)
        return card, module


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Make one `CheckpointError` of whatever reading a hostile or damaged file raises."""
    try:
        yield
    except UsageError as error:
        raise CheckpointError(f"{path}: its settings are not those of this version of codistill: {error}") from None
    except CodistillError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such run folder or model file") from None
    except OSError as error:
        raise system_error(error, path, CheckpointError) from None
    except Exception as error:  # each library raises types of its own
        raise CheckpointError(f"{path}: damaged, or not written by codistill: {typed_reason(error)}") from error


def _card(text: str | None, path: Path) -> dict[str, Any]:
    if text is None:
        raise CheckpointError(f"{path}: holds no classes and no normalisation: not written by codistill export")
    card: dict[str, Any] = json.loads(text)
    if card["format"] != CARD_FORMAT:
        raise CheckpointError(f"{path}: of format {card['format']}, but this version reads format {CARD_FORMAT}")
    if not usable((card["mean"], card["std"])):
        raise CheckpointError(f"{path}: damaged: normalises by mean {card['mean']} and std {card['std']}")
    if (found := scaling(card)["interpolation"]) not in get_args(Interpolation):
        raise CheckpointError(f"{path}: scales images by {shown(found)}, which this version does not know")
    return card
