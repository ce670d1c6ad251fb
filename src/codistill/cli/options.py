"""Options of each command beside a run's settings: one frozen dataclass a command, whose docstrings are its help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Checkpoint = Literal["last", "best"]

# In the help of commands that take a run's settings, those that matter first; the rest is in groups below them.
FIRST = {
    "train": "networks data data_dir epochs batch_size learning_rate seed seeds precision out".split(),  # noqa: SIM905
    "bench": "networks data data_dir batch_size precision runs compare seconds profile json".split(),  # noqa: SIM905
}
DATA = ("data", "data_dir", "padding", "padding_mode", "flip", "drop_last", "train_limit", "validation", "skip_bad")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How the images of a folder are read."""

    skip_bad: bool = False
    """Leave out images that cannot be read, instead of refusing the folder; they are counted and named."""


@dataclass(frozen=True, kw_only=True)
class MovedDataOptions(DataOptions):
    """Where the data set of a run is, and how it is read."""

    data_dir: str | None = field(default=None, metadata={"metavar": "PATH"})
    """Where the data set is now, if it has moved."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions(DataOptions):
    """Where settings come from, before flags change them."""

    recipe: Path | None = None
    """A TOML file of settings, or the config.json of a run to repeat."""
    recipes: tuple[Path, ...] = ()
    """Train one run for each of these recipes, side by side on one device, in folders of OUT named like the files."""
    preset: str | None = None
    """All settings of a paper: mfef, ffl, one, okddip, dml, kdcl or okd-cheap; codistill list shows them."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(SourceOptions):
    """Train students together. Defaults are the method's; a recipe changes them, flags change the recipe."""

    out: Path | None = None
    """The run folder. None: a new one in runs/."""
    seeds: tuple[int, ...] = ()
    """Train one run for each of these seeds, side by side, in OUT/seed0, OUT/seed1, ..; on a CPU in as many processes
    as a short measurement finds fastest."""
    verify_resume: bool = False
    """First train some steps of this run twice, once with interruptions, and compare the two bit for bit."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(MovedDataOptions):
    """Resume interrupted runs from their last checkpoints, with the results of uninterrupted ones."""

    runs: tuple[Path, ...] = field(metadata={"positional": "RUN .."})
    """Run folders, or folders of them as of --seeds; runs that stopped at the same step resume side by side."""
    epochs: int | None = None
    """Train until N epochs in all, also a finished run; it then goes on as a run of N epochs (docs/training.md)."""
    override: tuple[str, ...] = field(default=(), metadata={"metavar": "KEY=VALUE .."})
    """New values of settings that do not affect results: device=cpu threads=1 data_dir=FOLDER teacher=PATH.
    Several teachers: a teacher=PATH for each, in their order."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(MovedDataOptions):
    """Score every predictor of a run on its test set."""

    run: Path = field(metadata={"positional": "RUN"})
    """The run folder."""
    checkpoint: Checkpoint = "last"
    """Weights of the last epoch or of the best one."""
    data_dir: str | None = field(default=None, metadata={"metavar": "PATH"})
    """Where the data set is now, if it has moved; or another folder of class folders, to score all images in it."""
    split: Literal["test", "validation"] = "test"
    """The images: the test set, or those of the training that were held out."""
    predictor: str | None = None
    """The predictor whose mistakes are shown. None: the student with the lowest validation error; without --validation,
    test error."""
    predictions: Path | None = field(default=None, metadata={"metavar": "FILE.csv"})
    """Also write a row for each image: file (or position), label, and of each predictor class and confidence."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or auto."""
    json: bool = False
    """Print JSON instead of tables: with confusion matrix, all classes, calibration and disagreement."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(MovedDataOptions):
    """Write the page of a run again, or one page that compares several runs; runs of other seeds are one group."""

    runs: tuple[Path, ...] = field(metadata={"positional": "RUN .."})
    """Run folders, or folders of them as of --seeds; that of a sweep, alone, with its groups, failed runs and
    controls."""
    out: Path | None = None
    """The page. None: RUN/report.html of one run; of several comparison.html, in the folder that holds them where it is
    the only one named, else here. Its tables (.tex) and numbers (.csv) lie beside it."""
    latency: bool = False
    """First measure every predictor here, of several runs those of one in each group, as torch and as ONNX, and write
    RUN/latency.json; it also serves export --max-latency-ms and the tables of sweeps."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(DataOptions):
    """Classify images."""

    model: Path = field(metadata={"positional": "MODEL"})
    """A .safetensors or .onnx file that export wrote, or a run folder."""
    images: tuple[Path, ...] = field(metadata={"positional": "IMAGE .."})
    """Image files, or folders of them, searched to any depth."""
    predictor: str | None = None
    """The predictor of a run. None: the student with the lowest validation error; without --validation, test error."""
    top: int = 3
    """Number of classes to print for each image."""
    json: bool = False
    """Print JSON instead of text, a line for each image."""
    csv: bool = False
    """Print CSV instead of text: image, class1, probability1, class2, .."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(MovedDataOptions):
    """Write one predictor as one file, or as a folder with all that others need, and compare it with the run."""

    run: Path = field(metadata={"positional": "RUN"})
    """The run folder."""
    predictor: str | None = None
    """student0, student1, .., ensemble or fused; best: the one with the lowest validation error; without --validation,
    test error. None: the best student, or with --max-latency-ms best."""
    format: Literal["safetensors", "onnx", "onnx-int8", "torch-export"] | None = None
    """File format. None: by the suffix of --out; in a folder, and where a predictor is chosen without --out, onnx."""
    out: str | None = field(default=None, metadata={"metavar": "FILE|FOLDER/"})
    """The file; or a new folder for model, model card, load.py, picture of the confusion matrix and recipe. None:
    RUN/exports/PREDICTOR with the format's suffix."""
    checkpoint: Checkpoint = "last"
    """Weights of the last epoch or of the best one."""
    max_latency_ms: float | None = None
    """The most milliseconds that one image may take on this CPU with one thread, in the format's runtime; measured
    where RUN/latency.json does not have it. None: no budget."""
    max_accuracy_loss: float = 1.0
    """Points of top-1 accuracy that onnx-int8 may lose on the test images; else it is refused."""
    license: str = "unknown"
    """Of the model card of a folder: an identifier, such as apache-2.0."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions(DataOptions):
    """Train many runs, each in a folder of its own; the same command again resumes an interrupted sweep."""

    spec: Path = field(metadata={"positional": "SPEC"})
    """A TOML file: settings of all runs, then those that vary: lists in [grid], tables in [[runs]], or [search]."""
    out: Path
    """The folder of the sweep, with a folder for each run."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where the processes run: on this machine, as jobs of SLURM, or as tasks of Ray; [slurm] and [ray] in the spec set
    these up."""
    slots: int | None = None
    """Number of processes at a time. None: one for each GPU; on a CPU by a short measurement of the first run; on slurm
    all that are to do, at most 250; on ray as many as the cluster holds."""
    side_by_side: bool | None = None
    """Whether runs that can train side by side share a process. None: on CUDA, where one graph holds them all."""
    dry_run: bool = False
    """Only print the runs in their order with estimated minutes; nothing is started or written."""
    controls: bool = False
    """Also train what a method has to beat: its students alone, with a moving average of the weights, for the same time
    and with the same parameters; codistill list has them."""


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Train what a table of MFEF's paper lacks, and print it beside the paper's numbers; resumes if interrupted."""

    table: Literal["table1", "table2", "table3", "table4", "table5", "figure3", "methods"] = field(
        metadata={"positional": "TABLE"}
    )
    """table1 to table5 and figure3 of the paper; methods: eight methods with ResNet-20, and controls."""
    protocol: Literal["paper", "short", "small"] = "paper"
    """paper: 300 epochs; short: 30; small: 60 on 10,000 images of CIFAR-100, with ResNet-20 only."""
    cells: tuple[str, ...] = field(default=(), metadata={"metavar": "ROW[/COLUMN] .."})
    """Rows, as resnet32/cifar100, or cells, as resnet32/cifar100/mfef-s; * is any letters. None: all."""
    seeds: tuple[int, ...] = ()
    """Which seeds. None: 0, 1 and 2 are trained, and all that are there count."""
    data: str | None = None
    """The data set in another form: packed, or cifar100:download=true; rows of other data sets are not trained."""
    data_dir: str | None = field(default=None, metadata={"metavar": "PATH"})
    """Where the data set is."""
    out: Path = Path("runs/reproduce")
    """The folder of runs and tables; a sweep in it for each protocol, whose runs all tables share."""
    ledger: Path = Path("results/ledger.jsonl")
    """The file of finished runs, a line each; runs in it are not trained again."""
    collect: bool = False
    """Train nothing: only make the table of the ledger and of the runs that are there."""
    record: bool = False
    """Add the finished runs of the protocol to the ledger."""
    dry_run: bool = False
    """Train nothing: only print which runs are missing and, where the data set is there, estimated minutes."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where the processes run, as for sweep."""
    engine: Path | None = None
    """A TOML file with the table that sets up the executor, [slurm] or [ray] as in a sweep's spec."""
    slots: int | None = None
    """Number of processes at a time, as for sweep."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(DataOptions):
    """Time training steps on the images of --data, or on random ones of CIFAR-100's shape; says what was timed."""

    runs: int = 1
    """Number of independent runs that train side by side."""
    compare: bool = False
    """Also measure a plain PyTorch loop (DataLoader, eager, .item() each step), in turn in the same process, and on
    CUDA --deterministic."""
    seconds: float = 15.0
    """Measurement time in seconds, set-up not included."""
    profile: Path | None = None
    """Write the operators that take longest in one step to this text file."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List methods, networks, data sets, MFEF's multi-scale blocks with their costs, and controls of sweeps."""

    json: bool = False
    """Print JSON instead of a table."""


OPTIONS: dict[str, type] = {
    "train": TrainOptions,
    "resume": ResumeOptions,
    "evaluate": EvaluateOptions,
    "report": ReportOptions,
    "predict": PredictOptions,
    "export": ExportOptions,
    "bench": BenchOptions,
    "sweep": SweepOptions,
    "reproduce": ReproduceOptions,
    "list": ListOptions,
}
