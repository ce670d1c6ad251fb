"""Which data set a run had, in whatever file, and the part of one that a protocol takes."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codistill.core.errors import UsageError
from codistill.core.files import replaced, system_error
from codistill.data import Dataset, Split, dataset
from codistill.runs.metadata import data_digests
from codistill.sweeps.reproduce.cells import Cell, Protocol, rules

HARMLESS = ("download=", "url=")
"""Options of a data set that change none of its images."""


def data_name(name: str, digests: Mapping[str, str]) -> str:
    """Return what a data set is: the name of a known one, by its loader or by the SHA-256 of its arrays."""
    for known, facts in rules()["data"].items():
        if facts["sha256"].items() <= digests.items():
            return str(known)
    base, _, options = name.partition(":")
    kept = [each for each in options.split(",") if each and not each.startswith(HARMLESS)]
    return ":".join([base, ",".join(kept)] if kept else [base])


def located(
    cells: Sequence[Cell], protocol: Protocol, data: str | None, data_dir: str | None, out: Path
) -> tuple[list[Cell], dict[str, Any]]:
    """Return the cells that can be trained on a data set, and the settings that name it.

    Args:
        cells: The cells that are wanted.
        protocol: Of a part of a data set, that part is written into `out`, unless the data set is the part already.
        data: The data set in another form, as packed; None: that of each cell.
        data_dir: Where it is.
        out: A folder.

    Raises:
        UsageError: It is the data set of no cell.
    """
    subset = protocol.subset
    if data is None and not subset:
        return list(cells), {} if data_dir is None else {"data_dir": data_dir}
    found = dataset(data or rules()["data"][subset]["of"], data_dir)
    name = data_name(data or found.name, data_digests(found))
    if subset and name == rules()["data"][subset]["of"]:
        data, data_dir, name = "packed", str(write_subset(found, subset, out / f"{subset}.npz").absolute()), subset
    kept = [cell for cell in cells if cell.settings["data"] == name]
    if not kept:
        wanted = " or ".join(dict.fromkeys(str(cell.settings["data"]) for cell in cells))
        raise UsageError(f"data set {name}: the cells are of {wanted}: name other cells, or another --data")
    return kept, {"data": data} if data_dir is None else {"data": data, "data_dir": data_dir}


def write_subset(data: Dataset, name: str, file: Path) -> Path:
    """Write the part of a data set as one .npz file, unless it is there: the same whatever the order of the images."""
    if file.exists():
        return file
    train, test = by_content(data.train), by_content(data.test)
    each = rules()["data"][name]["each"]
    first = [np.flatnonzero(train.labels == label)[:each] for label in range(len(data.class_names))]
    chosen = np.sort(np.concatenate(first))
    arrays: dict[str, Any] = {"train_images": train.images[chosen], "train_labels": train.labels[chosen]}
    arrays |= {"test_images": test.images, "test_labels": test.labels, "class_names": np.array(data.class_names)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file, ".npz") as temporary:
            np.savez(temporary, **arrays)
    except OSError as error:
        raise system_error(error, file, fix="choose another --out") from None
    return file


def by_content(split: Split) -> Split:
    """Return images in the order of the SHA-256 of their pixels, those of equal pixels by label."""
    digests = [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in split.images]
    order = sorted(range(len(digests)), key=lambda index: (digests[index], split.labels[index]))
    return Split(split.images[order], split.labels[order])
