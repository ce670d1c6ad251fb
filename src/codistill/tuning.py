"""The fastest execution of a run's steps on this GPU: measured once, and kept for later runs."""

import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from codistill.checkpoint import write_json
from codistill.config import RunConfig
from codistill.data.augment import Augmentation, DeviceImages, epoch_plan
from codistill.errors import ResourceError
from codistill.execution import Execution, choices
from codistill.host import cache_folder
from codistill.methods import Method
from codistill.notices import note, warn
from codistill.optim import make_optimizer
from codistill.record import VERSION
from codistill.step import CapturedFleet, PlainStep

WORTHWHILE_STEPS = 20_000
"""Steps from which on a measurement, well under a minute, is less than what it can save."""
CHECKED_STEPS = 8
"""Steps after which losses are compared: some are plain ones, the others captured."""
TOLERANCE = 0.05
"""Share by which a loss may differ from that of the first execution, for other kernels round otherwise."""
MOST_RUNS = 6
"""Runs that are measured side by side, at most; more hardly change which execution is the fastest."""
ROUNDS, ROUND_SECONDS = 3, 0.15
GAIN = 0.02
"""Share of the first execution's time that another one must save to be chosen."""

CHOSEN: dict[str, Execution] = {}
"""What this process has measured: runs side by side are executed alike, whether or not it can be kept for others."""


@dataclass(frozen=True)
class Trial:
    """What a short training with an execution gave.

    Attributes:
        milliseconds: Of a step of one run.
        loss: Mean over the first steps.
    """

    milliseconds: float
    loss: float


def choose_execution(
    method: Method,
    config: RunConfig,
    images: Callable[[], DeviceImages],
    augmentation: Augmentation,
    device: torch.device,
    runs: int = 1,
    steps: int = WORTHWHILE_STEPS,
) -> Execution:
    """Choose how steps are computed: as settings say, and where they say auto, the fastest way on this GPU.

    To find it, copies of the method are trained for a moment with each execution, as many side by side as there are
    runs. One that fails or gives other losses is left out, and a line says so. What was found is kept in the user's
    cache folder for the same method, networks, batch size, GPU and versions.

    Args:
        method: Left as it is.
        config: Its settings.
        images: Gives at least a batch of images on the device; called where something is measured.
        augmentation: Crops and flips.
        device: Where is trained.
        runs: How many runs train side by side.
        steps: Training steps of a run. Too few for a measurement to pay: what is known, or needs no measurement.
    """
    listed, runs = choices(config.train, device, runs, steps), min(runs, MOST_RUNS)
    if not method.capturable:
        return dataclasses.replace(listed[0], overlap=False)
    if len(listed) == 1:
        return listed[0]
    name = key(method, config, listed, device, runs)
    path = place(name)
    known = CHOSEN.get(name) or read(path, listed)
    if known is not None or steps < WORTHWHILE_STEPS:
        return known or listed[0]
    note("measuring which way to compute a step is the fastest, once for this GPU")
    trials = measured(listed, functools.partial(trial, method, config, images(), augmentation, runs), device)
    if listed[0] not in trials:
        return listed[0]  # the run itself will say what is wrong
    best = CHOSEN[name] = fastest(listed[0], trials)
    keep(path, best, trials)
    return best


def measured(
    listed: Sequence[Execution], measure: Callable[[Execution], Trial], device: torch.device
) -> dict[Execution, Trial]:
    """Try executions, and give those that did well beside the first one; nothing where that did not.

    Overlap is tried both ways with the fastest of the others only.
    """
    first = listed[0]
    trials: dict[Execution, Trial] = {}

    def attempt(execution: Execution) -> None:
        try:
            found = measure(execution)
        except Exception as error:  # whatever it is, there is another way
            torch.cuda.synchronize(device)  # before what it still works on is freed
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        else:
            reason = doubt(found, trials.get(first, found))
            if not reason:
                trials[execution] = found
        # Graphs and what they hold go back before the next one needs memory.
        gc.collect()
        torch.cuda.empty_cache()
        if reason and execution != first:
            warn(f"a step with {execution} is left out: {reason}")

    for execution in listed:
        if execution.overlap == first.overlap and (execution == first or first in trials):
            attempt(execution)
    if first in trials:
        best = fastest(first, trials)
        other = dataclasses.replace(best, overlap=not best.overlap)
        if other in listed:
            attempt(other)
    return trials


