"""Check on a user's own set-up that training resumes bit for bit: a short copy of it, with breaks and without."""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from codistill.core.device import choose_device
from codistill.core.errors import CheckpointError, UsageError
from codistill.core.signals import Interrupted
from codistill.core.torchrun import refuse_ranks
from codistill.data.dataset import Split
from codistill.deploy.run import Run
from codistill.runs.folder import Continued
from codistill.runs.state import TrainingState
from codistill.settings.build import load_named_data
from codistill.settings.config import RunConfig
from codistill.training.loop import train_loop
from codistill.training.prepare import build_taught, check, set_up
from codistill.training.resume import InterruptedRun
from codistill.training.train import fail

STEPS, TEST_IMAGES = 3, 200
# Epochs, counted from 0, and steps done of them: inside an epoch, before its evaluation, and inside the next.
BREAKS = ((0, 1), (0, STEPS), (1, 2))


def in_pairs(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the positions of images, two of one class after each other; a last one without a second is left out."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[place < np.repeat(counts // 2 * 2, counts)]


def part(split: Split, positions: slice | npt.NDArray[np.int64]) -> Split:
    """Return some images of a split, with their labels and, where it has them, their files."""
    files = np.array(split.files, dtype=object)[positions] if split.files else ()
    return Split(split.images[positions], split.labels[positions], tuple(files))


def verify_resume(config: RunConfig) -> str:
    """Train two epochs of three steps without a break, and again with three breaks; return what was compared."""
    refuse_ranks("--verify-resume")
    device = choose_device(config.execution.device, config.execution.precision)
    data = load_named_data(config)
    data = dataclasses.replace(data, test=part(data.test, slice(TEST_IMAGES)))
    size, count = config.train.batch_size, len(data.train)
    size = min(size, count // STEPS)
    if config.augment.sampling == "class-pairs":
        pairs = in_pairs(data.train.labels)
        size = min(size, len(pairs) // STEPS) // 2 * 2
        pairs = pairs[: STEPS * size]
        data = dataclasses.replace(data, train=part(data.train, pairs))
    if size < 2:
        raise UsageError(f"--verify-resume trains {STEPS} steps of at least two images: {data.name} has too few")
    warm_up = min(config.train.warm_up, 1)
    settings = dataclasses.replace(config.train, epochs=2, milestones=None, validation=0, patience=0, warm_up=warm_up)
    settings = dataclasses.replace(settings, train_limit=STEPS * size, batch_size=size)
    short = dataclasses.replace(config, train=settings)

    def train(out: Path, stop: tuple[int, int] | None, continued: Continued | None = None) -> None:
        """Train or resume, and stop after a step as after Ctrl-C."""
        plan = check(build_taught(short, data), data, short, device)

        def after_step(epoch: int, step: int) -> None:
            if (epoch, step) == stop:
                trainer.save_inside(epoch, step)
                raise Interrupted

        with set_up(plan, out, show=False, continued=continued) as trainer:
            train_loop([trainer], fail, after_step)

    with tempfile.TemporaryDirectory(prefix="codistill-verify-") as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        train(whole, None)
        continued = None
        for place in (*BREAKS, None):
            with contextlib.suppress(Interrupted):
                train(broken, place, continued)
            continued = InterruptedRun(Run(broken), {}).continued if place else None
        return compared(Run(whole), Run(broken), device, config.execution.deterministic)


def compared(whole: Run, broken: Run, device: torch.device, deterministic: bool) -> str:
    """Compare the ends of two runs bit for bit: parameters, buffers, optimiser, averages and metrics."""
    first, second = (dict(tensors(run.checkpoints.load())) for run in (whole, broken))
    different = [name for name in first if not same_bits(first[name], second[name])]
    if end_state(whole) != end_state(broken):
        fix = "" if device.type == "cpu" or deterministic else ": add --deterministic"
        raise CheckpointError(
            f"resume is not bit for bit here: {len(different)} of {len(first)} tensors differ"
            f"{f', first {different[0]}' if different else ' but metrics do'}{fix}"
        )
    return (
        f"resume verified: {len(BREAKS)} breaks in {2 * STEPS} steps change no bit of {len(first)} tensors "
        f"(parameters, buffers, optimiser, averages) nor of the metrics"
    )


def end_state(run: Run) -> str:
    """Return the SHA-256 of the end of a run: position, parameters, buffers, momentum, metrics without times."""
    state = run.checkpoints.load()
    digest = hashlib.sha256(json.dumps([*state.position, scores(run)]).encode())
    for name, tensor in sorted(tensors(state)):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensors(state: TrainingState) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint by name."""
    yield from state.method.items()
    yield from ((f"momentum {index}", each) for index, each in enumerate(state.momentum))
    yield from ((f"average of {name}", each) for name, each in state.ema.items())


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return first.contiguous().numpy().tobytes() == second.contiguous().numpy().tobytes()


def scores(run: Run) -> list[dict[str, Any]]:
    """Return a run's metrics without times."""
    clock = ("seconds", "images_per_second")
    return [{key: value for key, value in row.items() if key not in clock} for row in run.metrics()]
