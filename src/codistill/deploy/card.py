"""A folder that holds a predictor and all that others need to use it: model, card, load.py, picture, recipe."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np

from codistill.core.errors import CodistillError, UsageError
from codistill.core.files import system_error
from codistill.data.dataset import Dataset
from codistill.deploy.classifier import load_classifier, run_predictor
from codistill.deploy.export import MAX_ACCURACY_LOSS, Exported, export_predictor
from codistill.deploy.formats import SUFFIXES
from codistill.evaluation.analysis import (
    Counts,
    balanced_error,
    confusion_matrix,
    largest_confusions,
    row_shares,
    wilson_interval,
)
from codistill.networks.probe import forward_flop
from codistill.runs.choice import ERRORS, epochs_done, prefix_of
from codistill.runs.folder import RunFolder
from codistill.runs.latency import read_latency, rows
from codistill.runs.metadata import split_digests

TEXTS = {
    "model.onnx": "the model in float32, for ONNX Runtime, OpenVINO, TensorRT and others",
    "model.int8.onnx": "the model with weights and activations of 8 bits (QDQ)",
    "model.safetensors": "the weights alone, for `codistill predict` and PyTorch",
    "model.pt2": "the model as `torch.export.load` reads it; only load such a file if you trust its source",
    "load.py": "classifies images with onnxruntime, numpy and Pillow",
    "confusion.png": "the confusion matrix of the test images",
    "recipe.json": "every setting of the training",
}
NAMED_CLASSES, NAME_LENGTH = 30, 32  # that a picture has room to name, and of which length
LICENCE = "unknown"


def is_folder(out: str) -> bool:
    """Whether a place for an export is a folder: it ends in a slash, has no ending, or is one without a file's name."""
    named = out.endswith(tuple(SUFFIXES.values()))
    return out.endswith(("/", os.sep)) or not Path(out).suffix or (Path(out).is_dir() and not named)


