"""What exact resume costs: a training with and without it, in turn in one process.

    python benchmarks/saving.py --out results/reliability

Two equal trainings of digits take turns, step by step. One is as users have it: terms, gradients and the state are
checked for NaN, and each epoch ends with a checkpoint, metrics and events, waited for here until they are on the disk.
In the other all of this is taken out. The cost of an epoch is its number of steps times the median difference of two
neighbouring steps, and the median difference of two neighbouring ends of epochs; the machine's noise, which is larger
than that, cancels. Prints the share of an epoch, and writes OUT/saving.json and OUT/saving.md.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

# Before torch: it says how threads wait.
import codistill as cd  # isort: skip
import torch

from codistill.core.signals import SignalRequests
from codistill.runs.metadata import environment
from codistill.runs.saving import Saver
from codistill.settings.build import load_named_data
from codistill.settings.config import default_config
from codistill.training.capture import make_fleet
from codistill.training.loop import completed, handle_signals
from codistill.training.prepare import build_taught, set_up
from codistill.training.trainer import Trainer


@contextlib.contextmanager
def unsafe() -> Iterator[None]:
    """Take out all that makes a run safe."""
    with (
        mock.patch("codistill.step.norms", lambda gradients: []),
        mock.patch.object(cd.watch.NonFiniteDetector, "update", lambda self, names, values: None),
        mock.patch("codistill.divergence.state_damage", lambda state: ([], torch.zeros(0))),
        mock.patch.object(Saver, "copy", lambda self, state: state),
        mock.patch.object(Saver, "log", lambda self, state: None),
    ):
        yield


class Training:
    """One of the two trainings, and what its parts took, in seconds."""

    def __init__(self, loop: Trainer, safe: bool) -> None:
        self.loop, self.safe = loop, safe
        self.fleet = make_fleet([loop.step])
        self.steps: list[float] = []
        self.evaluations: list[float] = []
        self.ends: list[float] = []

    def begin(self, epoch: int) -> None:
        """Draw the order of an epoch."""
        self.plan = self.loop.begin_epoch(epoch)
        self.loop.stopwatch.start()

    @contextlib.contextmanager
    def timed(self, times: list[float]) -> Iterator[None]:
        """Time something, in the way of this training."""
        with contextlib.nullcontext() if self.safe else unsafe():
            began = time.perf_counter()
            yield
            times.append(time.perf_counter() - began)

    def step(self, epoch: int, number: int, place: tuple[int, int]) -> None:
        """Train on a batch."""
        progress = torch.full((), epoch / self.loop.config.train.epochs)
        with self.timed(self.steps):
            self.fleet([self.plan.part(*place)], progress)
            handle_signals(SignalRequests(), [self.loop], epoch, number)

    def end(self, epoch: int) -> None:
        """Evaluate and save."""
        self.loop.stopwatch.stop()
        with self.timed(self.evaluations):
            self.loop.evaluation.run()
        with self.timed(self.ends):
            for numbers, state in completed([self.loop]):
                self.loop.end_epoch(epoch, numbers, state)
            self.loop.saver.flush()


def difference(first: list[float], second: list[float]) -> float:
    """Give the median difference of neighbours."""
    return statistics.median(a - b for a, b in zip(first, second, strict=True))


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
    with tempfile.TemporaryDirectory(prefix="codistill-saving-") as folder, contextlib.ExitStack() as held:
        safe, bare = (
            Training(
                held.enter_context(
                    set_up(build_taught(config, data), data, config, Path(folder) / name, device, False)
                ),
                name == "safe",
            )
            for name in ("safe", "bare")
        )
        for epoch in range(options.epochs + 1):
            for each in (safe, bare):
                each.begin(epoch)
            for number, place in enumerate(safe.loop.steps, start=1):
                for each in (safe, bare) if number % 2 else (bare, safe):
                    each.step(epoch, number, place)
            for each in (safe, bare) if epoch % 2 else (bare, safe):
                each.end(epoch)
            if epoch == 0:  # it warms up
                for each in (safe, bare):
                    each.steps, each.evaluations, each.ends = [], [], []
            print(f"epoch {epoch} of {options.epochs}", flush=True)
    steps = len(safe.loop.steps)
    whole = steps * statistics.median(bare.steps) + statistics.median(bare.evaluations) + statistics.median(bare.ends)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "networks": options.networks,
        "batch_size": options.batch_size,
        "train_images": len(data.train),
        "epochs": options.epochs,
        "steps": steps,
        "epoch_seconds_without": whole,
        "seconds_more_for_a_step": difference(safe.steps, bare.steps),
        "seconds_more_for_an_end": difference(safe.ends, bare.ends),
        "environment": environment(device),
    }
    more = steps * result["seconds_more_for_a_step"] + result["seconds_more_for_an_end"]
    result["share_of_an_epoch"] = more / whole
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "saving.json").write_text(json.dumps(result, indent=2) + "\n")
    machine = result["environment"]
    text = (
        f"`{result['command']}`: digits, {' + '.join(options.networks)}, batch {options.batch_size}, {options.epochs} "
        f"epochs of {steps} steps in turn. An epoch takes {whole:.2f} s without checks and saves; they take "
        f"{1000 * result['seconds_more_for_a_step']:.2f} ms more for a step and "
        f"{1000 * result['seconds_more_for_an_end']:.0f} ms more at its end, until all is on the disk: "
        f"**{100 * result['share_of_an_epoch']:.2f} % of an epoch**.\n\n"
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}.\n"
    )
    (options.out / "saving.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
