"""From a run's settings to its data set and its method."""

from collections.abc import Sequence

from codistill.core.errors import CheckpointError, UsageError
from codistill.core.randomness import CPU, INIT_STREAM, draws_kept, seed_draws, stream_seed
from codistill.data.dataset import Dataset, dataset
from codistill.methods import METHODS, Method
from codistill.methods.mistakes import blamed
from codistill.networks import NETWORKS, network
from codistill.networks.origin import drawn_from, mark
from codistill.settings.config import RunConfig


def unbuildable(method: str, networks: Sequence[str] = ()) -> str:
    """Return why this program cannot build a method with its networks by their names; empty: it can."""
    if method not in METHODS:
        return f"method {method!r} is not registered in this program"
    if "" in networks:
        return "the run has networks of your own, that have no name"
    unknown = [name for name in (spec.partition(":")[0] for spec in networks) if name not in NETWORKS]
    return f"network {unknown[0]!r} is not registered in this program" if unknown else ""


def build_method(config: RunConfig, num_classes: int, image_size: tuple[int, int]) -> Method:
    """Build a method with new networks; the weights are a pure function of the seed.

    Raises:
        UsageError: Networks, method and settings do not go together.
        CheckpointError: A network has no name to build it from.
    """
    if not config.networks:
        raise UsageError("no networks: name one for each student, for example --networks resnet20 resnet20")
    if "" in config.networks:
        raise CheckpointError("the run was trained with networks of your own, which only your program can build")
    with draws_kept(CPU):
        seed_draws(stream_seed(config.train.seed, INIT_STREAM), CPU)
        students = [network(spec, num_classes) for spec in config.networks]
        kind = METHODS[config.method_name]
        with blamed(kind, "its construction"):
            method = kind(students, num_classes, config.method, image_size)
    mark(method, drawn_from(config.train.seed))
    return method


def load_named_data(config: RunConfig) -> Dataset:
    """Load the data set that a run names."""
    if not config.data:
        raise UsageError("no data set: name one with --data, for example --data digits")
    return dataset(config.data, config.data_dir)
