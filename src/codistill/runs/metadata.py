"""The record of a run, its config.json: what it says of environment and data set, and how it is checked."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch

from codistill.core.errors import CheckpointError
from codistill.core.host import keep_freed_memory
from codistill.data.dataset import Dataset
from codistill.settings.mapping import shown

VERSION = "0.1.0"


def environment(device: torch.device) -> dict[str, Any]:
    """Record what a result may depend on: versions, machine, device; and its speed: threads, cores, memory."""
    return {
        "codistill": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "openmp": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "GOMP_"))},
        "memory_format": "channels_last",
        "keeps_freed_memory": device.type == "cpu" and keep_freed_memory(),
    }


def dataset_record(data: Dataset) -> dict[str, Any]:
    """Record what a trained network must know of its data set: classes, image size, normalisation, counts."""
    mean, std = data.statistics
    return {
        "name": data.name,
        "class_names": list(data.class_names),
        "image_size": list(data.image_size),
        "mean": list(mean),
        "std": list(std),
        "train_images": len(data.train),
        "test_images": len(data.test),
    }


def checked_record(record: Any, path: Path) -> dict[str, Any]:
    """Refuse the contents of a config.json that no run has written.

    Raises:
        CheckpointError: Names the folder.
    """
    needed = {"method": ("name",), "dataset": ("name", "class_names", "image_size", "mean", "std"), "environment": ()}
    if not isinstance(record, dict) or "networks" not in record:
        raise CheckpointError(f"{path}/config.json: not the record of a run: is {path} a run folder?")
    for part, keys in needed.items():
        missing = [key for key in keys if key not in record[part]] if isinstance(record.get(part), dict) else [part]
        if missing:
            raise CheckpointError(f"{path}/config.json: damaged: it says nothing of {part} {missing[0]}")
    data = record["dataset"]
    right = {
        "class_names": is_list(data["class_names"], str),
        "image_size": is_list(data["image_size"], int, 2) and min(data["image_size"]) > 0,
        **{key: is_list(data[key], float, 3) for key in ("mean", "std")},
    }
    for key, whole in right.items():
        if not whole:
            raise CheckpointError(f"{path}/config.json: damaged: {key} of the dataset is {shown(data[key])}")
    return record


def is_list(value: Any, kind: type, length: int | None = None) -> bool:
    """Say whether a value from a JSON file is a list of one type, not empty, and of the length, if one is given."""
    return (
        isinstance(value, list)
        and 0 < len(value) == (length or len(value))
        and all(type(each) is kind for each in value)
    )
