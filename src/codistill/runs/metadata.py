"""The metadata of a run, its config.json: settings, environment and data set; and the checks of a file that is read."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from codistill.core.errors import CheckpointError
from codistill.core.host import keep_freed_memory
from codistill.core.imports import imported
from codistill.core.kinds import shown
from codistill.core.source import source
from codistill.core.torchrun import launch
from codistill.data.affine import usable
from codistill.data.dataset import Dataset, Split
from codistill.data.images import preprocessing
from codistill.data.mapped import digest, facts_of
from codistill.methods import METHODS, Method
from codistill.networks.origin import contents
from codistill.runs.state import tensors_once
from codistill.settings.config import RunConfig

HELD_OUT = "positions of held-out images"


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result may depend on: code, versions, machine, device; and its speed: threads, cores, memory."""
    return {
        "codistill": importlib.metadata.version("codistill"),
        **source(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "openmp": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "GOMP_"))},
        "keeps_freed_memory": device.type == "cpu" and keep_freed_memory(),
        **launch(),
    }


def data_digests(data: Dataset) -> dict[str, str]:
    """Return the SHA-256 of shape and contents of images and labels of all splits."""
    digests: dict[str, str] = {}
    for name, split in data.splits.items():
        digests |= split_digests("training" if name == "train" else name, split)
    return digests


def split_digests(name: str, split: Split) -> dict[str, str]:
    """Return the SHA-256 of shape and contents of images and labels of one split, which has that name."""
    digests = {}
    for kind, array in (("images", split.images), ("labels", split.labels)):
        facts = facts_of(array)
        digests[f"{name} {kind}"] = digest(array) if facts is None else facts.sha256
    return digests


def drawn_digest(data: Dataset) -> str:
    """Return the SHA-256 of the names of the files that are drawn for testing; a data set that changes draws others."""
    return hashlib.sha256("\0".join(data.test.files).encode("utf-8", "surrogateescape")).hexdigest()


def held_out_digest(positions: Int[Tensor, " image"]) -> dict[str, str]:
    """Return the SHA-256 of the positions of training images that are held out for validation."""
    return {HELD_OUT: hashlib.sha256(contents(positions)).hexdigest()}


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of the parameters and buffers of a network, with their names and shapes."""
    weights = hashlib.sha256()
    for name, tensor in sorted(tensors_once(module).items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        weights.update(contents(tensor))
    return weights.hexdigest()


def run_metadata(
    config: RunConfig,
    data: Dataset,
    device: torch.device,
    method: Method,
    digests: Mapping[str, str],
    initial: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the contents of config.json: settings, environment, and the facts of the data set that networks need.

    `digests` are those of the data; `initial` tells of the initial weights; `asked` are values of settings, by key, in
    place of which others were chosen: auto.
    """
    (mean, std), images = data.statistics, {f"{name}_images": len(split) for name, split in data.splits.items()}
    classes = {"class_names": list(data.class_names), "image_size": list(data.image_size)}
    facts = {"name": data.name, **classes, "mean": list(mean), "std": list(std), **images}
    facts |= {"class_counts": data.class_counts, "preprocessing": preprocessing(data.interpolation)}
    facts |= {"drawn": data.drawn, "drawn_sha256": drawn_digest(data)} if data.drawn else {}
    facts |= {"left_out": list(data.left_out)} if data.left_out else {}
    facts["sha256"] = dict(digests)
    own: dict[str, Any] = {} if METHODS.get(method.name) is type(method) else {"own_method": type(method).__name__}
    teacher = {"teacher_sha256": weights_digest(method.taught_by.network)} if method.taught_by else {}
    own |= {"imports": imported()} if imported() else {}
    began = {"initial_weights": dict(initial)} | ({"asked": dict(asked)} if asked else {})
    here = environment(device) | {"memory_format": str(method.memory_format).removeprefix("torch.")}
    return {**config.as_mapping(), **own, **teacher, **began, "dataset": facts, "environment": here}


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
    tables = {"sha256 of the dataset": metadata["dataset"].get("sha256", {}), "asked": metadata.get("asked", {})}
    for what, table in tables.items():
        if not isinstance(table, dict):
            raise CheckpointError(f"{path}/config.json: damaged: {what} is no table")
    began = metadata.get("initial_weights", {"sha256": "", "from_recipe": True})
    if not isinstance(began, dict) or not {"sha256", "from_recipe"} <= began.keys():
        raise CheckpointError(f"{path}/config.json: damaged: initial_weights is {shown(began)}")
    extended, numbers = metadata.get("extended", []), {"epochs", "after_epoch", "after_step"}
    entries = isinstance(extended, list) and all(isinstance(each, dict) and each.keys() == numbers for each in extended)
    if not entries or any(type(value) is not int for each in extended for value in each.values()):
        raise CheckpointError(f"{path}/config.json: damaged: extended is {shown(extended)}")
    for key, (kind, length) in lists.items():
        value = metadata["dataset"][key]
        whole = isinstance(value, list) and 0 < len(value) == (length or len(value))
        if not whole or any(type(each) is not kind for each in value) or (key == "image_size" and min(value) <= 0):
            raise CheckpointError(f"{path}/config.json: damaged: {key} of the dataset is {shown(value)}")
    if not usable((metadata["dataset"]["mean"], metadata["dataset"]["std"])):
        raise CheckpointError(f"{path}/config.json: damaged: std of the dataset is {metadata['dataset']['std']}")
    return metadata
