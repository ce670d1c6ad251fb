"""The epochs of one run, or of several that train side by side: steps, evaluation, signals, and one read at the end."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from codistill.core.errors import CodistillError, DivergedError
from codistill.core.imports import resuming
from codistill.core.randomness import draws_kept
from codistill.core.signals import SignalRequests, defer_signals
from codistill.evaluation.metrics import read_together
from codistill.methods.mistakes import blamed
from codistill.runs.state import TrainingState
from codistill.training.capture import EagerSteps, GraphedSteps, make_fleet
from codistill.training.trainer import Trainer


def train_loop(
    trainers: Sequence[Trainer],
    diverged: Callable[[Trainer, DivergedError], None],
    after_step: Callable[[int, int], None] = lambda epoch, step: None,
) -> None:
    """Train runs side by side until their last epoch; each ends as it would have ended alone, and when it would have.

    The host waits for the device once an epoch: terms, scores and the state's copy come together. Files are written
    during the next epoch.

    Args:
        trainers: Runs with the same number of images, batch size and epochs, at the same position.
        diverged: Called with a run that diverged and is dropped; the others continue.
        after_step: Called with the epoch, from 0, and the number of its steps that are done.

    Raises:
        CodistillError: What the first of those runs met that could not be written to their ends; the others are
            finished.
    """
    ended, active = ([each for each in trainers if each.over is over] for over in (True, False))
    started = time.monotonic()
    steps: GraphedSteps | EagerSteps | None = None
    lost: list[CodistillError] = []

    def finish() -> None:
        """Finish the runs that have ended; what one of them cannot write costs the others nothing."""
        while ended:
            trainer = ended.pop(0)
            try:
                with trainer.step.ranks.together():
                    if trainer.step.ranks.leads:
                        trainer.finish(time.monotonic() - started)
            except CodistillError as error:
                lost.append(error)

    shown: Trainer | None = None
    with draws_kept(trainers[0].step.device), defer_signals() as requests, contextlib.ExitStack() as display:
        # One signal may reach a rank from several sides.
        requests.insistent = trainers[0].step.ranks.count == 1
        for epoch in range(trainers[0].position[0], trainers[0].config.train.epochs):
            if not active:
                break
            if active[0] is not shown:
                display.close()
                shown = active[0]
                display.enter_context(shown.display)
            if any(epoch == trainer.initial_epochs > 0 for trainer in active):
                steps = None  # what was captured of the initialisation is over
            steps = steps or make_fleet([trainer.step for trainer in active])
            handle = functools.partial(handle_signals, requests, active, epoch)
            for number in train_epoch(active, steps, epoch):
                after_step(epoch, number)
                handle(number)
            for trainer in active:
                trainer.evaluate(functools.partial(handle, len(trainer.steps)))
            for trainer, (numbers, state) in zip(list(active), completed(active), strict=True):
                try:
                    trainer.end_epoch(epoch, numbers, state)
                except DivergedError as error:
                    diverged(trainer, error)
                    active.remove(trainer)
                    steps = None
            for trainer in [each for each in active if each.stops()]:
                active.remove(trainer)
                ended.append(trainer)
                steps = None
            if active:  # for those that are over before the others
                finish()
            if epoch == 0 and active and active[0].step.ranks.leads:
                active[0].suggest()
    finish()
    if lost:
        raise lost[0]


def train_epoch(trainers: Sequence[Trainer], steps: GraphedSteps | EagerSteps, epoch: int) -> Iterator[int]:
    """Do the steps of an epoch that are still to do in all runs, and yield after each its number, counted from 1."""
    first = trainers[0].first_step(epoch)
    indices = [trainer.begin_epoch(epoch) for trainer in trainers]
    progress = torch.full((), epoch / trainers[0].config.train.epochs, device=trainers[0].step.device)
    for trainer in trainers:
        trainer.stopwatch.start()
    left = trainers[0].steps[first:]
    staged = [trainer.step.images.staged(each, left) for trainer, each in zip(trainers, indices, strict=True)]
    for number, batches in enumerate(zip(*staged, strict=True), start=first + 1):
        for trainer, batch in zip(trainers, batches, strict=True):
            trainer.before_step(epoch, number)
            if (epoch, number) == (0, 1):
                trainer.show_images(batch)
        seeds = [trainer.draws_seed(epoch, number) for trainer in trainers]
        steps(batches, progress, seeds)
        trainers[0].after_step(epoch, number)
        yield number
    for trainer in trainers:
        trainer.stopwatch.stop()


def handle_signals(requests: SignalRequests, trainers: Sequence[Trainer], epoch: int, step: int) -> None:
    """Do what signals have asked for after a step: save the runs, and stop."""
    # All ranks stop after the same step, whichever of them a signal has reached.
    stopping, saving = trainers[0].step.ranks.largest(requests.stopping or 0, requests.saving)
    requests.stopping = stopping or requests.stopping
    if saving or stopping:
        requests.saving = False
        for trainer in trainers:
            trainer.save_inside(epoch, step)
    if stopping:
        again = resuming(*(trainer.run.path for trainer in trainers))
        requests.act(f"after step {step} of epoch {epoch + 1} and saved: {again}")


def completed(trainers: Sequence[Trainer]) -> list[tuple[dict[str, Any], TrainingState | None]]:
    """Read the numbers of an epoch of all runs at once, and copy their states to the host on the way."""
    numbers, states = {}, []
    for index, trainer in enumerate(trainers):
        leads = trainer.step.ranks.leads
        numbers[index] = trainer.tensors() if leads else {}
        with blamed(type(trainer.method), "after_epoch"):
            trainer.method.after_epoch()
        states.append(trainer.saver.copy(trainer.state()) if leads else None)
    return list(zip(read_together(numbers).values(), states, strict=True))
