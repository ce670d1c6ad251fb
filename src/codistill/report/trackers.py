"""Trackers of a run: TensorBoard, which is always written, and Trackio, Weights & Biases and MLflow, if asked for."""

import hashlib
import importlib
import importlib.util
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from codistill.evaluation.analysis import confusion_matrix, row_shares
from codistill.runs.choice import epochs_done
from codistill.runs.folder import RunFolder
from codistill.runs.predictions import read_predictions
from codistill.runs.saving import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROJECT = "codistill"
CONFUSION_PIXELS = 400


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl: train/<term>, test/<predictor>/<score>, diversity/<measure>."""
    found = {f"train/{name.replace('->', '_to_')}": value for name, value in row["train"].items()}
    found |= {f"train/{name}": row[name] for name in ("learning_rate", "images_per_second")}
    if "diversity" in row:
        found |= {f"diversity/{name}": row["diversity"][name] for name in ("disagreement", "kl")}
    for split in ("validation", "test"):
        for predictor, scores in row.get(split, {}).items():
            found |= {f"{split}/{predictor}/{name}": value for name, value in scores.items()}
    return found


def hparams_of(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run as flat plain values, those of the method as method.<name>."""
    mapping = run.config.as_mapping()
    flat = {key: value for key, value in mapping.items() if key != "method"}
    flat |= {f"method.{key}": value for key, value in mapping["method"].items()}
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in flat.items() if value is not None}


def results_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the last test errors of all predictors, percent, as result/<predictor>."""
    return {f"result/{name}": error for name, error in summary["top1_error"].items()}


def confusion_picture(run: RunFolder, predictor: str) -> npt.NDArray[np.uint8]:
    """Draw the confusion matrix of a predictor on the test set, uint8 [height, width]: rows are labels, 0 is 100 %."""
    test = read_predictions(run)["test"]
    matrix = confusion_matrix(test.labels, test.predictors[predictor].named, len(run.class_names))
    cells = np.round(255 * (1 - row_shares(matrix))).astype(np.uint8)
    factor = max(1, CONFUSION_PIXELS // len(cells))
    return np.kron(cells, np.ones((factor, factor), np.uint8))


class TensorBoard:
    """Events in RUN/tensorboard: scalars, the first batch as the networks see it, confusion matrix and hparams."""

    name = "events"

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._board: SummaryWriter | None = None

    def _open(self, step: int) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        folder = str(self._run.path / "tensorboard")
        self._board = self._board or SummaryWriter(folder, purge_step=step)
        return self._board

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl."""
        step = row["epoch"] + 1
        board = self._open(step)
        for name, value in scalars(row).items():
            board.add_scalar(name, value, step)
        board.flush()

    def pictures(self, images: Any) -> None:
        """Write training images, uint8 [image, height, width, 3]."""
        self._open(0).add_images("train/first batch", images, 0, dataformats="NHWC")

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write the confusion matrix of the best student, and settings with results as hparams."""
        board, student = self._open(epochs_done(summary)), summary["best_student"]
        board.add_image(
            f"test/confusion of {student}", confusion_picture(self._run, student)[None], epochs_done(summary)
        )
        board.add_hparams(hparams_of(self._run), results_of(summary), run_name=".")
        board.flush()

    def close(self) -> None:
        """Close the file."""
        if self._board is not None:
            self._board.close()


class Opted:
    """A tracker that was asked for with --track; it is imported when the first epoch is written."""

    name = ""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._open = False

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl."""
        if not self._open:
            self.begin(importlib.import_module(self.name))
            self._open = True
        self.send(scalars(row), row["epoch"] + 1)

    def pictures(self, images: Any) -> None:
        """Send no images."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Send the results."""
        if self._open:
            self.send(results_of(summary), epochs_done(summary))

    def close(self) -> None:
        """End what was begun."""
        if self._open:
            self.finish()

    def identity(self) -> str:
        """Return a name of this run that it keeps when it is resumed, and no other run has."""
        made = (self._run.path / "config.json").resolve().parent
        facts = f"{made} {self._run.metadata.get('initial_weights', {}).get('sha256')}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def begin(self, library: Any) -> None:
        """Open the run in the tracker."""
        raise NotImplementedError

    def send(self, numbers: Mapping[str, float], step: int) -> None:
        """Send numbers of a step, which are epochs that are done."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close the run in the tracker."""
        raise NotImplementedError


class Trackio(Opted):
    """Trackio, a local SQLite file; `trackio show` opens it."""

    name = "trackio"

    def begin(self, library: Any) -> None:
        """Open the run: the project has the name of the folder that holds the run."""
        project = self._run.path.resolve().parent.name or PROJECT
        name = f"{self._run.path.name}-{self.identity()[:6]}"
        self._held = library.init(project=project, name=name, config=hparams_of(self._run), resume="allow")

    def send(self, numbers: Mapping[str, float], step: int) -> None:
        """Log them."""
        self._held.log({**numbers, "epoch": step})

    def finish(self) -> None:
        """Wait until all is written."""
        self._held.finish()


class WandB(Opted):
    """Weights & Biases, offline in RUN/wandb unless WANDB_MODE says otherwise; `wandb sync` sends it later."""

    name = "wandb"

    def begin(self, library: Any) -> None:
        """Open the run, or that of the process before."""
        self._held = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._run.path.name,
            id=self.identity(),
            resume="allow",
            dir=str(self._run.path),
            config=hparams_of(self._run),
            mode=os.environ.get("WANDB_MODE", "offline"),
            reinit="create_new",
            settings=library.Settings(silent=True, console="off"),
        )

    def send(self, numbers: Mapping[str, float], step: int) -> None:
        """Log them."""
        self._held.log(dict(numbers), step=step)

    def finish(self) -> None:
        """Wait until all is written."""
        self._held.finish()


class MLflow(Opted):
    """MLflow, in mlflow.db beside the run folder unless MLFLOW_TRACKING_URI says otherwise."""

    name = "mlflow"

    def begin(self, library: Any) -> None:
        """Open the run, or that of the process before."""
        self._library, place = library, self._run.path.resolve().parent
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of each table that it makes
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
        self._client = library.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(PROJECT)
        where = (place / "mlartifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT, where)
        mine = f"tags.codistill = '{self.identity()}'"
        before = self._client.search_runs([experiment], mine, max_results=1)
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"codistill": self.identity(), "folder": str(self._run.path.resolve())}
        self._id = self._client.create_run(experiment, tags=tags, run_name=self._run.path.name).info.run_id
        for key, value in hparams_of(self._run).items():
            self._client.log_param(self._id, key, value)

    def send(self, numbers: Mapping[str, float], step: int) -> None:
        """Log them; MLflow allows no other signs than letters, digits and _-./ in names."""
        named = {re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII): value for name, value in numbers.items()}
        metric, now = self._library.entities.Metric, int(1000 * time.time())
        self._client.log_batch(self._id, [metric(name, value, now, step) for name, value in named.items()])

    def finish(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


TRACKERS: dict[str, type[Opted]] = {each.name: each for each in (Trackio, WandB, MLflow)}


def trackers(run: RunFolder, names: Sequence[str]) -> Iterator[Tracker]:
    """Make TensorBoard and the trackers that were asked for; see `codistill.runs.saving.Saver`."""
    yield TensorBoard(run)
    for name in names:
        yield TRACKERS[name](run)
