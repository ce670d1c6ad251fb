"""The weights that a run starts from: drawn from its seed, where they are not its user's own."""

from pathlib import Path
from typing import Any

import torch

from codistill.core.errors import UsageError
from codistill.core.randomness import CPU, INIT_STREAM, draws_kept, seed_draws, stream_seed
from codistill.methods import METHODS, Method
from codistill.networks import NETWORKS, Network, network
from codistill.networks.origin import DRAWN, drawn_from, origin_of
from codistill.runs.metadata import weights_digest


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
    from_recipe = all(origin == drawn_from(seed) for origin in origins.values())
    if not from_recipe:
        reference, from_recipe = drawn_like(method, seed)
        drawn = reference.state_dict() if reference is not None else {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                fresh = str(origins[name]).startswith(DRAWN)
                if fresh and name in drawn and drawn[name].shape == tensor.shape:
                    tensor.copy_(drawn[name])
        from_recipe = from_recipe and reference is not None and weights_digest(method) == weights_digest(reference)
    trained_in = sorted({str(origin) for origin in origins.values() if isinstance(origin, Path)})
    return {"sha256": weights_digest(method), "from_recipe": from_recipe, "trained_in": trained_in}


def drawn_like(method: Method, seed: int) -> tuple[Method | None, bool]:
    """Make a method again with weights from a seed, and tell whether it is what its settings alone lead to.

    Weights of students that are the user's own are in it too, since a method's own modules may start as their copies.
    None: it is made in a way that only the user's program knows.
    """
    if type(method).__init__ is not Method.__init__:
        return None, False
    mine = {index: each for index, each in enumerate(method.cohort) if each.spec.partition(":")[0] not in NETWORKS}
    stages = {index: each.stages for index, each in mine.items()}
    alone = not mine and METHODS.get(method.name) is type(method)
    try:
        with draws_kept(CPU):
            seed_draws(stream_seed(seed, INIT_STREAM), CPU)
            students: list[Network] = []
            for index, student in enumerate(method.cohort):
                students.append(mine[index] if index in mine else network(student.spec, method.num_classes))
                alone &= index in mine or not take_own(students[-1], student)
            return type(method)(students, method.num_classes, method.settings, method.image_size), alone
    except UsageError:  # networks that are not what they are called
        return None, False
    finally:
        for index, each in mine.items():
            each.stages = stages[index]  # a trunk of the copies may have taken their place


def take_own(drawn: Network, student: Network) -> bool:
    """Copy weights of a student that are its user's own into one that was drawn; return whether that changed it."""
    there, changed = drawn.state_dict(), False
    with torch.no_grad():
        for name, tensor in student.state_dict(keep_vars=True).items():
            if str(origin_of(tensor)).startswith(DRAWN) or name not in there or there[name].shape != tensor.shape:
                continue
            own = tensor.detach().cpu()
            changed |= not torch.equal(own, there[name])
            there[name].copy_(own)
    return changed
