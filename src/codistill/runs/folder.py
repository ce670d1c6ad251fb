"""A run folder: the whole truth of one training, its files and who may write them."""

import contextlib
import functools
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from codistill.core.errors import CheckpointError, DataError, UsageError
from codistill.core.files import read_json, system_error, write_atomically, write_json
from codistill.core.imports import trained_with
from codistill.core.kinds import shown
from codistill.data import DATASETS, Dataset, dataset
from codistill.data.store import stored_in
from codistill.evaluation.metrics import AVERAGED
from codistill.methods import Method
from codistill.networks.origin import mark
from codistill.networks.probe import copied
from codistill.runs.checkpoint import CheckpointStore
from codistill.runs.choice import lowest_student
from codistill.runs.images import changed_files
from codistill.runs.lock import lock_folder, remove_strays
from codistill.runs.metadata import checked_metadata, drawn_digest
from codistill.runs.state import TrainingState, load_weights
from codistill.settings.build import build_method, unbuildable
from codistill.settings.config import RunConfig
from codistill.settings.mapping import run_from_mapping

ANOTHER = "choose another --out"
# What tells how a run has ended: of one that trains on, it would be of an epoch before.
OF_THE_END = ("summary.json", "predictions.npz", "report-images.npz")


@dataclass(frozen=True)
class Continued:
    """A run that goes on, as it was read before its folder is held.

    Attributes:
        run: Its folder, whose store of checkpoints knows which of them are damaged.
        index: That of the checkpoints, from before they were read.
        state: The checkpoint that it goes on from; None: it begins again.
        extended: Its config.json, where another number of epochs changes that; None: nothing does.
    """

    run: "RunFolder"
    index: bytes | None
    state: TrainingState | None
    extended: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, run: "RunFolder") -> Self:
        """Read the last whole checkpoint of a run."""
        index = run.checkpoints.written()
        return cls(run, index, run.checkpoints.load() if run.checkpoints.entries() else None)


