"""A table of image files and their classes: CSV, TSV or JSON lines."""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codistill.core.errors import DataError
from codistill.data.dataset import DATASETS, Dataset
from codistill.data.images import SUFFIXES, Interpolation
from codistill.data.listing import (
    PARTS,
    Listed,
    Part,
    Reading,
    Resize,
    in_order,
    part_called,
    read_listed,
    refuse_bad,
)
from codistill.data.untrusted import read_file, reading, visible

COLUMNS = {
    "path": ("path", "file", "file_name", "filename", "filepath", "image", "image_path"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "subset", "set"),
}
"""How columns are called, in any case, where no option names them."""
DELIMITED, LINES = (".csv", ".tsv", ".tab"), (".jsonl", ".ndjson")
MAX_TABLE = 1 << 30  # bytes
FIX = "give a .csv or .tsv file with a header, as path,label or path,label,split, or a .jsonl file of such objects"

Record = tuple[int, dict[Any, Any], str]  # line, values by column, and what is wrong with their form


@dataclass(frozen=True)
class Row:
    """What a row of a table says; `fault` is what is wrong with its form."""

    line: int
    path: str
    label: str
    split: str
    fault: str = ""


@DATASETS.register("table")
def table(
    root: Path,
    images: str = "",
    path: str = "",
    label: str = "",
    split: str = "",
    resize: Resize = 0,
    interpolation: Interpolation = "bilinear",
    skip_bad: bool = False,
    test: Part = None,
    split_seed: int = 0,
) -> Dataset:
    """Load the images that a table names: a row for each, with its path, its class and, optionally, its split.

    The table is in UTF-8: CSV (commas or semicolons) or TSV with a header, or a JSON object in each line (.jsonl,
    .ndjson). Columns that are called as in `COLUMNS` are found, others are named. Splits are called train, val (valid,
    validation, dev) and test, as in `folder`; without them a part of the images is drawn for testing. The classes are
    the labels of the training images, sorted: as numbers, if all are.

    Args:
        root: The table, or a folder that holds no other one.
        images: Folder that paths are relative to, and that all images lie in; it is itself relative to that of the
            table. Empty: that of the table.
        path: Column of the paths.
        label: Column of the classes.
        split: Column of the splits; none: no column is.
        resize: See `folder`.
        interpolation: How images are scaled.
        skip_bad: Whether to leave out rows and images that cannot be used, with a line that counts and names them.
        test: Number of images to draw for testing, or a percentage of all, where none are set apart. None: 20%.
        split_seed: Seed of that draw.

    Returns:
        The data set, its images in the order of the rows.

    Raises:
        DataError: The table is missing or damaged, a column is missing, or, all in one line: rows without path or
            label, of an unknown split, of a class without training images, of a path that another row has, or of one
            that leads out of the folder; files that are missing, damaged, or of another size where resize is 0.
        ResourceError: The images do not fit into memory.
        UsageError: An option has no meaning, or test is set where there are test images.
    """
    options = Reading(
        name="table", resize=resize, interpolation=interpolation, skip_bad=skip_bad, test=test, split_seed=split_seed
    )
    source = _table_in(root)
    rows = _rows(source, {"path": path, "label": label, "split": split})
    place = Path(os.path.abspath(source.parent / images))
    if not place.is_dir():
        fix = "name that of the images with --data table:images=FOLDER, relative to the table"
        raise DataError(f"{place}: no such folder: {fix}")
    usable: dict[str, Row] = {}
    bad: dict[str, str] = {}
    for row in rows:
        name = _inside(place, row.path)
        if fault := row.fault or _fault(row, name, place, usable):
            bad[f"{source.name}:{row.line}"] = f"{source}:{row.line}: {fault}"
        else:
            usable[name] = row
    labels = {row.label for row in usable.values() if part_called(row.split) == "train"}
    for name, row in list(usable.items()):
        if row.label not in labels:
            fault = f"class {row.label!r} has no training images: remove the row, or add some"
            bad[f"{source.name}:{row.line}"] = f"{source}:{row.line}: {fault}"
            del usable[name]
    if len(labels) < 2:
        refuse_bad(source, bad.values(), options, len(bad))
        found = f"all training images are of class {min(labels)!r}" if labels else "has no training images"
        raise DataError(f"{source}: {found}: {FIX}")
    class_names = in_order(labels)
    numbers = {name: index for index, name in enumerate(class_names)}
    parts = {}
    for part in PARTS:
        chosen = {name: numbers[row.label] for name, row in usable.items() if part_called(row.split) == part}
        if chosen:
            parts[part] = Listed(tuple(chosen), np.array(list(chosen.values()), np.int64))
    return read_listed(place, parts, class_names, bad, options, lambda part, name: f"{source}: {name!r} in {part}", FIX)


