"""The epochs of one run, or of several that train side by side: steps, evaluation, signals, and one read at the end."""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Sequence

import torch

from codistill.core.errors import DivergedError
from codistill.core.signals import SignalRequests, defer_signals
from codistill.evaluation.metrics import read_together
from codistill.runs.state import TrainingState
from codistill.training.capture import EagerSteps, GraphedSteps, make_fleet
from codistill.training.trainer import Trainer


def train_loop(
    loops: Sequence[Trainer],
    diverged: Callable[[Trainer, DivergedError], None],
    breaks: Collection[tuple[int, int]] = (),
) -> None:
    """Train runs side by side until their last epoch; each ends as it would have ended alone.

    The host waits for the device once an epoch: terms, scores and the state's copy come together. Writing goes on
    beside the next epoch.

    Args:
        loops: Runs with the same number of images, batch size and epochs, taken up at the same position.
        diverged: Called with a run that is dropped because a number of it is none any more; the others go on.
        breaks: Epochs, counted from 0, and steps done of them, after which to stop as at Ctrl-C.

    Raises:
        Interrupted: A signal or a break; all runs were saved before.
    """
    active = list(loops)
    started = time.monotonic()
    fleet: GraphedSteps | EagerSteps | None = None
    with contextlib.ExitStack() as shown:
        pending = shown.enter_context(defer_signals())
        pending.breaks = breaks
        # One signal may reach a rank from several sides.
        pending.insistent = loops[0].step.ranks.count == 1
        for loop in loops[:1]:
            shown.enter_context(loop.display)
        for epoch in range(loops[0].position[0], loops[0].config.train.epochs):
            fleet = fleet or make_fleet([loop.step for loop in active])
            train_epoch(active, fleet, epoch, functools.partial(handle_signals, pending, active, epoch))
            for loop in active:
                loop.evaluate(functools.partial(handle_signals, pending, active, epoch, len(loop.steps)))
            for loop, (numbers, state) in zip(list(active), completed(active), strict=True):
                try:
                    loop.end_epoch(epoch, numbers, state)
                except DivergedError as error:
                    diverged(loop, error)
                    active.remove(loop)
                    fleet = None
            if not active:
                return
    for loop in active:
        loop.method.cohort.streams.clear()
        with loop.step.ranks.together():
            if loop.step.ranks.leads:
                loop.finish(time.monotonic() - started)


def train_epoch(
    loops: Sequence[Trainer], fleet: GraphedSteps | EagerSteps, epoch: int, after_step: Callable[[int], None]
) -> None:
    """Run the steps of an epoch that are still to do for all runs, and call something after each with its number."""
    first = loops[0].first_step(epoch)
    plans = [loop.begin_epoch(epoch) for loop in loops]
    progress = torch.full((), epoch / loops[0].config.train.epochs, device=loops[0].step.images.labels.device)
    for loop in loops:
        loop.stopwatch.start()
    for number, (start, stop) in enumerate(loops[0].steps[first:], start=first + 1):
        fleet([plan.part(start, stop) for plan in plans], progress)
        loops[0].after_step(epoch, number)
        after_step(number)
    for loop in loops:
        loop.stopwatch.stop()


def handle_signals(pending: SignalRequests, loops: Sequence[Trainer], epoch: int, step: int) -> None:
    """Do what signals have asked for: save the runs, and stop.

    Args:
        pending: The signals.
        loops: The runs.
        epoch: Counted from 0.
        step: Steps done of it.
    """
    # All ranks stop after the same step, whichever of them a signal has reached.
    number, saving = loops[0].step.ranks.largest(pending.stopping or 0, pending.saving)
    pending.stopping = number or pending.stopping
    stopping = number or (epoch, step) in pending.breaks
    if saving or stopping:
        pending.saving = False
        for loop in loops:
            loop.save_inside(epoch, step)
    if stopping:
        runs = " ".join(str(loop.run.path) for loop in loops)
        pending.act(f"after step {step} of epoch {epoch + 1} and saved: codistill resume {runs}")


def completed(loops: Sequence[Trainer]) -> list[tuple[list[list[float]], TrainingState | None]]:
    """Read the numbers of an epoch of all runs at once, and copy their states to the host on the way."""
    vectors, states = [], []
    for loop in loops:
        leads = loop.step.ranks.leads
        vectors.append([loop.step.sums.packed(), *loop.guard.health(), *loop.evaluation.packed()] if leads else [])
        loop.method.after_epoch()
        states.append(loop.saver.copy(loop.state()) if leads else None)
    numbers = iter(read_together([vector for run in vectors for vector in run]) if any(vectors) else [])
    return [([next(numbers) for _ in run], state) for run, state in zip(vectors, states, strict=True)]
