"""Train every method on the same data with the same networks, and write a table.

    python benchmarks/all_methods.py --data packed --data-dir cifar100.npz --network resnet20 --epochs 3 \
        --train-limit 10000 --out runs/all-methods

Each method gets two students (okddip and ffsd three: two peers and the leader; rocket a light net and a booster; byot
one). The teacher of those that need one is a run of `independent` with --teacher-network, trained first. Another
start resumes the runs that an interrupted one has started.
"""

import contextlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from codistill.core.errors import DivergedError
from codistill.deploy.run import Run
from codistill.methods import METHODS
from codistill.settings.config import ExecutionSettings, RunConfig, TeacherSettings, TrainSettings, default_config
from codistill.training.fleet import train_fleet
from codistill.training.resume import resume_together
from codistill.training.train import train_from_config

STUDENTS = {"okddip": 3, "ffsd": 3, "byot": 1}


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    out: Path
    data: str = "packed"
    data_dir: str | None = None
    network: str = "resnet20"
    teacher_network: str = "resnet20"
    epochs: int = 3
    train_limit: int | None = None
    precision: Literal["float32", "bf16"] = "float32"
    device: str = "auto"
    seed: int = 0
    methods: tuple[str, ...] = ()
    """Which methods; none named: all."""
    evaluate_every: int | None = None
    """Epochs between evaluations; None: at the end alone."""
    threads: int | None = None
    """Threads of a run on a CPU; None: all."""
    side_by_side: int = 1
    """How many runs share the device at a time."""


def config_of(method: str, options: Options) -> RunConfig:
    train = TrainSettings(
        epochs=options.epochs,
        evaluate_every=options.evaluate_every or options.epochs,
        train_limit=options.train_limit,
        seed=options.seed,
    )
    execution = ExecutionSettings(precision=options.precision, device=options.device, threads=options.threads)
    networks = (options.network,) * STUDENTS.get(method, 2)
    config = replace(default_config(method), networks=networks, data=options.data, data_dir=options.data_dir)
    return replace(config, train=train, execution=execution)


def table(runs: list[Run]) -> str:
    """Write Markdown: errors of the last epoch, loss terms of the last epoch, speed."""
    heads = ("method", "better student", "other students", "ensemble", "fused", "loss terms of the last epoch")
    lines = [
        "| " + " | ".join((*heads, "train s", "wall s")) + " |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        summary, rows = run.summary, run.metrics()
        if summary["status"] != "finished":
            lines.append(f"| {summary['method']} | {summary['status']}: {summary['error']} | | | | | | |")
            continue
        errors = summary["top1_error"]
        students = sorted(error for name, error in errors.items() if name.startswith("student"))
        terms = {name: value for name, value in rows[-1]["train"].items() if name != "loss"}
        cells = [
            summary["method"],
            f"{students[0]:.2f}",
            " ".join(f"{error:.2f}" for error in students[1:]) or "-",
            *(f"{errors[name]:.2f}" if name in errors else "-" for name in ("ensemble", "fused")),
            " ".join(f"{name.replace('->', '→')} {value:.3f}" for name, value in terms.items()),
            f"{summary['train_seconds']:.0f}",
            f"{summary['wall_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def is_started(out: Path) -> bool:
    return (out / "config.json").exists()


def resume_started(outs: list[Path]) -> None:
    """Resume the runs that an earlier start of this script left without an end."""
    broken = [out for out in outs if is_started(out) and Run(out).status not in ("finished", "diverged")]
    with contextlib.suppress(DivergedError):  # the table names it
        if broken:
            resume_together(broken)


def main(options: Options) -> None:
    teacher = options.out / "teacher"
    resume_started([teacher])
    if not is_started(teacher):
        config = replace(config_of("independent", options), networks=(options.teacher_network,))
        train_from_config(config, teacher)
    outs = {name: options.out / name for name in options.methods or METHODS}
    resume_started(list(outs.values()))
    wanted = [name for name, out in outs.items() if not is_started(out)]
    configs = {name: config_of(name, options) for name in wanted}
    for name in wanted:
        if METHODS[name].teacher == "required":
            configs[name] = replace(configs[name], teaching=TeacherSettings(teacher=str(teacher)))
    for index in range(math.ceil(len(wanted) / options.side_by_side)):
        part = wanted[index * options.side_by_side : (index + 1) * options.side_by_side]
        train_fleet([configs[name] for name in part], [outs[name] for name in part])
    text = table([Run(out) for out in (teacher, *outs.values())])
    environment = json.dumps(Run(teacher).metadata["environment"])
    (options.out / "table.md").write_text(f"{text}\n\n`{environment}`\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
