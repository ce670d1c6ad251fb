"""A run folder: the whole truth of one training, and what can be done with it afterwards."""

import copy
import fcntl
import json
import os
import platform
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy
import torch

from codistill.checkpoint import CheckpointStore, load_weights, read_json, write_atomically, write_json
from codistill.config import RunConfig
from codistill.data.augment import INIT_STREAM, generator
from codistill.data.dataset import Dataset, dataset
from codistill.errors import CheckpointError, DataError, UsageError
from codistill.flags import mapping_arguments, parse_config, shown
from codistill.host import keep_freed_memory
from codistill.methods import METHODS, Method
from codistill.networks import network

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


class RunLock:
    """Hold a run folder for one process; the kernel gives it back when the process ends, however it ends.

    Args:
        folder: The run folder, which exists.

    Raises:
        UsageError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] = open(folder / ".lock", "a+")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise UsageError(
                f"run folder {folder} is in use by {owner}: wait for it, or choose another --out"
            ) from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on host {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let others have the folder."""
        self._file.close()


def remove_strays(folder: Path) -> None:
    """Remove temporary files that a killed process left; only for who holds the folder."""
    for stray in folder.glob("*.tmp-*"):
        stray.unlink(missing_ok=True)


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


class Run:
    """A run folder.

    Args:
        path: The folder; it must hold a config.json.

    Raises:
        CheckpointError: It is not a run folder, or its config.json is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record: dict[str, Any] = checked_record(read_json(self.path / "config.json"), self.path)
        self.checkpoints = CheckpointStore(self.path / "checkpoints")
        self._method: Method | None = None
        self._data: Dataset | None = None

    @classmethod
    def create(cls, path: Path, record: dict[str, Any], method: Method, data: Dataset) -> tuple["Run", RunLock]:
        """Make a new run folder and hold it.

        Raises:
            UsageError: Something other than an empty folder is there, another process holds it, or it cannot be made.
        """
        cls.refuse_taken(path, locked=True)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = RunLock(path)
        except OSError as error:
            raise UsageError(f"run folder {path}: {error.strerror}: choose another --out") from None
        try:
            remove_strays(path)
            cls.refuse_taken(path)
        except UsageError:
            lock.release()
            raise
        write_json(path / "config.json", record)
        run = cls(path)
        run._method, run._data = method, data
        return run, lock

    def reopen(self, method: Method, data: Dataset) -> RunLock:
        """Hold the folder again, to go on with an interrupted run.

        Raises:
            UsageError: The run is finished, or another process holds it.
        """
        lock = RunLock(self.path)
        if self.finished:
            lock.release()
            raise UsageError(f"run {self.path} is finished: there is nothing to resume")
        remove_strays(self.path)
        remove_strays(self.checkpoints.folder)
        (self.path / "summary.json").unlink(missing_ok=True)  # how it ended before it went on
        self._method, self._data = method, data
        return lock

    @staticmethod
    def refuse_taken(path: Path, locked: bool = False) -> None:
        """Refuse a run folder that holds anything.

        Args:
            path: The folder, which need not exist.
            locked: Whether one with a lock file passes, to be looked at again under the lock.

        Raises:
            UsageError: Something other than an empty folder is there.
        """
        try:
            present = {entry.name for entry in path.iterdir()} if path.exists() else set()
        except OSError as error:
            raise UsageError(f"run folder {path}: {error.strerror}: choose another --out") from None
        if present - {".lock"} and not (locked and ".lock" in present):
            raise UsageError(f"run folder {path} is not empty: choose another --out; nothing was overwritten")

    @property
    def config(self) -> RunConfig:
        """The settings that the run was started with."""
        mapping = dict(self.record)
        method = dict(mapping.pop("method"))
        name = str(method.pop("name"))
        try:
            return parse_config(name, mapping_arguments(mapping, method, name, lambda key: f"{self.path}/config.json"))
        except UsageError as error:
            raise CheckpointError(f"{self.path}/config.json: damaged, or of another version: {error}") from None

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds.

        Raises:
            CheckpointError: It is absent or damaged.
        """
        summary: dict[str, Any] = read_json(self.path / "summary.json")
        return summary

    @property
    def status(self) -> str | None:
        """How the run ended: finished, diverged, interrupted or failed; None: it has not, or was killed."""
        return str(self.summary.get("status")) if (self.path / "summary.json").exists() else None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.status == "finished"

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.record["dataset"]["class_names"])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        height, width = self.record["dataset"]["image_size"]
        return int(height), int(width)

    def append_metrics(self, rows: Sequence[str]) -> None:
        """Add the last of the rows to metrics.jsonl, and see it on the disk."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(rows[-1] + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_metrics(self, rows: Sequence[str]) -> None:
        """Write metrics.jsonl as a whole, whatever is there."""
        write_atomically(self.path / "metrics.jsonl", "".join(row + "\n" for row in rows).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, one entry an epoch.

        Raises:
            CheckpointError: It is absent, or a line is damaged.
        """
        path = self.path / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None

    def load_method(self, which: str = "last") -> Method:
        """Build the method with all its networks and load a checkpoint's weights.

        Args:
            which: The `last` or the `best` checkpoint.

        Returns:
            The method on the CPU, in evaluation mode.

        Raises:
            CheckpointError: No whole checkpoint, one of other shapes, or networks of the user's own that have no name
                to build them from.
        """
        state = self.checkpoints.load(which)
        if self._method is not None and "" in self.record["networks"]:
            method = copy.deepcopy(self._method).cpu()
        else:
            method = build_method(self.config, len(self.class_names), self.image_size)
        load_weights(method, state.get("method"), f"{self.path}: the {which} checkpoint")
        return method.eval()

    def load_data(self, data_dir: str | None = None) -> Dataset:
        """Load the data set of the training again; the process that trained still has it, be it registered or not.

        Args:
            data_dir: Where the data set is now, if not where it was in training.

        Raises:
            DataError: It is missing or damaged, or its images or classes are not those of the training.
        """
        config = self.config
        data = self._data if self._data and not data_dir else dataset(config.data, data_dir or config.data_dir)
        if list(data.class_names) != self.class_names or data.image_size != self.image_size:
            raise DataError(
                f"data set {config.data}: its classes or image size are not those that {self.path} was trained on"
            )
        return data

    def best_student(self) -> str:
        """Name the student with the lowest top-1 error at the end of training.

        Raises:
            UsageError: The training did not finish.
            CheckpointError: summary.json is absent or damaged.
        """
        summary = self.summary
        if "top1_error" not in summary:
            raise UsageError(
                f"{self.path} has no best student, for its training was {summary.get('status')}: name a predictor"
            )
        errors: dict[str, float] = {
            name: error for name, error in summary["top1_error"].items() if name.startswith("student")
        }
        return min(sorted(errors), key=errors.__getitem__)

    def export(self, predictor: str, file: str | Path, format: str | None = None) -> Path:
        """Write one predictor as a file that needs nothing of the rest; see `codistill.export.export_predictor`."""
        from codistill.export import export_predictor

        return export_predictor(self, predictor, Path(file), format).path


def build_method(config: RunConfig, num_classes: int, image_size: tuple[int, int]) -> Method:
    """Build a method with fresh networks; the weights are a pure function of the seed.

    Raises:
        UsageError: Networks, method and settings do not go together.
        CheckpointError: A network has no name to build it from.
    """
    if not config.networks:
        raise UsageError("no networks: name one for each student, for example --networks resnet20 resnet20")
    if "" in config.networks:
        raise CheckpointError("the run was trained with networks of your own, which only your program can build")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.train.seed, INIT_STREAM).initial_seed())
        students = [network(spec, num_classes) for spec in config.networks]
        return METHODS[config.method_name](students, num_classes, config.method, image_size)
