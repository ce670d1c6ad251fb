"""A run as its user holds it: evaluate it, export it."""

from collections.abc import Sequence
from pathlib import Path

from codistill.deploy.card import export_folder, is_folder
from codistill.deploy.export import export_predictor
from codistill.deploy.latency import measure_latency
from codistill.evaluation.metrics import Scores
from codistill.evaluation.predictions import Predictions
from codistill.runs.evaluate import EvaluatedSplit, evaluate_run
from codistill.runs.folder import RunFolder
from codistill.runs.latency import Latency, Runtime
from codistill.runs.predictions import read_predictions


class Run(RunFolder):
    """A run: its folder, and what can be done with the networks in it.

    Attributes:
        metadata: The contents of config.json: settings, data set, environment.
        checkpoints: The checkpoints.

    Args:
        path: The folder; it must hold a config.json.
        method: The method with its networks, where names alone cannot build them: those of your own; its weights are
            replaced by those of a checkpoint in a copy.
        data: The data set, where it is arrays of your own.

    Raises:
        CheckpointError: It is not a run folder, or its config.json is damaged.
        UsageError: At the first use, a method with other settings or networks.
    """

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def evaluate(
        self,
        which: str = "last",
        data_dir: str | None = None,
        device: str = "auto",
        split: EvaluatedSplit = "test",
        skip_bad: bool = False,
    ) -> dict[str, Scores]:
        """Return the scores of all predictors on the test set, or on validation images; see `evaluate_run`."""
        return evaluate_run(self, which, data_dir, device, skip_bad, split)

    def predictions(self) -> dict[str, Predictions]:
        """Return what all predictors answered for each image after the last epoch, by split; see `read_predictions`."""
        return read_predictions(self)

    def export(self, predictor: str, file: str | Path, format: str | None = None, data_dir: str | None = None) -> Path:
        """Write one predictor as a file that needs nothing of the rest, or as a folder; return its place.

        See `export_predictor`, and for a folder (no ending of a file, or a slash at the end) `export_folder`.
        """
        if is_folder(str(file)):
            export_folder(self, Path(file), predictor, format, data_dir=data_dir)
            return Path(file)
        return export_predictor(self, predictor, Path(file), format, data_dir=data_dir).path

    def measure_latency(self, runtimes: Sequence[Runtime] = ("torch", "onnx")) -> Latency:
        """Measure every predictor on this machine; see `codistill.deploy.latency.measure_latency`."""
        images = self.load_data().train.images if "onnx-int8" in runtimes else None
        return measure_latency(self, runtimes, images=images)
