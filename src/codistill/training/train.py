"""From a method and a data set to a finished run folder."""

import dataclasses
import itertools
from pathlib import Path

import torch

from codistill.core.device import choose_device
from codistill.core.errors import DivergedError
from codistill.data.dataset import Dataset
from codistill.deploy.run import Run
from codistill.methods import Method
from codistill.methods.teacher import WithTeacher
from codistill.settings.build import load_named_data
from codistill.settings.config import ExecutionSettings, RunConfig, TeacherSettings, TrainSettings
from codistill.training.loop import train_loop
from codistill.training.prepare import build_taught, check_teacher, set_up
from codistill.training.trainer import Trainer


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


def train_from_config(config: RunConfig, out: Path | None = None, show: bool = True) -> Run:
    """Load the data set, build the networks and train; see `train`.

    Args:
        config: The run.
        out: Its folder; None: a new one below runs/.
        show: Whether to print progress and the final table.

    Raises:
        CodistillError: See `train`.
    """
    device = choose_device(config.execution.device, config.execution.precision)
    data = load_named_data(config)
    return _train(build_taught(config, data), data, config, out or free_folder(config), device, show)


def train(
    method: Method,
    data: Dataset,
    *,
    epochs: int | None = None,
    out: str | Path | None = None,
    settings: TrainSettings | None = None,
    execution: ExecutionSettings | None = None,
    show: bool = True,
) -> Run:
    """Train the students of a method together.

    Args:
        method: Students with whatever teaches them; trained in place and left on the training device.
        data: What they are trained and tested on.
        epochs: How often each image is seen; overrides the settings.
        out: The run folder, which must not hold anything; None: a new one below runs/.
        settings: Everything else of the experiment; None: the defaults, which are the paper's recipe.
        execution: Device, precision and how steps are computed; None: the defaults.
        show: Whether to print progress and the final table.

    Returns:
        The finished run.

    Raises:
        UsageError: Settings, networks and data do not go together, or the folder is not empty; nothing was written.
        DivergedError: A loss became NaN or infinite; the last whole checkpoint is kept.
    """
    inner, teaching = method, TeacherSettings()
    if isinstance(method, WithTeacher):
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
        execution=execution or ExecutionSettings(),
        teaching=teaching,
        method=method.settings,
    )
    device = choose_device(config.execution.device, config.execution.precision)
    return _train(method, data, config, Path(out) if out else free_folder(config), device, show)


def _train(method: Method, data: Dataset, config: RunConfig, out: Path, device: torch.device, show: bool) -> Run:
    with set_up(method, data, config, out, device, show) as loop:
        train_loop([loop], fail)
    return loop.run


def fail(_: Trainer, error: DivergedError) -> None:
    """End with the one run that there is."""
    raise error
