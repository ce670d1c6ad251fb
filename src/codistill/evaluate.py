"""Evaluation of every predictor of a method in one pass over a split."""

import torch
from torch import Tensor

from codistill.cohort import Outputs
from codistill.data.augment import DeviceImages
from codistill.device import autocast, choose_device
from codistill.health import DiversitySums
from codistill.methods import Method
from codistill.metrics import ClassificationSums, Scores, scores
from codistill.run import Run

EVALUATION_BATCH = 1000


@torch.no_grad()
def evaluate(
    method: Method,
    images: DeviceImages,
    precision: str = "float32",
    batch_size: int = EVALUATION_BATCH,
    diversity: DiversitySums | None = None,
) -> dict[str, Scores]:
    """Score each student, the ensemble and the fused classifier with batch normalisation's running statistics.

    Everything is summed on the device; the host reads once, at the end.

    Args:
        method: Left in the mode, training or evaluation, that it was in.
        images: The split, on the method's device.
        precision: float32 or bf16, as in training.
        batch_size: Images per forward pass; no influence on the scores but rounding.
        diversity: Where to add how the students differ.

    Returns:
        Scores by the names of `Method.predictions`.
    """
    device = images.labels.device
    sums: dict[str, ClassificationSums] = {}
    was_training = method.training
    method.eval()
    for start in range(0, len(images), batch_size):
        pixels, labels = images.plain(start, start + batch_size)
        with autocast(device, precision):
            outputs: Outputs = method(pixels)
            predictions: dict[str, Tensor] = method.predictions(outputs)
        if diversity is not None:
            diversity.update(outputs.logits)
        for name, logits in predictions.items():
            sums.setdefault(name, ClassificationSums(device)).update(logits, labels)
    method.train(was_training)
    packed = torch.stack([each.packed() for each in sums.values()]).tolist()
    return {name: scores(numbers) for name, numbers in zip(sums, packed, strict=True)}


def evaluate_run(run: Run, which: str = "last", data_dir: str | None = None, device: str = "auto") -> dict[str, Scores]:
    """Score a checkpoint of a run on the test set of its data set, in the precision of its training.

    Args:
        run: The run.
        which: The `last` or the `best` checkpoint.
        data_dir: Where the data set is now, if not where it was in training.
        device: cpu, cuda, cuda:1 or auto.

    Raises:
        CheckpointError: No whole checkpoint.
        DataError: The data set is missing or damaged, or its images or classes are not those of the training.
    """
    config = run.config
    where = choose_device(device, config.train.precision)
    data = run.load_data(data_dir)
    method = run.load_method(which).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = DeviceImages(data.test, (tuple(run.record["dataset"]["mean"]), tuple(run.record["dataset"]["std"])), where)
    return evaluate(method, images, config.train.precision)
