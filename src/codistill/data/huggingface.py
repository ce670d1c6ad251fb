"""A folder that `save_to_disk` of Hugging Face's datasets wrote: a Dataset, or a DatasetDict of splits."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codistill.core.errors import DataError, UsageError
from codistill.core.extras import lacks
from codistill.data.dataset import DATASETS, Dataset
from codistill.data.images import Interpolation
from codistill.data.listing import PARTS, Listed, Part, Reading, Resize, in_order, part_called, read_listed
from codistill.data.untrusted import reading

FIX = "give a folder that save_to_disk of Hugging Face's datasets wrote, with a column of images and one of classes"
MARKS = ("dataset_dict.json", "state.json")  # of a DatasetDict, and of a Dataset


@DATASETS.register("huggingface")
def huggingface(
    root: Path,
    image: str = "",
    label: str = "",
    resize: Resize = 0,
    interpolation: Interpolation = "bilinear",
    skip_bad: bool = False,
    test: Part = None,
    split_seed: int = 0,
) -> Dataset:
    """Load a folder that `save_to_disk` of Hugging Face's datasets wrote.

    Splits of a DatasetDict are called train, validation (val, valid, dev) and test, as in `folder`; of a Dataset, or
    without the latter two, a part of the images is drawn for testing. Needs the package datasets; the network is not
    used.

    Args:
        root: The folder.
        image: Column of images. Empty: the only one.
        label: Column of classes: a ClassLabel, or texts or whole numbers, which become classes in sorted order. Empty:
            the only ClassLabel, or a column called label.
        resize: See `folder`.
        interpolation: How images are scaled.
        skip_bad: Whether to leave out rows that cannot be used, with a line that counts and names them.
        test: Number of images to draw for testing, or a percentage of all, where none are set apart. None: 20%.
        split_seed: Seed of that draw.

    Raises:
        DataError: Not such a folder, or a damaged one; a column is missing; splits have other names or other columns;
            or, all in one line, images that are damaged, without a class, or of another size where resize is 0.
        ResourceError: The images do not fit into memory.
        UsageError: datasets is not installed, an option has no meaning, or test is set where there are test images.
    """
    options = Reading(
        name="huggingface",
        resize=resize,
        interpolation=interpolation,
        skip_bad=skip_bad,
        test=test,
        split_seed=split_seed,
    )
    splits = _splits(root)
    features = splits["train"].features
    columns = _column(root, "image", image, features), _column(root, "label", label, features)
    bad: dict[str, str] = {}
    read = {part: _read(root, part, split, columns) for part, split in splits.items()}
    names = getattr(features[columns[1]], "names", None)
    found = {text for text in read["train"][1] if text}
    class_names: Sequence[str] = in_order(found) if names is None else [str(each) for each in names]
    numbers = {name: index for index, name in enumerate(class_names)}
    parts = {}
    for part, (listed, texts) in read.items():
        for name, text in zip(listed.names, texts, strict=True):
            if text not in numbers:
                what = f"its class {text!r} has no training images" if text else "has no class"
                bad[name] = f"{root}: {name}: {what}: leave it out"
        kept = np.array([place for place, text in enumerate(texts) if text in numbers], np.int64)
        labels = np.array([numbers.get(text, 0) for text in texts], np.int64)
        parts[part] = Listed(listed.names, labels, listed.read, listed.version).subset(kept)
    return read_listed(root, parts, class_names, bad, options, lambda part, name: f"{root}: {name!r} in {part}", FIX)


def _splits(root: Path) -> dict[str, Any]:
    """Return the splits that a folder holds, by part."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        lack = lacks("datasets")
        raise UsageError(f"data set huggingface: {lack}") from None
    with reading(root, FIX):
        if not root.exists():
            raise FileNotFoundError
        if not any((root / mark).is_file() for mark in MARKS):
            raise DataError(f"{root}: has neither {' nor '.join(MARKS)}: {FIX}")
        loaded = datasets.load_from_disk(str(root))
    if not isinstance(loaded, dict):
        return {"train": loaded}
    found: dict[str, Any] = {}
    for name, split in loaded.items():
        part = part_called(name)
        if part is None or part in found:
            known = ", ".join(PARTS)
            raise DataError(f"{root}: has the splits {', '.join(loaded)}: keep at most one called as each of {known}")
        found[part] = split
    if "train" not in found:
        raise DataError(f"{root}: has no split train (it has {', '.join(loaded) or 'none'}): {FIX}")
    return {part: found[part] for part in PARTS if part in found}


def _column(root: Path, kind: str, name: str, features: Any) -> str:
    """Return the column of images or classes."""
    wanted = {"image": "Image", "label": "ClassLabel"}[kind]
    found = [each for each, feature in features.items() if type(feature).__name__ == wanted]
    if kind == "label" and not found:
        found = [each for each in features if each == "label"]
    found = [each for each in features if each == name] if name else found
    if len(found) == 1:
        return str(found[0])
    listed = ", ".join(f"{each} ({type(feature).__name__})" for each, feature in features.items())
    lack = f"no column {name!r}" if name else f"{len(found) or 'no'} columns of type {wanted}"
    raise DataError(f"{root}: has {lack} (it has {listed}): name it with --data huggingface:{kind}=COLUMN")


def _read(root: Path, part: str, split: Any, columns: tuple[str, str]) -> tuple[Listed, list[str]]:
    """Return the images of a split with their contents, and the classes as texts; empty: none."""
    datasets, (image, label) = importlib.import_module("datasets"), columns
    if missing := [each for each in columns if each not in split.features]:
        raise DataError(f"{root}: split {part} has no column {missing[0]!r}: {FIX}")
    if type(kind := split.features[image]).__name__ != "Image":
        raise DataError(f"{root}: column {image} holds no images ({kind}): cast it to datasets.Image()")
    names = getattr(split.features[label], "names", None)
    with reading(f"{root}: split {part}", FIX):
        values = list(split[label])
        stored = split.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        files = [Path(each["filename"]).stat() for each in split.cache_files]
    listed = tuple(f"{part}/{position:06}" for position in range(len(values)))

    def content(position: int) -> bytes:
        where = f"{root}: {listed[position]}"
        with reading(where, "save the data set again"):
            found = stored[position][image]
        if not found or not found["bytes"]:
            raise DataError(f"{where}: holds no image: save the data set with its images, or leave it out")
        return bytes(found["bytes"])

    version = f"{split._fingerprint} {image} {[(each.st_size, each.st_mtime_ns) for each in files]}"
    return Listed(listed, np.zeros(len(values), np.int64), content, version), [_text(each, names) for each in values]


def _text(value: Any, names: Sequence[str] | None) -> str:
    """Return the name of a class; empty: it is none."""
    if names is not None:
        return str(names[value]) if isinstance(value, int) and 0 <= value < len(names) else ""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
