"""What each command of the command line takes: one frozen dataclass a command, whose docstrings are its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from codistill.settings.config import RunConfig

Checkpoint = Literal["last", "best"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train students together. Defaults are the method's; a recipe changes them, flags change the recipe."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """The run folder. None: a new one below runs/."""
    seeds: tuple[int, ...] = ()
    """Train one run for each of these seeds, side by side on one device, in OUT/seed0, OUT/seed1, .."""
    verify_resume: bool = False
    """First train some steps of this very run twice, once with breaks, and compare the two bit for bit."""
    recipe: Path | None = None
    """A TOML file of settings, or the config.json of a run to repeat."""
    recipes: tuple[Path, ...] = ()
    """Train one run for each of these recipes, side by side on one device, in folders of OUT named like the files."""
    preset: str | None = None
    """Settings of a paper as a whole: mfef, ffl, one, okddip, dml or kdcl; codistill list shows them."""


@dataclass(frozen=True)
class ResumeOptions:
    """Go on with interrupted runs from their last checkpoints; they end as they would have ended without the break."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of them as --seeds makes; those that stopped at one step go on side by side."""
    data_dir: str | None = None
    """Where the data set is now, if not where it was."""
    override: tuple[str, ...] = ()
    """New values of settings that do not belong to the experiment: device=cpu threads=1
    data_dir=FOLDER."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Score every predictor of a run on its test set."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    checkpoint: Checkpoint = "last"
    """Weights of the last epoch or of the best one."""
    data_dir: str | None = None
    """Where the data set is now, if not where it was in training."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or auto."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class PredictOptions:
    """Name the classes of images."""

    model: tyro.conf.Positional[Path]
    """A .safetensors or .onnx file that export wrote, or a run folder."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    predictor: str | None = None
    """Which predictor of a run. None: the student with the lowest error."""
    top: int = 3
    """How many classes to name for each image."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class ExportOptions:
    """Write one predictor as one file, load it again and compare it with the run on test images."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    predictor: str | None = None
    """student0, student1, .., ensemble or fused. None: the student with the lowest error."""
    format: Literal["safetensors", "onnx", "torch-export"] | None = None
    """None: by the ending of --out."""
    out: Path | None = None
    """The file. None: RUN/exports/PREDICTOR with the format's ending."""
    checkpoint: Checkpoint = "last"
    """Weights of the last epoch or of the best one."""
    data_dir: str | None = None
    """Where the data set is now, if not where it was in training."""


@dataclass(frozen=True)
class SweepOptions:
    """Train many runs, each in a folder of its own; the same command again goes on where it stopped."""

    spec: tyro.conf.Positional[Path]
    """A TOML file: settings of all runs, and what varies: [grid] of lists, [[runs]]."""
    out: Path
    """The folder of the sweep, in which each run gets a folder."""
    executor: Literal["local"] = "local"
    """What runs the processes: local is this machine."""
    slots: int | None = None
    """How many processes at a time. None: one for each GPU, or one."""
    side_by_side: bool | None = None
    """Whether runs that can train side by side share a process. None: on CUDA, where they share one graph."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Time training steps on random images of CIFAR-100's shape; no data set is needed."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    runs: int = 1
    """How many independent runs train side by side."""
    compare: bool = False
    """Measure a plain PyTorch loop (DataLoader, eager, .item() each step) too, in turn in the same process; on CUDA
    also the deterministic setting."""
    seconds: float = 15.0
    """About how long to measure, seconds; making ready comes to it."""
    profile: Path | None = None
    """Write what takes longest in one step into this text file."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class ListOptions:
    """Show methods, networks and data sets."""

    json: bool = False
    """Print JSON instead of a table."""
