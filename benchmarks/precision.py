"""Train with bf16 in captured steps, with stock and with fused kernels, and say whether errors differ beyond noise.

    python benchmarks/precision.py --data packed --data-dir cifar100.npz --out results/precision

They are compared with float32 in plain steps. Two students with MFEF, all seeds of an arm. What is finished in OUT is
not trained again, what was interrupted goes on. float32 is torch's: on CUDA, convolutions in TF32. Fused kernels need
CUDA: `--arms float32 bf16` leaves them out.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from scipy import stats

from codistill.config import RunConfig, TrainSettings, default_config
from codistill.fleet import train_fleet
from codistill.methods import METHODS
from codistill.resume import resume_together
from codistill.run import Run

Arm = Literal["float32", "bf16", "bf16-fused"]
REFERENCE: Arm = "float32"


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
    arms: tuple[Arm, ...] = ("float32", "bf16", "bf16-fused")
    """What is trained; float32, plain, is what the others are compared with."""


def config_of(arm: Arm, seed: int, options: Options) -> RunConfig:
    train = TrainSettings(
        epochs=options.epochs,
        batch_size=options.batch_size,
        train_limit=options.train_limit,
        precision="float32" if arm == REFERENCE else "bf16",
        kernels="fused" if arm == "bf16-fused" else "stock",
        device=options.device,
        seed=seed,
    )
    networks = (options.network, options.network)
    return replace(default_config("mfef"), networks=networks, data=options.data, data_dir=options.data_dir, train=train)


def groups(seeds: list[int], arm: Arm) -> list[list[int]]:
    """Say which seeds train side by side: none where steps are plain, else all."""
    if arm == REFERENCE:
        return [[seed] for seed in seeds]
    return [seeds] if seeds else []


def train_arm(arm: Arm, options: Options) -> list[Run]:
    """Train all seeds of an arm."""
    outs = {seed: options.out / arm / f"seed{seed}" for seed in options.seeds}
    missing = [seed for seed, out in outs.items() if not (out / "config.json").exists()]
    broken = [seed for seed in options.seeds if seed not in missing and not Run(outs[seed]).finished]
    for group in groups(broken, arm):
        resume_together([outs[seed] for seed in group])
    for group in groups(missing, arm):
        train_fleet([config_of(arm, seed, options) for seed in group], [outs[seed] for seed in group])
    return [Run(out) for out in outs.values()]


def table(arms: Mapping[Arm, Sequence[Run]]) -> str:
    """Write Markdown: top-1 errors of the last epoch by predictor, in percent, and Welch's t-test."""
    rows = ["| predictor | arm | error | difference | noise of a difference | Welch p |", "|---|---|---|---|---|---|"]

    def errors(arm: Arm, predictor: str) -> list[float]:
        return [run.summary["top1_error"][predictor] for run in arms[arm]]

    for name in arms[REFERENCE][0].summary["top1_error"]:
        plain = errors(REFERENCE, name)
        rows.append(f"| {name} | {REFERENCE} | {spread(plain)} | - | - | - |")
        for arm in arms:
            if arm == REFERENCE:
                continue
            found = errors(arm, name)
            difference = statistics.mean(found) - statistics.mean(plain)
            noise = math.sqrt((statistics.variance(plain) + statistics.variance(found)) / len(found))
            p = stats.ttest_ind(plain, found, equal_var=False).pvalue if noise else math.nan
            rows.append(f"| {name} | {arm} | {spread(found)} | {difference:+.2f} | {noise:.2f} | {p:.2f} |")
    return "\n".join(rows)


def spread(errors: Sequence[float]) -> str:
    return f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}"


def main(options: Options) -> None:
    arms: dict[Arm, list[Run]] = {}
    for arm in dict.fromkeys((REFERENCE, *options.arms)):
        # The reference is the plain step: no capture.
        METHODS["mfef"].capturable = arm != REFERENCE
        arms[arm] = train_arm(arm, options)
    seeds, environment = len(options.seeds), json.dumps(arms[REFERENCE][0].record["environment"])
    note = (
        f"Top-1 test errors after the last of {options.epochs} epochs, percent: mean ± standard deviation over {seeds} "
        "seeds. Noise of a difference: its standard error. Below 0.05, p would say that an arm differs from float32."
    )
    text = f"{table(arms)}\n\n{note}\n"
    (options.out / "table.md").write_text(f"{text}\n`{environment}`\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