def trial(
    method: Method,
    config: RunConfig,
    images: DeviceImages,
    augmentation: Augmentation,
    runs: int,
    execution: Execution,
) -> Trial:
    """Train copies of a method for a moment."""
    settings, device = config.train, images.labels.device
    members = []
    for _ in range(runs):
        probe = copy.deepcopy(method)
        execution.prepare(probe, device, settings.deterministic)
        probe.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = make_optimizer(
            probe, settings.learning_rate, settings.momentum, settings.nesterov, settings.weight_decay
        )
        members.append(PlainStep(probe, images, augmentation, optimizer, settings.precision, execution=execution))
    fleet = CapturedFleet(members)
    plan = epoch_plan(len(images), settings.seed, 0, augmentation, device, method.views)
    plan = plan.part(0, settings.batch_size)
    progress = torch.full((), 0.5, device=device)

    def seconds(count: int) -> float:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            fleet([plan] * runs, progress)
        torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / count

    seconds(CHECKED_STEPS)
    loss = members[0].sums.means()["loss"]
    pace = seconds(CHECKED_STEPS)
    rounds = [seconds(max(1, round(ROUND_SECONDS / pace))) for _ in range(ROUNDS)]
    return Trial(1000 * min(rounds) / runs, loss)


def doubt(found: Trial, first: Trial) -> str:
    """Say what is wrong with a trial beside that of the first execution; nothing: empty."""
    if abs(found.loss - first.loss) <= TOLERANCE * abs(first.loss):
        return ""
    return f"its loss in the first {CHECKED_STEPS} steps is {found.loss:.4f} and should be about {first.loss:.4f}"


def fastest(first: Execution, trials: dict[Execution, Trial]) -> Execution:
    """Choose the fastest execution; the first one unless another is clearly faster."""
    best = min(trials, key=lambda each: trials[each].milliseconds)
    return best if trials[best].milliseconds < (1 - GAIN) * trials[first].milliseconds else first


def key(method: Method, config: RunConfig, listed: Sequence[Execution], device: torch.device, runs: int) -> str:
    """Name what a measurement holds for."""
    settings = config.train
    facts = {
        "versions": [VERSION, torch.__version__, torch.version.cuda],
        "gpu": torch.cuda.get_device_name(device),
        "method": repr(method),
        "settings": dataclasses.asdict(config.method),
        "training": [settings.batch_size, settings.precision, runs, *method.image_size],
        "choices": [str(each) for each in listed],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def place(name: str) -> Path | None:
    """Give the file of a measurement; None: nobody knows where the user's cache folder is."""
    with contextlib.suppress(OSError):
        return cache_folder() / "executions" / f"{name}.json"
    return None


def read(path: Path | None, listed: Sequence[Execution]) -> Execution | None:
    """Read what an earlier measurement chose; None: there is none that can be read."""
    try:
        chosen = Execution(**json.loads(path.read_text(encoding="utf-8"))["chosen"]) if path else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chosen if chosen in listed else None


def keep(path: Path | None, best: Execution, trials: dict[Execution, Trial]) -> None:
    """Keep what was measured."""
    found = [dataclasses.asdict(execution) | dataclasses.asdict(each) for execution, each in trials.items()]
    try:
        if path is None:
            raise OSError("there is no home folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"chosen": dataclasses.asdict(best), "measured": found})
    except (OSError, ResourceError) as error:
        warn(f"what was measured is not kept for later runs: {error}: set XDG_CACHE_HOME to a folder")
