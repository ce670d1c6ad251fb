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
    (mean, std), images = data.statistics, {"train_images": len(data.train), "test_images": len(data.test)}
    classes = {"class_names": list(data.class_names), "image_size": list(data.image_size)}
    facts = {"name": data.name, **classes, "mean": list(mean), "std": list(std), **images}
    return {**config.as_mapping(), "dataset": facts, "environment": environment(device)}


def checked_metadata(metadata: Any, path: Path) -> dict[str, Any]:
    """Return the contents of a config.json, or raise `CheckpointError` where no run has written them."""
    if not isinstance(metadata, dict) or "networks" not in metadata:
        raise CheckpointError(f"{path}/config.json: not that of a run: is {path} a run folder?")
    # Facts that are lists: the type of the items, and how many there must be.
    lists = {"class_names": (str, None), "image_size": (int, 2), "mean": (float, 3), "std": (float, 3)}
    for part, keys in {"method": ["name"], "dataset": ["name", *lists], "environment": []}.items():
        given = metadata.get(part)
        missing = [f"{part} {key}" for key in keys if key not in given] if isinstance(given, dict) else [part]
        if missing:
            raise CheckpointError(f"{path}/config.json: damaged: {missing[0]} is missing")
    for key, (kind, length) in lists.items():
        value = metadata["dataset"][key]
        whole = isinstance(value, list) and 0 < len(value) == (length or len(value))
        if not whole or any(type(each) is not kind for each in value) or (key == "image_size" and min(value) <= 0):
            raise CheckpointError(f"{path}/config.json: damaged: {key} of the dataset is {shown(value)}")
    return metadata
