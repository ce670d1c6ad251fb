"""From a method and a data set to a finished run folder."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from codistill.core.console import note, warn
from codistill.core.errors import DivergedError, UsageError
from codistill.core.files import system_error
from codistill.core.torchrun import launch, world_size
from codistill.data.dataset import Dataset
from codistill.deploy.run import Run
from codistill.methods import Method
from codistill.methods.kd import check_teacher
from codistill.networks.origin import mark
from codistill.runs.folder import ANOTHER, Continued, refuse_existing
from codistill.settings.augment import AugmentSettings
from codistill.settings.build import load_named_data
from codistill.settings.config import PLACES, ExecutionSettings, RunConfig, TrainSettings
from codistill.training.loop import train_loop
from codistill.training.prepare import DeviceSplits, announce, build_taught, check, set_up, teaching_of
from codistill.training.ranks import Ranks
from codistill.training.sharing import choose_threads
from codistill.training.trainer import OnEpochEnd, Trainer


def free_folder(config: RunConfig, ending: str | None = None) -> Path:
    """Make a new folder below runs/ for a run, or for several that `ending` names; no other process has the same one.

    Raises:
        UsageError: It cannot be made.
    """
    for path in candidate_folders(config, ending):
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if not (isinstance(error, FileExistsError) and os.path.lexists(path)):
                raise system_error(error, f"run folder {path}", fix=ANOTHER) from None
        else:
            return path
    raise AssertionError("there are folders without end")


@contextlib.contextmanager
def kept_if_used(config: RunConfig, out: Path | None, ending: str | None = None) -> Iterator[Path]:
    """Yield `out`, or a folder of `free_folder` that is removed again if nothing is in it after an error."""
    folder = out or free_folder(config, ending)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            for each in (folder, folder.parent) if out is None else ():
                each.rmdir()
        raise


def candidate_folders(config: RunConfig, ending: str | None = None) -> Iterator[Path]:
    """Name the folders below runs/ that a run may have, in the order in which they are tried."""
    names = [spec.partition(":")[0].replace("/", "-") for spec in config.networks]
    networks = "+".join(f"{name}x{len(list(same))}" for name, same in itertools.groupby(names))
    stem = f"{config.data.partition(':')[0]}-{config.method_name}-{networks}-{ending or f'seed{config.train.seed}'}"
    for number in itertools.count(1):
        yield Path("runs") / (stem if number == 1 else f"{stem}-{number}")


def train_from_config(config: RunConfig, out: Path | None = None, show: bool = True) -> Run:
    """Load the data set, build the networks and train; without `out` into a new folder below runs/; see `train`."""
    with Ranks.from_environment() as ranks:
        device = ranks.choose_device(config.execution)
        if out is not None and ranks.count == 1:  # ranks may have been started again, in the folder of their run
            refuse_existing(out)  # before data are read, which may take minutes
        data = ranks.in_turn(lambda: load_named_data(config))
        with ranks.together():
            method = build_taught(config, data)
        return _train(method, data, config, out, device, show, ranks)


def train(
    method: Method,
    data: Dataset,
    *,
    epochs: int | None = None,
    out: str | Path | None = None,
    settings: TrainSettings | None = None,
    augment: AugmentSettings | None = None,
    execution: ExecutionSettings | None = None,
    init: Run | str | Path | None = None,
    on_epoch_end: OnEpochEnd | None = None,
    show: bool = True,
) -> Run:
    """Train the students of a method together.

    Args:
        method: Students with whatever teaches them; trained in place and left on the training device.
        data: What they are trained and tested on.
        epochs: How often each image is seen; overrides the settings.
        out: The run folder, which must not hold anything; None: a new one below runs/.
        settings: Everything else of the experiment; None: the defaults, which are the paper's recipe.
        augment: What is done to images and labels beyond crops and flips, class weights and sampling; None: nothing.
        execution: Device, precision and how steps are computed; None: the defaults.
        init: A run whose last weights this one starts from; overrides the settings.
        on_epoch_end: Called after each epoch with its line of metrics.jsonl; of several ranks rank 0 calls it. If it
            raises, the run ends with one line, is saved and can be resumed.
        show: Whether to print progress and the final table.

    Returns:
        The finished run.

    Raises:
        UsageError: Settings, networks and data do not go together, or the folder is not empty; nothing was written.
        DivergedError: A loss became NaN or infinite; the last whole checkpoint is kept.
    """
    for what, given, kind in (("method", method, Method), ("data", data, Dataset)):
        if not isinstance(given, kind):
            raise UsageError(f"train: {what} is a {type(given).__name__}; it must be a codistill.{kind.__name__}")
    check_teacher(type(method), method.taught_by is not None)
    settings = settings or TrainSettings()
    if epochs is not None:
        settings = dataclasses.replace(settings, epochs=epochs)
    if init is not None:
        settings = dataclasses.replace(settings, init=str(init.path if isinstance(init, Run) else init))
    config = config_of(method, data, settings, execution, augment)
    with Ranks.from_environment() as ranks:
        device = ranks.choose_device(config.execution)
        return _train(method, data, config, Path(out) if out else None, device, show, ranks, on_epoch_end)


def config_of(
    method: Method,
    data: Dataset,
    settings: TrainSettings,
    execution: ExecutionSettings | None = None,
    augment: AugmentSettings | None = None,
) -> RunConfig:
    """Return the settings of a run with a method and a data set that are made already."""
    return RunConfig(
        method_name=method.name,
        networks=tuple(student.spec for student in method.cohort),
        data=data.spec or data.name,
        data_dir=data.root or None,
        train=settings,
        augment=augment or AugmentSettings(),
        execution=execution or ExecutionSettings(),
        teaching=teaching_of(method),
        method=method.settings,
    )


def _train(
    method: Method,
    data: Dataset,
    config: RunConfig,
    out: Path | None,
    device: torch.device,
    show: bool,
    ranks: Ranks,
    on_epoch_end: OnEpochEnd | None = None,
) -> Run:
    plan = check(method, data, config, device, ranks=ranks)
    run, continued = ranks.from_leader(lambda: restarted(plan.config, out))
    if run is not None and continued is None:
        if ranks.leads:
            note(f"run {run.path} is finished")
        return run
    state = continued and continued.state
    if ranks.leads:
        announce([plan])
    if ranks.leads and state is None and (trained := plan.initial["trained_in"]):
        warn(f"training goes on from weights of {', '.join(trained)}: make new networks to start from the seed")
    if ranks.count > 1 and state is None:
        method.load_state_dict(ranks.from_leader(method.state_dict))
    with contextlib.ExitStack() as kept:

        def new_folder() -> Path:
            return kept.enter_context(kept_if_used(config, out))

        folder = run.path if run is not None else ranks.from_leader(new_folder)
        splits = DeviceSplits(data, device, plan.config.execution.stream)
        if ranks.count == 1:
            choose_threads(plan, splits)
        opening = functools.partial(set_up, plan, folder, show, continued=continued, ranks=ranks, splits=splits)
        with opening(on_epoch_end=on_epoch_end) as trainer:
            try:
                train_loop([trainer], fail)
            finally:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # an interrupted step may still write on a stream of its own
                mark(method, folder)
    return trainer.run


def restarted(config: RunConfig, out: Path | None) -> tuple[Run | None, Continued | None]:
    """Find the run that this launch of torchrun began before it lost a process and started all again.

    Returns the run, and how it goes on, None where it is finished; no run: this launch has begun none.
    """
    folders = [out] if out else list(itertools.takewhile(Path.exists, candidate_folders(config)))[-1:]
    if world_size() == 1 or not folders or not (folders[0] / "config.json").exists():
        return None, None
    run = Run(folders[0])
    began, now = run.config.as_mapping(), config.as_mapping()
    same = all(began[key] == now[key] for key in now if key not in PLACES)
    if not same or any(run.metadata["environment"].get(key) != value for key, value in launch().items()):
        return None, None
    if run.status == "diverged":
        raise DivergedError(f"not restarted: {run.summary.get('error')}")
    return run, None if run.finished else Continued.read(run)


def fail(_: Trainer, error: DivergedError) -> None:
    """End with the one run that there is."""
    raise error
