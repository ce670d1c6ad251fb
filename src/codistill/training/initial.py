"""The weights that a run starts from: drawn from its seed, where they are not its user's own."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codistill.core.console import note_once
from codistill.core.errors import UsageError
from codistill.core.randomness import CPU, INIT_STREAM, draws_kept, seed_draws, stream_seed
from codistill.methods import METHODS, Method
from codistill.networks import NETWORKS, Network, network
from codistill.networks.origin import DRAWN, drawn_from, mark, origin_of
from codistill.runs.folder import RunFolder
from codistill.runs.metadata import weights_digest
from codistill.runs.state import tensors_once

STAGE = re.compile(r"(cohort\.students\.)(\d+)(\.stages\..*)")
"""The name of a tensor of a student's stages: the number is the second group."""


def draw_weights(method: Method, seed: int) -> dict[str, Any]:
    """Draw the weights of a method from a run's seed, in place, as the command line does, and describe the result.

    Only those that are still as `network` and the method have drawn them: weights that were loaded, trained or made in
    another way stay.

    Returns:
        What config.json records: `sha256` of all weights; `from_recipe`, whether the settings alone lead to them; and
        `trained_in`, the folders of the runs in which some of them were trained.
    """
    tensors = method.state_dict(keep_vars=True)
    origins = {name: origin_of(tensor) for name, tensor in tensors.items()}
    seeded = {name for name, origin in origins.items() if origin == drawn_from(seed)}
    fresh = {name for name, origin in origins.items() if str(origin).startswith(DRAWN)}
    from_recipe = len(seeded) == len(tensors)
    if not from_recipe:
        say_who_is_drawn(method, origins, seed)
        like = drawn_like(method, seed)
        drawn = like.state_dict() if like is not None else {}
        for name in fresh & drawn.keys():
            if drawn[name].shape == tensors[name].shape:
                with torch.no_grad():
                    tensors[name].copy_(drawn[name])
                mark(tensors[name], drawn_from(seed))
        named = all(registered(student) for student in method.cohort) and METHODS.get(method.name) is type(method)
        if named and len(fresh) < len(tensors):
            like = drawn_like(method, seed, own=False)
        from_recipe = named and like is not None and weights_digest(method) == weights_digest(like)
    students = [origin for name, origin in origins.items() if not name.startswith("teacher_parts.")]
    trained_in = sorted({str(origin) for origin in students if isinstance(origin, Path)})
    return {"sha256": weights_digest(method), "from_recipe": from_recipe, "trained_in": trained_in}


def say_who_is_drawn(method: Method, origins: Mapping[str, str | Path | None], seed: int) -> None:
    """Show it where weights that the user has set stay, and those of another student are drawn from the seed."""
    own = {
        index: {origins[name] for name in origins if name.startswith(f"cohort.students.{index}.")}
        for index in range(len(method.cohort))
    }
    kept = [f"student{index}" for index, found in own.items() if None in found]
    drawn = [f"student{index}" for index, found in own.items() if all(str(each).startswith(DRAWN) for each in found)]
    if kept and drawn:
        note_once(f"weights of {', '.join(kept)} stay as set; those of {', '.join(drawn)} are drawn from seed {seed}")


@dataclass(frozen=True)
class Origin:
    """A run whose weights another one starts from: its classes, and the tensors of its last checkpoint."""

    run: str
    classes: Sequence[str]
    weights: Mapping[str, Tensor]


def read_weights(path: str) -> Origin:
    """Read the weights of a run's last checkpoint; raise `CheckpointError` where there are none."""
    run = RunFolder(path)
    return Origin(path, run.class_names, run.checkpoints.load().method)


def start_from(method: Method, origin: Origin, classes: Sequence[str]) -> dict[str, Any]:
    """Copy the weights of a run into a method, by name, and describe the result; what is not in the run stays drawn.

    Students of the same number have the same stages. Heads and the method's own modules are taken where they are there
    in the same shape, and the classes are the same in the same order.

    Returns:
        What changes in the description of `draw_weights`, and a line, `from`, about what was taken and what drawn.

    Raises:
        UsageError: A student of the run is another network.
    """
    own, there = tensors_once(method), origin.weights
    for name in there:
        stage = STAGE.match(name)
        if stage and int(stage[2]) < len(method.cohort) and not {name, f"{stage[1]}0{stage[3]}"} & own.keys():
            what = f"its student{stage[2]} is another network: {name} is not here"
            raise UsageError(f"init {origin.run}: {what}: name the same --networks")
    same = list(classes) == list(origin.classes)
    taken: dict[str, Tensor] = {}
    for name, tensor in own.items():
        stage = STAGE.match(name)
        source = there.get(name)
        if stage and any(each.startswith(f"{stage[1]}{stage[2]}.") for each in there):
            if source is None:  # a shared stage has the name of the first student
                source = there.get(f"{stage[1]}0{stage[3]}")
            if source is None or source.shape != tensor.shape:
                found = "nothing" if source is None else list(source.shape)
                raise UsageError(
                    f"init {origin.run}: its student{stage[2]} is another network: {name} is {found} there and "
                    f"{list(tensor.shape)} here: name the same --networks"
                )
            taken[name] = source
        elif source is not None and same and source.shape == tensor.shape:
            taken[name] = source
    with torch.no_grad():
        for name, source in taken.items():
            own[name].copy_(source)
    left = dict.fromkeys(
        re.sub(r"^cohort\.students\.(\d+)\.(stages|head)\..*", r"\2 of student\1", n) for n in own if n not in taken
    )
    left = dict.fromkeys(each if " of " in each else each.partition(".")[0] for each in left)
    drawn = f"; drawn from the seed: {', '.join(left)}" if left else ""
    why = "" if same else " (the classes are others)"
    line = f"weights of {origin.run}: {len(taken)} of {len(own)} tensors{drawn}{why}"
    return {"sha256": weights_digest(method), "from": line}


def registered(student: Network) -> bool:
    """Whether a student has a name that builds it."""
    return student.spec.partition(":")[0] in NETWORKS


def drawn_like(method: Method, seed: int, own: bool = True) -> Method | None:
    """Make a method like another with weights from a seed; None: it is made in a way that only a user's program knows.

    With `own`, weights of its students that are the user's own are in it: a method's modules may start as their copies.
    """
    if type(method).__init__ is not Method.__init__:
        return None
    mine = {index: (each, each.stages) for index, each in enumerate(method.cohort) if not registered(each)}
    try:
        with draws_kept(CPU):
            seed_draws(stream_seed(seed, INIT_STREAM), CPU)
            students: list[Network] = []
            for index, student in enumerate(method.cohort):
                size = method.image_size
                students.append(
                    student if index in mine else network(student.spec, method.num_classes, image_size=size)
                )
                if own and index not in mine:
                    take_own(students[-1], student)
            like = type(method)(students, method.num_classes, method.settings, method.image_size)
            if method.taught_by is not None:
                like.connectors = nn.ModuleList(like.connect(method.taught_by.network))
                like.teacher_parts = method.teacher_parts
            return like
    except UsageError:  # networks that are not what they are called
        return None
    finally:
        for each, stages in mine.values():
            each.stages = stages  # a trunk of the copies may have taken their place


def take_own(drawn: Network, student: Network) -> None:
    """Copy weights of a student that are its user's own into one that was drawn."""
    there = drawn.state_dict()
    with torch.no_grad():
        for name, tensor in student.state_dict(keep_vars=True).items():
            fresh = str(origin_of(tensor)).startswith(DRAWN)
            if not fresh and name in there and there[name].shape == tensor.shape:
                there[name].copy_(tensor)