def _table_in(root: Path) -> Path:
    """Return the table, which may be the only one in a folder."""
    if not root.is_dir():
        return root
    found = [each for each in visible(root, FIX) if each.suffix.lower() in (*DELIMITED, *LINES)]
    if len(found) != 1:
        raise DataError(f"{root}: holds {len(found)} tables: name the file itself, or {FIX}")
    return found[0]


def _inside(place: Path, path: str) -> str:
    """Return a path relative to a folder; empty: it leads out of it. Backslashes separate where no file has them."""
    if "\\" in path and not os.path.lexists(os.path.join(place, path)):
        path = path.replace("\\", "/")
    whole, inside = os.path.normpath(os.path.join(place, path)), os.path.join(place, "")
    return whole.removeprefix(inside) if whole.startswith(inside) else ""


def _fault(row: Row, name: str, place: Path, usable: dict[str, Row]) -> str:
    """Return why a row cannot be used, and how to repair it; empty: it can."""
    if part_called(row.split) is None:
        known = ", ".join(names[0] for names in PARTS.values())
        return f"split {row.split!r} is unknown: write one of {known}"
    if not name:
        return f"{row.path} leads out of {place}: name a folder that holds all images with --data table:images=FOLDER"
    if name in usable:
        other = usable[name]
        class_too = "" if other.label == row.label else f", where it is of class {other.label!r}"
        return f"{row.path} is in line {other.line}, too{class_too}: leave one of them"
    if Path(name).suffix.lower() not in SUFFIXES or "\0" in name:
        return f"{row.path} is not an image file by its name: remove the row"
    return ""


def _rows(source: Path, named: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of a table, after its columns were found."""
    suffix = source.suffix.lower()
    if suffix not in (*DELIMITED, *LINES):
        with reading(source, FIX):
            source.stat()
        raise DataError(f"{source}: is no table by its name: {FIX}")
    content = read_file(source, MAX_TABLE, FIX)
    with reading(source, "save it as UTF-8"):
        text = content.decode("utf-8-sig")
    names, found = _objects(source, text) if suffix in LINES else _records(source, text, suffix)
    columns = {kind: _column(source, kind, name, names) for kind, name in named.items()}
    for line, row, fault in found:
        values = {kind: _text(row.get(column)) for kind, column in columns.items()}
        empty = [columns[kind] for kind in ("path", "label") if not values[kind]]
        if not fault and empty:
            fault = f"has no {empty[0]}: fill it in, or remove the row"
        label = unicodedata.normalize("NFC", values["label"].strip())
        split = values["split"] if columns["split"] else "train"
        yield Row(line, values["path"], label, split, fault)


def _records(source: Path, text: str, suffix: str) -> tuple[Sequence[str], list[Record]]:
    """Return the columns of a CSV or TSV file, and its rows."""
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count) if suffix == ".csv" else "\t"
    with reading(source, FIX):
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        names = list(rows.fieldnames or [])
    if len(set(names)) < len(names):
        raise DataError(f"{source}: its header has a column twice ({', '.join(names)}): rename one")
    found: list[Record] = []
    while True:
        with reading(f"{source}:{rows.line_num + 1}", "quote fields as CSV files do"):
            row: dict[Any, Any] | None = next(rows, None)
        if row is None:
            return names, found
        more = len(names) + len(row.pop(None, ()))
        fault = f"has {more} fields, but the header {len(names)}: quote those that hold a delimiter"
        found.append((rows.line_num, row, fault if more > len(names) else ""))


def _objects(source: Path, text: str) -> tuple[Sequence[str], list[Record]]:
    """Return the keys of the JSON objects in lines, and these."""
    objects: list[Record] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        with reading(f"{source}:{number}", FIX):
            found = json.loads(line)
        if not isinstance(found, dict):
            raise DataError(f"{source}:{number}: is no JSON object: {FIX}")
        flat = {key: value for key, value in found.items() if not isinstance(value, list | dict)}
        objects.append((number, flat, ""))
    return [*dict.fromkeys(key for _, row, _ in objects for key in row)], objects


def _column(source: Path, kind: str, name: str, names: Sequence[str]) -> str:
    """Return the column of paths, labels or splits; empty: there is none of splits."""
    found = [each for each in names if each == name or (not name and each.strip().lower() in COLUMNS[kind])]
    if len(found) == 1:
        return found[0]
    if kind == "split" and (name == "none" or not (name or found)):
        return ""
    listed = ", ".join(names) or "none"
    if found:
        both = " and ".join(found)
        raise DataError(f"{source}: {both} may both be the {kind}: name the column with --data table:{kind}={found[0]}")
    wanted = f"no column {name!r}" if name else f"no column of the {kind}"
    raise DataError(f"{source}: has {wanted} (it has {listed}): name it with --data table:{kind}=COLUMN, or {FIX}")


def _text(value: Any) -> str:
    return "" if value is None else str(value)
