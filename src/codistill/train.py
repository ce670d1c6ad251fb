"""From a method and a data set to a finished run folder."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from codistill.config import RunConfig, TeacherSettings, TrainSettings
from codistill.data.dataset import Dataset
from codistill.device import choose_device
from codistill.distributed import Ranks, one_device_each
from codistill.epochs import run_epochs
from codistill.errors import DivergedError, UsageError
from codistill.interrupted import InterruptedRun
from codistill.launcher import MAX_RESTARTS, launch
from codistill.loop import Loop
from codistill.methods import Method
from codistill.prepare import build_taught, check_teacher, load_named_data, prepared
from codistill.run import Run
from codistill.teacher import Taught


def free_folder(config: RunConfig, ending: str | None = None) -> Path:
    """Find a new folder name below runs/ for a run, or for several that `ending` names."""
    names = [spec.partition(":")[0].replace("/", "-") for spec in config.networks]
    networks = "+".join(f"{name}x{len(list(same))}" for name, same in itertools.groupby(names))
    stem = f"{config.data.partition(':')[0]}-{config.method_name}-{networks}-{ending or f'seed{config.train.seed}'}"
    for number in itertools.count(1):
        path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists():
            return path
    raise AssertionError


def train_from_config(
    config: RunConfig, out: Path | None = None, show: bool = True, max_restarts: int = MAX_RESTARTS
) -> Run:
    """Load the data set, build the networks and train, on several processes where the settings say so; see `train`.

    Args:
        config: The run.
        out: Its folder; None: a new one below runs/.
        show: Whether to print progress and the final table.
        max_restarts: How often several processes start again from the last checkpoint because one was lost.

    Raises:
        CodistillError: See `train`.
        WorkerError: One of several processes was lost once too often.
    """
    if config.train.processes > 1:
        out = out or free_folder(config)
        Run.refuse_taken(out)
        return train_on_processes(config, out, {}, show, max_restarts)
    device = choose_device(config.train.device, config.train.precision)
    data = load_named_data(config)
    return _train(build_taught(config, data), data, config, out or free_folder(config), device, show)


def train(
    method: Method,
    data: Dataset,
    *,
    epochs: int | None = None,
    out: str | Path | None = None,
    settings: TrainSettings | None = None,
    show: bool = True,
) -> Run:
    """Train the students of a method together.

    Args:
        method: Students with whatever teaches them; trained in place and left on the training device.
        data: What they are trained and tested on.
        epochs: How often each image is seen; overrides the settings.
        out: The run folder, which must not hold anything; None: a new one below runs/.
        settings: Everything else; None: the defaults, which are the paper's recipe.
        show: Whether to print progress and the final table.

    Returns:
        The finished run.

    Raises:
        UsageError: Settings, networks and data do not go together, or the folder is not empty; nothing was written.
        DivergedError: A loss became NaN or infinite; the last whole checkpoint is kept.
    """
    inner, teaching = method, TeacherSettings()
    if isinstance(method, Taught):
        inner = method.method
        teaching = TeacherSettings(teacher_weight=method.weight, teacher_temperature=method.temperature)
    check_teacher(type(inner), inner is not method)
    settings = settings or TrainSettings()
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    config = RunConfig(
        method_name=method.name,
        networks=tuple(student.spec for student in method.cohort),
        data=data.spec or data.name,
        data_dir=data.root or None,
        train=settings,
        teaching=teaching,
        method=method.settings,
    )
    if settings.processes > 1:
        raise UsageError("processes: only a run that a recipe or a command line describes can be on several of them")
    device = choose_device(settings.device, settings.precision)
    return _train(method, data, config, Path(out) if out else free_folder(config), device, show)


def _train(method: Method, data: Dataset, config: RunConfig, out: Path, device: torch.device, show: bool) -> Run:
    with prepared(method, data, config, out, device, show) as loop:
        run_epochs([loop], fail)
    return loop.run


def train_on_processes(config: RunConfig, out: Path, override: Mapping[str, str], show: bool, max_restarts: int) -> Run:
    """Begin a run on several processes, or go on with the one that is in the folder; see `train_from_config`."""
    settings = config.train
    if max_restarts < 0:
        raise UsageError(f"max_restarts is {max_restarts}; it must be at least 0")
    if config.method.whole_batch:
        raise UsageError(
            f"{config.method_name} with {config.method.whole_batch} needs the whole batch in one process: "
            "use --processes 1"
        )
    device = choose_device(settings.device, settings.precision)
    one_device_each(device, settings.processes)
    launch(train_as_rank, (config, out, override, show), out, device, settings.processes, max_restarts)
    return Run(out)


def train_as_rank(
    ranks: Ranks, begun: bool, config: RunConfig, out: Path, override: Mapping[str, str], show: bool
) -> None:
    """Do one process's part of a run on several.

    Args:
        ranks: This process among them.
        begun: Whether to go on with the run in the folder.
        config: The run, where it is to begin.
        out: Its folder.
        override: See `resume`.
        show: Whether rank 0 prints.
    """
    interrupted = InterruptedRun(Run(out), override) if begun else None
    config = interrupted.config if interrupted else config
    device = choose_device(config.train.device, config.train.precision)
    if device.type == "cuda":
        device = torch.device("cuda", ranks.number)
    with ranks.leader_first():  # data may be downloaded, and cached
        data = interrupted.load_data() if interrupted else load_named_data(config)
    method = build_taught(config, data)
    show = show and ranks.leads
    with (
        interrupted.taken_up(method, data, device, show, ranks=ranks)
        if interrupted
        else prepared(method, data, config, out, device, show, ranks=ranks)
    ) as loop:
        if device.type == "cuda":
            loop.display.console.print("note: on several processes a step is not captured as a CUDA graph")
        run_epochs([loop], fail)


def fail(_: Loop, error: DivergedError) -> None:
    """End with the one run that there is."""
    raise error
