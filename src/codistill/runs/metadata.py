"""The metadata of a run, its config.json: settings, environment and data set; and the checks of a file that is read."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy
import torch

from codistill.core.errors import CheckpointError
from codistill.core.host import keep_freed_memory
from codistill.core.torchrun import launch
from codistill.data.dataset import Dataset
from codistill.settings.config import RunConfig
from codistill.settings.mapping import shown


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result may depend on: versions, machine, device; and its speed: threads, cores, memory."""
    return {
        "codistill": importlib.metadata.version("codistill"),
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
        **launch(),
    }


def run_metadata(config: RunConfig, data: Dataset, device: torch.device) -> dict[str, Any]:
    """Return the contents of config.json: settings, environment, and the facts of the data set that networks need."""
    mean, std = data.statistics
    facts = {
        "name": data.name,
        "class_names": list(data.class_names),
        "image_size": list(data.image_size),
        "mean": list(mean),
        "std": list(std),
        "train_images": len(data.train),
        "test_images": len(data.test),
    }
    return {**config.as_mapping(), "dataset": facts, "environment": environment(device)}


def checked_metadata(metadata: Any, path: Path) -> dict[str, Any]:
    """Return the contents of a config.json, or refuse those that no run has written.

    Raises:
        CheckpointError: Names the folder.
    """
    needed = {"method": ("name",), "dataset": ("name", "class_names", "image_size", "mean", "std"), "environment": ()}
    if not isinstance(metadata, dict) or "networks" not in metadata:
        raise CheckpointError(f"{path}/config.json: not that of a run: is {path} a run folder?")
    for part, keys in needed.items():
        missing = [key for key in keys if key not in metadata[part]] if isinstance(metadata.get(part), dict) else [part]
        if missing:
            raise CheckpointError(f"{path}/config.json: damaged: {part} {missing[0]} is missing")
    data = metadata["dataset"]
    right = {
        "class_names": is_list(data["class_names"], str),
        "image_size": is_list(data["image_size"], int, 2) and min(data["image_size"]) > 0,
        **{key: is_list(data[key], float, 3) for key in ("mean", "std")},
    }
    for key, whole in right.items():
        if not whole:
            raise CheckpointError(f"{path}/config.json: damaged: {key} of the dataset is {shown(data[key])}")
    return metadata


def is_list(value: Any, kind: type, length: int | None = None) -> bool:
    """Whether a value from a JSON file is a list of one type, not empty, and of the length, if one is given."""
    whole = isinstance(value, list) and 0 < len(value) == (length or len(value))
    return whole and all(type(each) is kind for each in value)
