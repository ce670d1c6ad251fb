"""A run folder of a training that a loop of one's own has done."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.core.errors import DivergedError, UsageError
from codistill.core.files import write_json
from codistill.core.randomness import draws_kept
from codistill.data.dataset import Dataset
from codistill.deploy.run import Run
from codistill.evaluation.evaluation import Evaluation
from codistill.evaluation.metrics import read_together
from codistill.methods import Method
from codistill.report.page import page_if_possible, write_report
from codistill.report.pictures import keep_pictures
from codistill.runs.folder import refuse_existing
from codistill.runs.metadata import run_metadata, weights_digest
from codistill.runs.predictions import write_predictions
from codistill.runs.state import TrainingState, tensors_once
from codistill.runs.summary import summarise
from codistill.settings.config import TrainSettings
from codistill.training.finite import bad_scores
from codistill.training.prepare import DeviceSplits
from codistill.training.train import config_of
from codistill.training.trainer import scored_row


def record(
    method: Method,
    data: Dataset,
    out: str | Path,
    *,
    history: Sequence[Mapping[str, float]] = (),
    seconds: float = 0.0,
    settings: TrainSettings | None = None,
) -> Run:
    """Write the run folder of a training that your own loop has done: it is evaluated, reported and exported as any.

    All predictors are scored on the test images (and validation images, if the data set has any) where the method is,
    normalised by `data.statistics`: (pixels / 255 - mean) / std, which the loop must have done, too.

    Args:
        method: Trained; its weights stay, and so does its mode.
        data: What it was trained on, in full: its facts are recorded, and files are compared on its test images.
        out: The run folder, which must not hold anything.
        history: For each epoch the means of the loss terms by name, which the report draws, and `learning_rate`, if it
            is to be drawn.
        seconds: Of the training; 0: not known.
        settings: Those of the loop that you want recorded; epochs are those of the history, and milestones behind
            them are left out, as are `ema_decay`, `validation` and `patience`; `data.validation` is scored.

    Returns:
        The run, which is finished; it cannot be resumed, but another can start from it (`init`).

    Raises:
        UsageError: The folder is not empty, or the history holds something else than finite numbers.
        DivergedError: The logits are NaN or infinite.
    """
    epochs = max(1, len(history))
    settings = settings or TrainSettings(epochs=epochs, milestones=())
    within = settings.milestones and tuple(each for each in settings.milestones if each < epochs)
    known = dataclasses.replace(settings, epochs=epochs, milestones=within)
    # No average and no held-out images are known here.
    config = config_of(method, data, dataclasses.replace(known, ema_decay=0.0, validation=0, patience=0))
    for epoch, terms in enumerate(history):
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in terms.values()):
            raise UsageError(f"history of epoch {epoch + 1} is {dict(terms)!r}; it must be finite numbers by name")
    refuse_existing(Path(out))
    device = next(method.parameters()).device
    splits = DeviceSplits(data, device)
    held = splits.evaluated(None)
    method.choose_memory_format(held["test"].batch(0, 1)[0])
    evaluation = Evaluation(method, held, captured=False)
    with draws_kept(device):
        evaluation.run()
    rows: list[dict[str, Any]] = []
    for epoch, terms in enumerate(history or [{}]):
        train = {name: float(value) for name, value in terms.items() if name != "learning_rate"}
        rows.append({"epoch": epoch, "learning_rate": terms.get("learning_rate"), "train": train, "warnings": []})
        rows[-1] |= {"seconds": seconds / epochs, "images_per_second": 0.0}
        if seconds:
            rows[-1]["images_per_second"] = len(data.train) * epochs / seconds
    rows[-1] |= scored_row(evaluation.scored(read_together(evaluation.tensors())))
    for split in held:
        if words := bad_scores(rows[-1], split):
            raise DivergedError(words)
    initial = {"sha256": weights_digest(method), "from_recipe": False, "trained_in": []}
    metadata = run_metadata(config, data, device, method, splits.digests, initial, {}) | {"own_loop": True}
    with Run.opened(Path(out), metadata, method, data) as run:
        weights = {name: each.cpu() for name, each in tensors_once(method).items()}
        run.checkpoints.save(TrainingState(config.as_mapping(), weights, [], rows, best=True))
        run.write_metrics(rows)
        predictions = evaluation.predictions()
        write_predictions(run.path, predictions)
        images = {split: len(each) for split, each in held.items()}
        summary = summarise(run, config, method, rows, rows[-1], seconds, {}, images)
        with page_if_possible(run):
            keep_pictures(run, method, predictions["test"], summary["best_student"], data.test)
            write_report(run, summary)
        write_json(run.path / "summary.json", summary)
    return run
