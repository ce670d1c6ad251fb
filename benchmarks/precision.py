"""Train with bf16 in captured steps and with float32 in plain ones, and say whether the errors differ beyond noise.

    python benchmarks/precision.py --data packed --data-dir cifar100.npz --out results/precision

Two students with MFEF, all seeds of a precision. What is finished in OUT is not trained again, what was interrupted
goes on. float32 is torch's: on CUDA, convolutions in TF32.
"""

import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from scipy import stats

from codistill.config import Precision, RunConfig, TrainSettings, default_config
from codistill.fleet import train_fleet
from codistill.methods import METHODS
from codistill.resume import resume_together
from codistill.run import Run

ARMS: tuple[Precision, ...] = ("float32", "bf16")


@dataclass(frozen=True)
class Options:
    """What to run."""

    out: Path
    data: str = "packed"
    data_dir: str | None = None
    network: str = "resnet20"
    epochs: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 128
    train_limit: int | None = None
    device: str = "auto"


def config_of(precision: Precision, seed: int, options: Options) -> RunConfig:
    train = TrainSettings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        train_limit=options.train_limit,
        precision=precision,
        device=options.device,
        seed=seed,
    )
    networks = (options.network, options.network)
    return replace(default_config("mfef"), networks=networks, data=options.data, data_dir=options.data_dir, train=train)


def groups(seeds: list[int], precision: Precision) -> list[list[int]]:
    """Say which seeds train side by side: all in bf16, none in float32."""
    if precision == "bf16":
        return [seeds] if seeds else []
    return [[seed] for seed in seeds]


def train_arm(precision: Precision, options: Options) -> list[Run]:
    """Train all seeds of a precision, those in bf16 side by side."""
    outs = {seed: options.out / precision / f"seed{seed}" for seed in options.seeds}
    missing = [seed for seed, out in outs.items() if not (out / "config.json").exists()]
    broken = [seed for seed in options.seeds if seed not in missing and not Run(outs[seed]).finished]
    for group in groups(broken, precision):
        resume_together([outs[seed] for seed in group])
    for group in groups(missing, precision):
        train_fleet([config_of(precision, seed, options) for seed in group], [outs[seed] for seed in group])
    return [Run(out) for out in outs.values()]


def table(arms: dict[Precision, list[Run]]) -> str:
    """Write Markdown: top-1 errors of the last epoch by predictor, in percent, and Welch's t-test."""
    rows = [
        "| predictor | float32, plain | bf16, captured | difference | noise of a difference | Welch p |",
        "|---|---|---|---|---|---|",
    ]
    for name in arms["float32"][0].summary["top1_error"]:
        errors = {arm: [run.summary["top1_error"][name] for run in runs] for arm, runs in arms.items()}
        means = {arm: statistics.mean(each) for arm, each in errors.items()}
        spread = {arm: statistics.stdev(each) for arm, each in errors.items()}
        count = len(errors["bf16"])
        noise = math.sqrt(sum(each**2 for each in spread.values()) / count)
        numbers = [(means[arm], spread[arm], count) for arm in ARMS]
        p = stats.ttest_ind_from_stats(*numbers[0], *numbers[1], equal_var=False).pvalue if noise else math.nan
        cells = [
            name,
            *(f"{means[arm]:.2f} ± {spread[arm]:.2f}" for arm in ARMS),
            f"{means['bf16'] - means['float32']:+.2f}",
            f"{noise:.2f}",
            f"{p:.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(options: Options) -> None:
    arms = {}
    for precision in ARMS:
        # The reference is the plain step: no capture.
        METHODS["mfef"].capturable = precision == "bf16"
        arms[precision] = train_arm(precision, options)
    seeds, environment = len(options.seeds), json.dumps(arms["bf16"][0].record["environment"])
    note = (
        f"Top-1 test errors after the last of {options.epochs} epochs, percent: mean ± standard deviation over {seeds} "
        "seeds. Noise of a difference: its standard error. A p below 0.05 would say that the precisions differ."
    )
    text = f"{table(arms)}\n\n{note}\n"
    (options.out / "table.md").write_text(f"{text}\n`{environment}`\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
