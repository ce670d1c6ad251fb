"""What exact resume costs: epochs with and without it, in turn in one process.

    python benchmarks/saving.py --out runs/saving

Two equal trainings of digits take turns, an epoch each. One is as users have it: terms, gradients and the state are
checked for NaN, and each epoch ends with a checkpoint, metrics and events. In the other all of this is taken out.
Prints the medians and the ratio, and writes OUT/saving.json and OUT/saving.md.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import codistill as cd
from codistill.config import default_config
from codistill.loop import Loop, completed, heed, train_epoch
from codistill.prepare import build_taught, load_named_data, prepared
from codistill.run import environment
from codistill.saving import Saver
from codistill.signals import Pending
from codistill.step import make_fleet


@contextlib.contextmanager
def unsafe() -> Iterator[None]:
    """Take out all that makes a run safe."""
    with (
        mock.patch("codistill.step.norms", lambda gradients: []),
        mock.patch.object(cd.watch.FiniteWatch, "update", lambda self, names, values: None),
        mock.patch("codistill.loop.state_damage", lambda state: ([], cd.device.torch.zeros(0))),
        mock.patch.object(Saver, "copy", lambda self, state: {}),
        mock.patch.object(Saver, "log", lambda self, row, state, best: None),
    ):
        yield


def epoch(loop: Loop, number: int, fleet: Any) -> float:
    """Train and evaluate an epoch, seconds; what is written beside it counts once it is on the disk."""
    began = time.perf_counter()
    between = functools.partial(heed, Pending(), [loop], number)
    train_epoch([loop], fleet, number, between)
    loop.evaluation.run()
    for numbers, state in completed([loop]):
        loop.end_epoch(number, numbers, state)
    loop.saver.settle()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet20"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/saving"))
    options = parser.parse_args()
    config = default_config("mfef")
    settings = dataclasses.replace(config.train, epochs=options.epochs + 1, batch_size=options.batch_size, device="cpu")
    config = dataclasses.replace(config, networks=tuple(options.networks), data="digits", train=settings)
    data, device = load_named_data(config), cd.device.choose_device("cpu", "float32")
    seconds: dict[str, list[float]] = {"safe": [], "unsafe": []}
    with tempfile.TemporaryDirectory(prefix="codistill-saving-") as folder, contextlib.ExitStack() as held:
        loops = {
            name: held.enter_context(
                prepared(build_taught(config, data), data, config, Path(folder) / name, device, False)
            )
            for name in seconds
        }
        fleets = {name: make_fleet([loop.step]) for name, loop in loops.items()}
        for number in range(options.epochs + 1):
            for name in list(seconds) if number % 2 else list(seconds)[::-1]:
                with unsafe() if name == "unsafe" else contextlib.nullcontext():
                    took = epoch(loops[name], number, fleets[name])
                if number:  # the first one warms up
                    seconds[name].append(took)
            print(f"epoch {number}: " + ", ".join(f"{name} {each[-1:]}" for name, each in seconds.items()), flush=True)
    ratios = [safe / plain for safe, plain in zip(seconds["safe"], seconds["unsafe"], strict=True)]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "networks": options.networks,
        "batch_size": options.batch_size,
        "train_images": len(data.train),
        "epochs": options.epochs,
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
        "environment": environment(device),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "saving.json").write_text(json.dumps(result, indent=2) + "\n")
    machine = result["environment"]
    text = (
        f"`{result['command']}`: digits, {' + '.join(options.networks)}, batch {options.batch_size}, "
        f"{options.epochs} epochs of each kind in turn. Median epoch: {result['seconds']['safe']:.3f} s with checks, "
        f"checkpoint, metrics and events on the disk, {result['seconds']['unsafe']:.3f} s without; "
        f"median of the ratios of neighbours {result['ratio']:.4f} "
        f"(quartiles {ratios_at(ratios, 0.25):.4f} to {ratios_at(ratios, 0.75):.4f}).\n\n"
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}.\n"
    )
    (options.out / "saving.md").write_text(text)
    print(text)
    return 0


def ratios_at(ratios: list[float], share: float) -> float:
    """Give a quantile."""
    return sorted(ratios)[round(share * (len(ratios) - 1))]


if __name__ == "__main__":
    raise SystemExit(main())
