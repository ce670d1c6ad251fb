"""Lists of images in a run folder.

images.csv has the files with class and split, as `--data table` reads them; duplicates.csv has the images that are in
two splits, or twice in one with two labels.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from codistill.core.files import write_atomically
from codistill.data.dataset import Dataset, Split
from codistill.data.duplicates import Duplicate, named

NAME, DUPLICATES = "images.csv", "duplicates.csv"
NAMED = 3  # files in a line


def write_images(folder: Path, data: Dataset, training: Iterable[int] | None, held_out: Iterable[int] | None) -> None:
    """Write images.csv into a run folder that has none yet, if the images are files.

    Args:
        folder: The run folder.
        data: The data set.
        training: Positions of the training images that are used; None: all.
        held_out: Positions of those that are held out for validation; None: none.
    """
    if not data.train.files or (folder / NAME).exists():
        return
    used = [("train", data.train, training)]
    if held_out is not None:
        used.append(("validation", data.train, held_out))
    used += [(name, split, None) for name, split in data.splits.items() if name != "train"]
    rows = [row for name, split, positions in used for row in _rows(data, name, split, positions)]
    write_table(folder / NAME, ("file", "class", "split"), rows)


def write_duplicates(folder: Path, data: Dataset, found: Sequence[Duplicate]) -> None:
    """Write duplicates.csv into a run folder, if there are any: a row for each pair of images."""
    header = ("kind", "split", "file", "class", "other split", "other file", "other class")
    if found:
        rows = ((each.kind, *_image(data, *each.split), *_image(data, *each.other)) for each in found)
        write_table(folder / DUPLICATES, header, rows)


def _image(data: Dataset, split: str, position: int) -> tuple[str, str, str]:
    labels = (data.validation or data.train if split == "validation" else data.splits[split]).labels
    return split, named(data, split, position), data.class_names[labels[position]]


def write_table(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Write a CSV file, whole or not at all; names that are no UTF-8 keep their bytes."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_images(folder: Path) -> dict[str, str]:
    """Return the files that images.csv of a run names, each with its split; none where it is absent or damaged."""
    try:
        with open(folder / NAME, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return {row[0]: row[2] for row in list(csv.reader(file))[1:]}
    except (OSError, csv.Error, IndexError):
        return {}


def changed_files(folder: Path, data: Dataset) -> str:
    """Return in words which files of images.csv of a run a data set lacks, and which it has beside them."""
    listed, there = read_images(folder).keys(), {name for split in data.splits.values() for name in split.files}
    parts = {"missing": sorted(listed - there), "not listed": sorted(there - listed) if listed else []}
    return "; ".join(
        f"{what}: {', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}"
        for what, names in parts.items()
        if names
    )


def _rows(data: Dataset, name: str, split: Split, positions: Iterable[int] | None) -> Iterator[tuple[str, ...]]:
    for position in sorted(range(len(split)) if positions is None else map(int, positions)):
        yield split.files[position], data.class_names[split.labels[position]], name
