"""Evaluation of a finished run."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from codistill.core.console import note, warn
from codistill.core.device import choose_device
from codistill.core.errors import CheckpointError, UsageError
from codistill.core.randomness import draws_kept
from codistill.data.augment import DeviceImages
from codistill.data.dataset import Dataset, Split
from codistill.data.splitting import divided
from codistill.evaluation.evaluation import Evaluation
from codistill.evaluation.metrics import Scores, read_together
from codistill.evaluation.predictions import Predictions
from codistill.runs.folder import RunFolder
from codistill.runs.metadata import held_out_digest, split_digests
from codistill.runs.predictions import NAME, read_predictions, write_predictions

EvaluatedSplit = Literal["test", "validation"]


def evaluate_run(
    run: RunFolder,
    which: str = "last",
    data_dir: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    split: EvaluatedSplit = "test",
) -> dict[str, Scores]:
    """Score a checkpoint of a run on the test set of its data set; see `evaluate_images`."""
    return evaluate_images(run, which, data_dir, device, skip_bad, split)[0]


def evaluate_images(
    run: RunFolder,
    which: str = "last",
    data_dir: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    split: EvaluatedSplit = "test",
) -> tuple[dict[str, Scores], Predictions]:
    """Score a checkpoint of a run, and return what each predictor answered too, in the precision of the training.

    A test set with other images or labels than in training is scored, and a warning says that it is another one. Where
    predictions.npz of a finished run is absent or damaged, and the data are those of the training, it is written.

    Args:
        run: The run.
        which: The `last` or the `best` checkpoint.
        data_dir: Where the data set is now, if not where it was in training.
        device: cpu, cuda, cuda:1 or auto.
        skip_bad: Whether a folder's images that cannot be read are left out, where the training had none.
        split: The test set, or the validation images.

    Raises:
        UsageError: The run has no validation images.
        CheckpointError: No whole checkpoint.
        DataError: The data set is missing or damaged, or has other classes or another image size than in training.
    """
    config = run.config
    where = choose_device(device, config.execution.precision)
    data, facts = run.load_data(data_dir, skip_bad), run.metadata["dataset"]
    held = evaluated_splits(run, data)
    if split not in held:
        raise UsageError(f"{run.path} has no validation images: it was trained without --validation: take --split test")
    if differ := _other_contents(run, data, split):
        words = f"{' and '.join(differ)} of {run.config.data} are other ones (SHA-256) than in training"
        warn(f"{run.path}: {words}: its scores in summary.json are not comparable with these")
    # All splits once more, in the order of the training, for the file holds them all.
    remade = which == "last" and _lacks_predictions(run) and not any(_other_contents(run, data, each) for each in held)
    images = {}
    for name in held if remade else [split]:
        whole, positions = held[name]
        images[name] = DeviceImages(whole, (facts["mean"], facts["std"]), where)
        if positions is not None:
            images[name] = images[name].subset(positions)
    method = run.load_method(which)
    method.choose_memory_format(images[split].batch(0, 1)[0])
    method.to(where, memory_format=method.memory_format)  # type: ignore[call-overload]
    evaluation = Evaluation(method, images, config.execution.scored_in, seed=config.train.seed)
    with draws_kept(where):
        evaluation.run()
    scores, predictions = evaluation.scored(read_together(evaluation.tensors())), evaluation.predictions()
    if remade:
        _write(run, predictions)
    return scores[split][0], predictions[split]


def evaluated_splits(run: RunFolder, data: Dataset) -> dict[str, tuple[Split, Int[Tensor, " image"] | None]]:
    """Return the images that a run is evaluated on, by split: `validation` (if any) and `test`.

    With them come the positions of those that are held out for validation; None: all of the split, in order.
    """
    settings, validation = run.config.train, data.validation
    held_out = settings.held_out(len(data.train))
    found: dict[str, tuple[Split, Int[Tensor, " image"] | None]] = {}
    if validation is not None:
        found["validation"] = validation, None
    elif held_out:
        positions = divided(data.train.labels, held_out, settings.seed)[1]
        found["validation"] = data.train, torch.from_numpy(positions)
    return found | {"test": (data.test, None)}


def _other_contents(run: RunFolder, data: Dataset, split: str) -> list[str]:
    """Name what of a split is other than in training."""
    images, positions = evaluated_splits(run, data)[split]
    found = split_digests(split if positions is None else "training", images)
    if positions is not None:
        found |= held_out_digest(positions)
    recorded = run.metadata["dataset"].get("sha256", {})
    return [name for name, digest in found.items() if recorded.get(name, digest) != digest]


def _lacks_predictions(run: RunFolder) -> bool:
    """Whether predictions.npz of a finished run is absent or damaged; where summary.json is, nobody knows."""
    try:
        finished = run.finished
    except CheckpointError:
        return False
    try:
        if finished:
            read_predictions(run)
    except CheckpointError:
        return True
    return False


def _write(run: RunFolder, predictions: Mapping[str, Predictions]) -> None:
    """Write predictions.npz, and say so; the scores do not depend on it."""
    try:
        write_predictions(run.path, predictions)
    except OSError as error:
        warn(f"{run.path / NAME} is not written: {error.strerror}")
    else:
        note(f"{run.path / NAME} was absent or damaged, and is written again")
