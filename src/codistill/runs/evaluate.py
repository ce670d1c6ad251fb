"""Evaluation of a finished run."""

import torch

from codistill.core.device import choose_device
from codistill.data.augment import DeviceImages
from codistill.evaluation.evaluation import evaluate
from codistill.evaluation.metrics import Scores
from codistill.runs.folder import RunFolder


def evaluate_run(
    run: RunFolder, which: str = "last", data_dir: str | None = None, device: str = "auto"
) -> dict[str, Scores]:
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
    where = choose_device(device, config.execution.precision)
    data, facts = run.load_data(data_dir), run.metadata["dataset"]
    method = run.load_method(which).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = DeviceImages(data.test, (facts["mean"], facts["std"]), where)
    return evaluate(method, images, config.execution.precision)