class RunFolder:
    """The folder of a run: config.json (its `metadata`), metrics.jsonl, checkpoints and summary.json."""

    def __init__(self, path: str | Path, method: Method | None = None, data: Dataset | None = None) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = checked_metadata(read_json(self.path / "config.json"), self.path)
        self.checkpoints = CheckpointStore(self.path / "checkpoints")
        self._finished: dict[str, Any] | None = None
        self.own_method, self._data = method, data

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        path: Path,
        metadata: Mapping[str, Any] | None,
        method: Method,
        data: Dataset,
        continued: Continued | None = None,
    ) -> Iterator[Self]:
        """Hold a run folder for writing as long as the context lasts.

        `metadata` are those of a new run; None: the folder holds a run, which resumes as it was `continued`.
        `load_method` copies the method where names alone cannot build it, `load_data` returns the data.

        Raises:
            UsageError: Another process holds the folder, or held it since the run was read; it cannot be made, or a new
                one is not empty; or the run to resume is finished.
            CheckpointError: There is no run to resume.
        """
        run, fix = None, ANOTHER
        if metadata is None:
            run, fix = cls(path), "repair the folder, or copy it to another place"
        with contextlib.ExitStack() as held:
            try:
                if run is None:
                    refuse_existing(path)
                    path.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_folder(path, f", or {ANOTHER}" if metadata is not None else ""))
                remove_strays(path)
                if metadata is not None:
                    refuse_occupied(path)
                    write_json(path / "config.json", metadata)
                    run = cls(path)
                assert run is not None
                extended = continued and continued.extended
                if continued is not None:
                    run = cls(path)
                    if (run.metadata, run.checkpoints.written()) != (continued.run.metadata, continued.index):
                        raise UsageError(f"run {path} was continued by another process meanwhile: repeat the command")
                    if extended is not None:
                        write_json(path / "config.json", extended)
                        run = cls(path)
                    run.checkpoints = continued.run.checkpoints
                if run.finished and extended is None:
                    raise UsageError(f"run {path} is finished: there is nothing to resume")
                remove_strays(run.checkpoints.folder)
                for each in OF_THE_END:
                    (path / each).unlink(missing_ok=True)
            except OSError as error:
                raise system_error(error, f"run folder {path}", fix=fix) from None
            run.own_method, run._data = (method if run.unbuildable else None), data
            yield run

    @functools.cached_property
    def config(self) -> RunConfig:
        """The settings that the run was started with; those of a method that was handed in are the method's."""
        given, mapping, base = self.own_method, dict(self.metadata), None
        if given is not None:
            base, began = RunConfig(method_name=given.name, method=given.settings), mapping.pop("method")
            began = {**began, "networks": mapping["networks"]}
            has = {**base.as_mapping()["method"], "networks": [student.spec for student in given.cohort]}
            for key in began | has:  # the name of the method first
                if (was := began.get(key)) != (now := has.get(key)):
                    raise UsageError(f"{self.path}: its method has {key} = {was}, the one that was handed in {now}")
        elif self._unknown_method:
            self.refuse_unbuildable()
        try:
            return run_from_mapping(mapping, lambda key: f"{self.path}/config.json", base=base)
        except UsageError as error:
            began, now = self.metadata["environment"].get("codistill"), importlib.metadata.version("codistill")
            words = f"cannot be used by codistill {now}" if began == now else f"is of codistill {began}, this is {now}"
            raise CheckpointError(f"{self.path}/config.json: {words}: {error}") from None

    @property
    def asked(self) -> RunConfig:
        """The settings as they were given, before others were chosen in place of auto."""
        asked = self.metadata.get("asked", {})
        return run_from_mapping(asked, lambda key: f"{self.path}/config.json", base=self.config)

    @property
    def extensions(self) -> list[dict[str, int]]:
        """What `resume --epochs` has changed: `epochs` before, and `after_epoch` and `after_step`, which were done."""
        return list(self.metadata.get("extended", []))

    @property
    def unbuildable(self) -> str:
        """Why this program cannot build the method by names alone; empty: it can."""
        return self._unknown_method or unbuildable(self.config.method_name, self.config.networks)

    @property
    def _unknown_method(self) -> str:
        own = self.metadata.get("own_method")
        return f"method {own} is not registered" if own else unbuildable(str(self.metadata["method"]["name"]))

    def refuse_unbuildable(self) -> None:
        """Raise `CheckpointError` where the method can be built only by the user's program, and was not handed in."""
        if self.own_method is None and (why := self.unbuildable):
            raise CheckpointError(f"{self.path}/config.json: {why}: {hand_in('method', self.metadata)}")

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of `summary.json`: as they are now, or those of the end of a finished run, which are read once.

        Raises:
            CheckpointError: It is absent or damaged.
        """
        summary = self._finished or read_json(self.path / "summary.json")
        if not isinstance(summary, dict):
            raise CheckpointError(f"{self.path}/summary.json: damaged: not a table of results")
        self._finished = summary if summary.get("status") == "finished" else None
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
        return list(self.metadata["dataset"]["class_names"])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        height, width = self.metadata["dataset"]["image_size"]
        return int(height), int(width)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl, and flush it to the disk."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl as a whole, whatever is there."""
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
        write_atomically(self.path / "metrics.jsonl", "".join(lines).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, one entry an epoch.

        Raises:
            CheckpointError: It is absent, or a line is damaged; of several a last one that a kill has cut is left out.
        """
        path, rows = self.path / "metrics.jsonl", []
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                if number == len(lines) > 1 and not line.endswith("\n"):
                    break
                raise CheckpointError(f"{path}:{number}: damaged: {shown(line.strip())}") from None
        return rows

    @property
    def averages(self) -> bool:
        """Whether the run keeps a moving average of its weights."""
        return self.config.train.ema_decay > 0

    def predictors(self, which: str = "last") -> dict[str, nn.Module]:
        """Return a module for each predictor of a checkpoint, averaged ones as `student0-ema`; see `load_method`."""
        named = self.load_method(which).predictors()
        if self.averages:
            averaged = self.load_method(which, averaged=True).predictors()
            named |= {name + AVERAGED: module for name, module in averaged.items()}
        return named

    def load_method(self, which: str = "last", averaged: bool = False) -> Method:
        """Build the method with all its networks, on the CPU and in evaluation mode, with a checkpoint's weights.

        Args:
            which: The `last` or the `best` checkpoint.
            averaged: Take the moving average of the weights, of a run that `averages`.

        Raises:
            CheckpointError: No whole checkpoint, one of other shapes, or a method or networks of the user's own that
                were not handed in.
        """
        self.refuse_unbuildable()
        state = self.checkpoints.load(which)
        if self.own_method is not None:
            method = copied(self.own_method).cpu()
            method.to(memory_format=torch.contiguous_format)
        else:
            method = build_method(self.config, len(self.class_names), self.image_size)
        weights = {**state.method, **state.ema} if averaged else state.method
        # Only training needs what belongs to the teacher.
        gone = tuple(f"{part}." for part in ("connectors", "teacher_parts") if not len(getattr(method, part)))
        weights = {name: each for name, each in weights.items() if not name.startswith(gone)}
        load_weights(method, weights, f"{self.path}: the {which} checkpoint")
        mark(method, self.path)
        return method.eval()

    def load_data(self, data_dir: str | None = None, skip_bad: bool = False) -> Dataset:
        """Load the data set of the training again; the process that trained still has it, be it registered or not.

        Args:
            data_dir: Where the data set is now, if not where it was in training.
            skip_bad: Whether a folder's images that cannot be read are left out, where the training had none.

        Raises:
            DataError: It is missing or damaged, arrays of the user's own that were not handed in, or its images or
                classes are not those of the training.
        """
        name, place = self.config.data, data_dir or self.config.data_dir
        handed = self._data is not None and place == self.config.data_dir
        if not handed and name.partition(":")[0] not in DATASETS:
            why = f"data set {name!r} is not registered in this program; it may be arrays of your own"
            raise DataError(f"{self.path}: {why}: {hand_in('data', self.metadata)}")
        skip = {"skip_bad": True} if skip_bad else {}
        try:
            with stored_in(self.config.execution.data_cache):
                data = self._data if self._data is not None and handed else dataset(name, place, **skip)
        except DataError as error:
            if place is None or place != self.config.data_dir:
                raise
            moved = "if it has moved, name its place now with --data-dir (data_dir=)"
            raise DataError(f"{error}; {self.path} was trained on it there: {moved}") from None
        self.check_classes(data)
        return data

    def check_classes(self, data: Dataset) -> None:
        """Raise `DataError` where a data set has other classes, images of another size, or another drawn test set."""
        for what, found, began in (
            ("classes", list(data.class_names), self.class_names),
            ("image size", data.image_size, self.image_size),
        ):
            if found != began:
                fix = f"{shown(found)}, but {self.path} was trained on {shown(began)}"
                raise DataError(f"data set {data.name}: other {what} than those of the run: {fix}")
        began = self.metadata["dataset"].get("drawn_sha256")
        if began is not None and data.drawn and began != drawn_digest(data):
            words = "other files than in training, of which other ones would be drawn for testing"
            words += f" ({changed})" if (changed := changed_files(self.path, data)) else ""
            raise DataError(f"data set {data.name}: {words}: restore them as {self.path}/images.csv lists them")

    def best_student(self, which: str = "last") -> str:
        """Name the student with the lowest top-1 error at a checkpoint: on validation images if any, else on test ones.

        Args:
            which: The `last` or the `best` checkpoint.

        Raises:
            UsageError: The training did not finish.
            CheckpointError: summary.json, or metrics.jsonl, is absent or damaged.
        """
        summary = self.summary if self.status is not None else {}
        if not summary.get("top1_error"):
            ended = "has not come to its end" if self.status is None else f"was {self.status}"
            raise UsageError(f"{self.path} has no best student, for its training {ended}: name a predictor")
        name = summary.get("best_epoch_best_student" if which == "best" else "best_student")
        # A run of an older version has it in its metrics only.
        return name or lowest_student(self.metrics()[summary["best_epoch"] - 1 if which == "best" else -1])[0]


def hand_in(what: str, metadata: Mapping[str, Any]) -> str:
    """Return how a program gets what a run folder cannot hold, `method` or `data`; nothing is imported unasked."""
    arguments = f"(path, {what}=..)"
    handed = f"hand it in from Python, codistill.resume{arguments} or codistill.Run{arguments}, or register it there"
    began = "as the training did" if metadata.get("imports") else "where it is in a module"
    return f"{handed}; on the command line, {began}, with {trained_with(metadata)}"


def runs_in(path: Path) -> list[Path]:
    """Return the run folders directly in a folder, sorted; none where it is a run itself."""
    return [] if (path / "config.json").exists() else sorted(each.parent for each in path.glob("*/config.json"))


def refuse_existing(path: Path) -> None:
    """Raise `UsageError` where a process works on a run folder, which is named, or a new one would not be empty."""
    with contextlib.suppress(OSError):
        if (path / ".lock").exists():
            lock_folder(path, f", or {ANOTHER}").close()
    refuse_occupied(path)


def refuse_occupied(path: Path) -> None:
    """Raise `UsageError` where a new run folder would not be empty, but for what a process leaves that was killed."""
    try:
        present = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise system_error(error, f"run folder {path}", fix=ANOTHER) from None
    if any(name != ".lock" and not name.startswith("config.json.tmp-") for name in present):
        raise UsageError(f"run folder {path} is not empty: choose another --out; nothing was overwritten")
