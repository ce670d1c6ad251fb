"""A cache file of decoded arrays, so that a data set of many small images is decoded once."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codistill.core.console import warn
from codistill.core.errors import CodistillError, DataError, reason
from codistill.core.files import replaced
from codistill.data.mapped import digest
from codistill.data.untrusted import reading

FORMAT = 2
Arrays = dict[str, npt.NDArray[Any]]


def cached(path: Path, source: str, names: Iterable[str], build: Callable[[], Arrays]) -> Arrays:
    """Return arrays from a cache file, or build them and write the file.

    A cache that is damaged or belongs to other sources is replaced, with one line of warning. One that cannot be
    written costs a warning and the time to build it again.

    Args:
        path: The cache file, a .npz.
        source: Identifies the files that the arrays were made from; a change makes the cache stale.
        names: The arrays that are wanted; others need not be among those returned.
    """
    try:
        arrays = _read(path, source, names)
    except CodistillError as error:  # also ResourceError: a damaged header may claim more memory than there is
        warn(str(error))
        arrays = None
    if arrays is None:
        arrays = build()
        _write(path, source, arrays)
    return arrays


def _read(path: Path, source: str, names: Iterable[str]) -> Arrays | None:
    """Read and check the wanted arrays; None when there is no cache."""
    if not path.exists():
        return None
    fix = "building it again"
    # Opened here: NumPy leaves a file open that it cannot read.
    with reading(path, fix), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        if about["format"] != FORMAT or about["source"] != source:
            raise DataError(f"{path}: was made from other files or by another version: {fix}")
        arrays = {name: file[name] for name in names}
        for name, array in arrays.items():
            if digest(array) != about["sha256"][name]:
                raise DataError(f"{path}: the sha256 of {name} is wrong: {fix}")
    return arrays


def _write(path: Path, source: str, arrays: Arrays) -> None:
    about = {"format": FORMAT, "source": source, "sha256": {name: digest(array) for name, array in arrays.items()}}
    try:
        with replaced(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)
    except OSError as error:
        warn(f"{path}: cannot be written ({reason(error)}): the images are decoded again next time")
