"""Evaluation of a finished run."""

from codistill.core.console import warn
from codistill.core.device import choose_device
from codistill.data.augment import DeviceImages
from codistill.evaluation.evaluation import evaluate
from codistill.evaluation.metrics import Scores
from codistill.runs.folder import RunFolder
from codistill.runs.metadata import split_digests


def evaluate_run(
    run: RunFolder, which: str = "last", data_dir: str | None = None, device: str = "auto", skip_bad: bool = False
) -> dict[str, Scores]:
    """Score a checkpoint of a run on the test set of its data set, in the precision in which its training did.

    A test set with other images or labels than in training is scored, and a warning says that it is another one.

    Args:
        run: The run.
        which: The `last` or the `best` checkpoint.
        data_dir: Where the data set is now, if not where it was in training.
        device: cpu, cuda, cuda:1 or auto.
        skip_bad: Whether a folder's images that cannot be read are left out, where the training had none.

    Raises:
        CheckpointError: No whole checkpoint.
        DataError: The data set is missing or damaged, or has other classes or another image size than in training.
    """
    config = run.config
    where = choose_device(device, config.execution.precision)
    data, facts = run.load_data(data_dir, skip_bad), run.metadata["dataset"]
    recorded = facts.get("sha256", {})
    found = split_digests("test", data.test)
    if differ := [name for name, digest in found.items() if recorded.get(name, digest) != digest]:
        words = f"{' and '.join(differ)} of {run.config.data} are other ones (SHA-256) than in training"
        warn(f"{run.path}: {words}: its scores in summary.json are not comparable with these")
    images = DeviceImages(data.test, (facts["mean"], facts["std"]), where)
    method = run.load_method(which)
    method.choose_memory_format(images.batch(0, 1)[0])
    method.to(where, memory_format=method.memory_format)  # type: ignore[call-overload]
    return evaluate(method, images, config.execution.scored_in, seed=config.train.seed)
