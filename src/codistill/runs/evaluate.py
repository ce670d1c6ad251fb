"""Evaluation of a finished run."""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from codistill.core.console import note, warn
from codistill.core.device import choose_device
from codistill.core.errors import CheckpointError, UsageError
from codistill.core.kinds import shown
from codistill.core.randomness import draws_kept
from codistill.data.dataset import Dataset, Split
from codistill.data.folder import class_folders, labelled_images
from codistill.data.images import Interpolation
from codistill.data.splitting import divided
from codistill.data.stream import on_device
from codistill.evaluation.evaluation import Evaluation
from codistill.evaluation.metrics import Scores, read_together
from codistill.evaluation.predictions import Predictions
from codistill.runs.folder import RunFolder
from codistill.runs.images import read_images
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
    """Score a checkpoint of a run, in the precision of the training.

    A test set with other images or labels than in training is scored, and a warning says that it is another one. Where
    predictions.npz of a finished run is absent or damaged, and the data are those of the training, it is written.

    Args:
        run: The run.
        which: The `last` or the `best` checkpoint.
        data_dir: Where the data set is now, if not where it was in training; or a folder of class folders, all of whose
            images are scored in place of the test set.
        device: cpu, cuda, cuda:1 or auto.
        skip_bad: Whether a folder's images that cannot be read are left out, where the training had none.
        split: The test set, or the validation images.

    Returns:
        Errors in percent and NLL in nats, by predictor: student0, student1, .., ensemble, fused; see `Scores`.

    Raises:
        UsageError: The run has no validation images, or there is no such split.
        CheckpointError: No whole checkpoint, or its logits are NaN or infinite.
        DataError: The data set is missing or damaged, or has other classes or another image size than in training.
    """
    return evaluate_images(run, which, data_dir, device, skip_bad, split)[0]


def evaluate_images(
    run: RunFolder,
    which: str = "last",
    data_dir: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    split: EvaluatedSplit = "test",
) -> tuple[dict[str, Scores], Predictions, bool]:
    """Score as `evaluate_run`; return what each predictor answered, too, and whether the images are the training's."""
    if split not in get_args(EvaluatedSplit):
        raise UsageError(f"split is {split!r}: take {' or '.join(get_args(EvaluatedSplit))}")
    config = run.config
    where = choose_device(device, config.execution.precision)
    facts = run.metadata["dataset"]
    other = _labelled_folder(run, Path(data_dir), skip_bad) if data_dir else None
    held = evaluated_splits(run, run.load_data(data_dir, skip_bad)) if other is None else {"test": Images(other)}
    if split not in held:
        why = (
            "it was trained without --validation" if other is None else f"{data_dir} is a folder of class folders alone"
        )
        raise UsageError(f"{run.path}: no validation images, for {why}: take --split test")
    differ = _other_contents(run, split, held[split]) if other is None else []
    if differ:
        words = f"{' and '.join(differ)} of {run.config.data} are other ones (SHA-256) than in training"
        warn(f"{run.path}: {words}: its scores in summary.json are not comparable with these")
    remade = other is None and which == "last" and _lacks_predictions(run)
    # All splits once more, in the order of the training, for the file holds them all.
    remade = remade and not any(_other_contents(run, name, each) for name, each in held.items())
    images = {}
    for name in held if remade else [split]:
        whole, positions = held[name]
        images[name] = on_device(whole, (facts["mean"], facts["std"]), where, config.execution.stream)
        if positions is not None:
            images[name] = images[name].subset(positions)
    methods = [run.load_method(which, averaged) for averaged in ((False, True) if run.averages else (False,))]
    for method in methods:
        method.choose_memory_format(images[split].batch(0, 1)[0])
        method.to(where, memory_format=method.memory_format)  # type: ignore[call-overload]
    precision, averaged = config.execution.scored_in, methods[1] if run.averages else None
    evaluation = Evaluation(methods[0], images, precision, seed=config.train.seed, averaged=averaged)
    with draws_kept(where):
        evaluation.run()
    scores, predictions = evaluation.scored(read_together(evaluation.tensors())), evaluation.predictions()
    if bad := [name for name, each in scores[split][0].items() if not math.isfinite(each.nll)]:
        words = f"logits of {', '.join(bad)} are NaN or infinite on the {split} images"
        raise CheckpointError(f"{run.path}: the {which} checkpoint is of no use: {words}: try another one (last, best)")
    if remade:
        _write(run, predictions)
    return scores[split][0], predictions[split], other is None and not differ


def _labelled_folder(run: RunFolder, place: Path, skip_bad: bool) -> Split | None:
    """Return the images of a folder of class folders; None: it is none, or has most of the run's files.

    Their size and scaling are those of the training. A warning tells of those that are named as training images are.
    """
    names, used = class_folders(place), read_images(run.path)
    if names is None or (used and 2 * len(used.keys() & set(names)) >= len(used)):
        return None
    known: dict[str, set[str]] = defaultdict(set)
    for name, split in used.items():
        known[split].update((name, name.partition("/")[2]))  # as below the folder of its split
    trained = [name for name in names if name in known["train"] | known["validation"]]
    if set(trained) - known["test"]:
        words = f"{len(trained)} of {len(names)} images of {place} are named as training images, such as {trained[0]}"
        warn(f"{run.path}: {words}: if they are these, the errors are too optimistic")
    scaled = run.metadata["dataset"].get("preprocessing", {"interpolation": "bilinear"})
    interpolation: Any = scaled.get("interpolation") if isinstance(scaled, dict) else None
    if interpolation not in get_args(Interpolation):
        raise CheckpointError(f"{run.path}/config.json: damaged: preprocessing of the dataset is {shown(scaled)}")
    return labelled_images(place, run.class_names, run.image_size, interpolation, skip_bad)


class Images(NamedTuple):
    """Images that are evaluated: a split of a data set, or those at some positions of it."""

    split: Split
    positions: Int[Tensor, " image"] | None = None


def evaluated_splits(run: RunFolder, data: Dataset) -> dict[str, Images]:
    """Return the images that a run is evaluated on: `validation` (if any), and `test`."""
    settings, validation = run.config.train, data.validation
    held_out = settings.held_out(len(data.train))
    found: dict[str, Images] = {}
    if validation is not None:
        found["validation"] = Images(validation)
    elif held_out:
        positions = divided(data.train.labels, held_out, settings.seed)[1]
        found["validation"] = Images(data.train, torch.from_numpy(positions))
    return found | {"test": Images(data.test)}


def _other_contents(run: RunFolder, name: str, images: Images) -> list[str]:
    """Name what of a split is other than in training."""
    found = split_digests(name if images.positions is None else "training", images.split)
    if images.positions is not None:
        found |= held_out_digest(images.positions)
    recorded = run.metadata["dataset"].get("sha256", {})
    return [kind for kind, digest in found.items() if recorded.get(kind, digest) != digest]


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
