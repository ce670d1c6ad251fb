"""A run as its user holds it: evaluate it, take a predictor out of it, export it."""

from pathlib import Path

from torch import nn

from codistill.deploy.classifier import run_predictor
from codistill.deploy.export import export_predictor
from codistill.evaluation.metrics import Scores
from codistill.runs.evaluate import evaluate_run
from codistill.runs.folder import RunFolder


class Run(RunFolder):
    """A run: its folder, and what can be done with the networks in it.

    Args:
        path: The folder; it must hold a config.json.

    Raises:
        CheckpointError: It is not a run folder, or its config.json is damaged.
    """

    def predictor(self, name: str | None = None, which: str = "last") -> nn.Module:
        """Return one predictor on the CPU, in evaluation mode; it takes normalised images.

        Args:
            name: `student0`, .., `ensemble` or `fused`; None: the best student of the last epoch.
            which: The `last` or the `best` checkpoint.

        Raises:
            UsageError: The run has no predictor of that name.
            CheckpointError: See `load_method`.
        """
        return run_predictor(self, name, which)[1]

    def evaluate(self, which: str = "last", data_dir: str | None = None, device: str = "auto") -> dict[str, Scores]:
        """Return the scores of all predictors on the test set; see `evaluate_run`."""
        return evaluate_run(self, which, data_dir, device)

    def export(self, predictor: str, file: str | Path, format: str | None = None) -> Path:
        """Write one predictor as a file that needs nothing of the rest; see `export_predictor`."""
        return export_predictor(self, predictor, Path(file), format).path
