"""From a run's settings to its data set and its method."""

import re
from collections.abc import Sequence

from codistill.core.errors import CheckpointError, UsageError
from codistill.core.randomness import CPU, INIT_STREAM, draws_kept, seed_draws, stream_seed
from codistill.data.dataset import Dataset, dataset
from codistill.data.store import stored_in
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


def build_method(config: RunConfig, num_classes: int, image_size: tuple[int, int], fresh: bool = False) -> Method:
    """Build a method with new networks; the weights are a pure function of the seed.

    `fresh` says that it is to be trained: then weights of others that the run names are fetched and read.

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
        files = weights_of(config) if fresh else {}
        students = [
            network(spec, num_classes, image_size=image_size, fresh=fresh, weights=files.get(index))
            for index, spec in enumerate(config.networks)
        ]
        kind = METHODS[config.method_name]
        with blamed(kind, "its construction"):
            method = kind(students, num_classes, config.method, image_size)
    shared = method.cohort.shared_stages
    if shared and files and 0 not in files:
        fix = "name a file for student0, or set method.shared_stages to 0"
        raise UsageError(f"weights {config.weights[0]!r}: the {shared} stages that all share are student0's: {fix}")
    mark(method, drawn_from(config.train.seed))
    return method


def weights_of(config: RunConfig) -> dict[int, str]:
    """Return the files of weights that students begin with, by the student's index.

    Raises:
        UsageError: One of them is not written as `student0=FILE`, or there is no such student.
    """
    files: dict[int, str] = {}
    for each in config.weights:
        name, _, file = each.partition("=")
        index = int(name[7:]) if re.fullmatch(r"student\d{1,4}", name, re.ASCII) else -1
        if index < 0 or not file or index in files:
            again = f"names {name} twice" if index in files else "is no weights of a student"
            raise UsageError(f"weights {each!r} {again}: write student0=FILE")
        if index >= len(config.networks):
            last = len(config.networks) - 1
            raise UsageError(f"weights {each!r}: there is no {name}: the students are student0 to student{last}")
        files[index] = file
    return files


def load_named_data(config: RunConfig) -> Dataset:
    """Load the data set that a run names."""
    if not config.data:
        raise UsageError("no data set: name one with --data, for example --data digits")
    with stored_in(config.execution.data_cache):
        return dataset(config.data, config.data_dir)