def export_folder(
    run: RunFolder,
    folder: Path,
    predictor: str | None = None,
    format: str | None = None,
    which: str = "last",
    data_dir: str | None = None,
    skip_bad: bool = False,
    max_accuracy_loss: float = MAX_ACCURACY_LOSS,
    licence: str = LICENCE,
) -> list[Exported]:
    """Write model.onnx, README.md (the model card), load.py, confusion.png and recipe.json into a new folder.

    With another format than onnx, the model is there in that one, too. Each is compared as by `export_predictor`. The
    folder is there whole, or not at all.

    Args:
        run: A run with a checkpoint.
        folder: Where; it must not exist, or be empty.
        predictor: As for `export_predictor`, as are those that are not named here.
        format: None: onnx alone.
        which: The `last` or the `best` checkpoint.
        data_dir: Where the data set is now.
        skip_bad: Whether bad images are left out.
        max_accuracy_loss: Points that int8 may lose.
        licence: An identifier, as of SPDX, for the card.

    Returns:
        What was written and compared, one entry a model file, onnx first.
    """
    format = format or "onnx"
    if format not in SUFFIXES:
        raise UsageError(f"unknown format {format!r}: choose from {', '.join(SUFFIXES)}")
    refuse_licence(licence)
    refuse_taken(folder)
    name, module = run_predictor(run, predictor, which)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        export = functools.partial(export_predictor, run, name, which=which, data_dir=data_dir, skip_bad=skip_bad)
        plain, other = temporary / "model.onnx", temporary / f"model{SUFFIXES[format]}"
        if format == "onnx-int8":
            done = [export(other, format, max_accuracy_loss=max_accuracy_loss, float_file=plain)]
        else:
            done = [export(file, kind) for kind, file in {"onnx": plain, format: other}.items()]
        data = run.load_data(data_dir, skip_bad)
        flops = forward_flop(module, run.image_size)
        _write_others(temporary, run, data, done, which, licence, flops)
        os.replace(temporary, folder)
    except OSError as error:
        raise system_error(error, folder, fix="choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [dataclasses.replace(each, path=folder / each.path.name) for each in done]


def refuse_licence(licence: str) -> None:
    """Raise `UsageError` where a licence is no identifier."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise UsageError(f"--license {licence!r}: name an identifier, such as apache-2.0 or cc-by-4.0")


def refuse_taken(folder: Path) -> None:
    """Raise `UsageError` where a folder for an export is not empty, or is no folder."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise system_error(error, folder, fix="choose another folder") from None
    if folder.absolute() == Path.cwd():  # the folder takes the place of an empty one
        raise UsageError(f"{folder} is the folder that you are in: name a new one, such as --out model/")
    if taken:
        raise UsageError(f"{folder} is not an empty folder: choose another --out; nothing was overwritten")


def _write_others(
    folder: Path, run: RunFolder, data: Dataset, done: list[Exported], which: str, licence: str, flops: int
) -> None:
    """Write all but the models into a folder that has them."""
    import jinja2

    classifier = load_classifier(folder / "model.onnx")
    named = classifier.logits(data.test.images).argmax(dim=1).numpy()
    matrix = confusion_matrix(data.test.labels, named, data.num_classes)
    draw_confusion(matrix, data.class_names, folder / "confusion.png")
    shutil.copyfile(str(package_files("codistill.deploy") / "load.txt"), folder / "load.py")
    recipe = {key: value for key, value in run.metadata.items() if key != "data_dir"}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("codistill.deploy", ""),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    there = {name: text for name, text in TEXTS.items() if (folder / name).exists()}
    card = dict(classifier.card)
    int8 = next((each for each in done if each.quantised), None)
    page = environment.get_template("card.md").render(
        license=licence,
        method=card["method"]["name"],
        predictor=card["predictor"],
        networks=card["networks"],
        data=card["trained_on"],
        class_names=[" ".join(each.split()) for each in data.class_names],
        image_size=card["image_size"],
        mean=card["mean"],
        std=card["std"],
        environment=card["environment"],
        parameters=done[0].parameters,
        flops=flops,
        files=there,
        preprocessing=preprocessing_steps(card),
        protocol=protocol(run, which, data),
        errors=error_rows(run, which, done[0].predictor, matrix),
        balanced=balanced_error(matrix),
        confusions=[
            f"{data.class_names[each.label]} taken for {data.class_names[each.named]} ({each.images} images)"
            for each in largest_confusions(matrix, 5)
        ],
        int8=int8_words(int8) if int8 else "",
        **latency_words(run, done[0].predictor),
        training=training_words(run),
    )
    (folder / "README.md").write_text(page, encoding="utf-8", errors="backslashreplace")


def preprocessing_steps(card: dict[str, Any]) -> list[str]:
    """Return what is done to an image file before the model gets it, as steps."""
    height, width = card["image_size"]
    facts = card["preprocessing"]
    return [
        "Turn the picture as its EXIF orientation says; put a transparent one on white; make it RGB of 8 bits.",
        f"Scale it, keeping its aspect ratio, until it covers {width}x{height} pixels (width x height): "
        f"{facts['interpolation']} interpolation with antialiasing, as Pillow's `ImageOps.fit` does.",
        f"Crop the centre of {width}x{height} pixels.",
        "Put the axes in the order channel, height, width; keep uint8 values, 0 to 255.",
    ]


def protocol(run: RunFolder, which: str, data: Dataset) -> str:
    """Return how errors were measured: which images, which epoch, and what was chosen on them."""
    if not run.finished:
        return f"The training did not finish; {which} checkpoint, images of the test split, each once, uncropped."
    summary = run.summary
    epoch = summary["best_epoch"] if which == "best" else epochs_done(summary)
    chosen = summary["chosen_by"]
    words = f"Weights of epoch {epoch} of {summary['epochs']}, seed {summary['seed']}; one view of each image."
    if which == "best":
        words += f" The epoch was chosen by the lowest {chosen} error of a student."
    if chosen == "test":
        return words + " No images were held out: what was chosen was chosen on these test images, which flatters it."
    held = f"{summary['validation_images']} validation images"
    words += f" Choices were made on {held}; the test images were not looked at for them."
    recorded = run.metadata["dataset"].get("sha256", {})
    same = all(recorded.get(key, digest) == digest for key, digest in split_digests("test", data.test).items())
    return words if same else words + " **These test images are not those of the training (SHA-256).**"


def error_rows(run: RunFolder, which: str, predictor: str, matrix: Counts) -> list[dict[str, Any]]:
    """Return a row for each split: the exported file on the test images, the run on validation images."""

    def row(what: str, wrong: int, images: int) -> dict[str, Any]:
        low, high = wilson_interval(wrong, images)
        return {"what": what, "images": images, "error": 100 * wrong / images, "low": low, "high": high}

    images = int(matrix.sum())
    found = [row("test images, by model.onnx", images - int(matrix.diagonal().sum()), images)]
    prefix = prefix_of(which)
    errors = run.summary.get(prefix + ERRORS["validation"], {}) if run.finished else {}
    if predictor in errors:
        held = int(run.summary["validation_images"])
        found.append(row("validation images, in the training", round(errors[predictor] * held / 100), held))
    return found


def int8_words(done: Exported) -> str:
    """Return what int8 changes."""
    int8 = done.quantised
    assert int8 is not None
    return (
        f"`model.int8.onnx` was quantised statically, weights by channel, with the ranges of {int8.calibration_images} "
        f"training images. Top-1 error on all {int8.images} test images: {int8.error[0]:.2f} % before, "
        f"{int8.error[1]:.2f} % after. One image with one thread: {int8.milliseconds[0]:.3g} ms before, "
        f"{int8.milliseconds[1]:.3g} ms after, on the CPU that wrote this; on CPUs without instructions for 8 bits "
        f"(VNNI, dot product) int8 can be slower. Files: {int8.bytes[0] / 1024:,.0f} KiB before, "
        f"{int8.bytes[1] / 1024:,.0f} KiB after."
    )


def latency_words(run: RunFolder, predictor: str) -> dict[str, str]:
    """Return the measurements of RUN/latency.json of a predictor as a table, and where they were made."""
    found = None
    with contextlib.suppress(CodistillError):  # a damaged file; the card does without
        found = read_latency(run)
    if found is None or predictor not in found.predictors:
        return {"latency": "", "machine": ""}
    headings, *cells = rows(found, {}, [predictor])
    table = [headings, ["---"] * len(headings), *cells]
    gpu = f" and {found.machine['gpu']}" if found.machine.get("gpu") else ""
    machine = f"{found.machine['cpu']} ({found.machine['cores']} cores){gpu}"
    return {"latency": "\n".join(f"| {' | '.join(line)} |" for line in table), "machine": machine}


def training_words(run: RunFolder) -> str:
    """Return in a paragraph what was trained on what."""
    data, config = run.metadata["dataset"], run.config.train
    epochs = epochs_done(run.summary) if run.finished else config.epochs
    networks, images = len(run.metadata["networks"]), int(data["train_images"])
    images = config.train_limit or images - config.held_out(images)
    together = f"{networks} networks trained together" if networks > 1 else "One network trained"
    return (
        f"{together} with {run.metadata['method']['name']} on {images} training images of {data['name']}, "
        f"{epochs} epochs, batches of {config.batch_size}, seed {config.seed}; "
        f"torch {run.metadata['environment']['torch']}."
    )


def draw_confusion(matrix: Counts, names: tuple[str, ...], file: Path) -> None:
    """Draw a confusion matrix, each row as shares of its label's images, as a PNG file."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font

    shares = row_shares(matrix)
    few = len(names) <= NAMED_CLASSES
    short = [each if len(each) <= NAME_LENGTH else f"{each[: NAME_LENGTH - 2]}.." for each in names]
    side = min(12.0, 2.7 + 0.08 * max(map(len, short)) + 0.3 * len(names)) if few else 8.0
    with matplotlib.style.context("default"):  # whatever the user's own is
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        drawn = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(drawn, ax=axes, label="% of the label's images", shrink=0.8)
        axes.set(xlabel="answered", ylabel="label")
        if few:
            font = get_font(findfont(FontProperties()))
            known = [all(font.get_char_index(ord(letter)) for letter in each) for each in short]
            shown = [each.replace("$", r"\$") if known[place] else f"class {place}" for place, each in enumerate(short)]
            axes.set_xticks(range(len(names)), shown, rotation=90)
            axes.set_yticks(range(len(names)), shown)
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
        figure.savefig(file, dpi=120)
