"""Measure the cost of exact resume: the share of a training that checks and saves take.

    python benchmarks/saving.py --out results/reliability

Trains digits on a CPU and times, in the same training, the checks of terms, gradients and state for NaN, the copies of
the state, and the writing of checkpoints, metrics and events, waited for here until they are on the disk. Prints their
share of an epoch, and writes OUT/saving.json and OUT/saving.md.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

# Before torch: it sets how threads wait.
import codistill  # noqa: F401  # isort: skip
import torch

from codistill.runs.metadata import environment
from codistill.runs.saving import Saver
from codistill.settings.config import ExecutionSettings, default_config
from codistill.training import step, trainer
from codistill.training.finite import NonFiniteDetector
from codistill.training.train import train_from_config

# Owner and name of each function that is timed, and when it is called.
TIMED = (
    (step, "norms", "step"),
    (NonFiniteDetector, "update", "step"),
    (trainer, "health", "end"),
    (Saver, "copy", "end"),
    (Saver, "log", "end"),
)


def timed(function: Callable[..., Any], part: str, seconds: Counter[str]) -> Callable[..., Any]:
    """Wrap a function so that the seconds it takes are added up; the wrapped `Saver.log` waits for its writes."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **named)
        if function.__name__ == "log":
            arguments[0].flush()
        seconds[part] += time.perf_counter() - started
        return result

    return wrapped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet20"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/saving"))
    options = parser.parse_args()
    config = default_config("mfef")
    train = dataclasses.replace(config.train, epochs=options.epochs, batch_size=options.batch_size)
    execution = ExecutionSettings(device="cpu")
    config = dataclasses.replace(
        config, networks=tuple(options.networks), data="digits", train=train, execution=execution
    )
    seconds = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="codistill-saving-") as folder, contextlib.ExitStack() as patched:
        for owner, name, part in TIMED:
            patched.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part, seconds)))
        run = train_from_config(config, Path(folder) / "run", show=False)
        epoch_seconds = run.summary["wall_seconds"] / options.epochs
    checks, saves = seconds["step"] / options.epochs, seconds["end"] / options.epochs
    share = (checks + saves) / (epoch_seconds - checks - saves)
    machine = environment(torch.device("cpu"))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "networks": options.networks,
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "epoch_seconds": epoch_seconds,
        "seconds_of_checks_in_the_steps_of_an_epoch": checks,
        "seconds_at_the_end_of_an_epoch": saves,
        "share_of_an_epoch": share,
        "environment": machine,
    }
    text = (
        f"`{result['command']}`: digits, {' + '.join(options.networks)}, batch {options.batch_size}, {options.epochs} "
        f"epochs. An epoch takes {epoch_seconds:.2f} s, of which checks in its steps take {1000 * checks:.0f} ms, and "
        f"checks and saves at its end, until all is on the disk, {1000 * saves:.0f} ms: "
        f"**{100 * share:.2f} % of an epoch without them**.\n\n"
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}.\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "saving.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "saving.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
