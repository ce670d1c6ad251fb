"""Measure runs that share the cores of a CPU: several at a time, and one beside other programs.

    python benchmarks/runs.py --out results/speed-cpu/runs.json          # about 10 minutes

Whole commands in turn: one run with all threads and several by `--seeds`, on an idle machine; then one run as it
chooses its threads, with all of them and with one, beside processes that keep a core busy each, with threads that wait
as codistill sets it and as torch does by default, which is how they wait where torch is imported first. Images/s are
those of all runs together between the first step and the summary.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from cpu import busy_processes


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    out: Path
    method: str = "independent"
    networks: tuple[str, ...] = ("resnet20",)
    runs: int = 4
    epochs: int = 3
    images: int = 2560
    rounds: int = 3
    busy: int = 2
    """How many busy processes."""
    only: str = ""
    """Measure only what has this in its name."""


SPINNING = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own count


def train(options: Options, folder: Path, runs: int, flags: Sequence[str], variables: dict[str, str]) -> dict[str, Any]:
    """Train so many runs by one command; return images/s of all together, threads of each, and the command's time."""
    command = [sys.executable, "-m", "codistill", "train", options.method, "--networks", *options.networks]
    command += ["--data", "packed", "--data-dir", str(folder / "images.npz"), "--epochs", str(options.epochs)]
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    seeds = ["--seeds", *map(str, range(runs))] if runs > 1 else []
    load, started = os.getloadavg()[0], time.monotonic()
    command += [*seeds, "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | variables)
    seconds = time.monotonic() - started
    summaries = [json.loads(path.read_text()) for path in out.rglob("summary.json")]
    processes = next((int(line.split()[3]) for line in done.stderr.splitlines() if "at a time" in line), 1)
    trained = runs * options.epochs * options.images
    # In one process they take turns, and each lasts as long as all.
    spans = [each["wall_seconds"] for each in summaries]
    span = max(spans) if processes == 1 else sum(spans) / processes
    return {
        "images_per_second": trained / span,
        "command_seconds": seconds,
        "processes": processes,
        "threads": summaries[0]["environment"]["threads"],
        "load": load,
    }


def main(options: Options) -> None:
    random = np.random.default_rng(0)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays: dict[str, Any] = {}
        for split, count in (("train", options.images), ("test", 200)):
            arrays[f"{split}_images"] = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            arrays[f"{split}_labels"] = np.arange(count) % 100
        np.savez(folder / "images.npz", **arrays)
        everything, one = ("--threads", str(os.cpu_count())), ("--threads", "1")
        cases: list[tuple[str, int, Sequence[str], dict[str, str], int]] = [
            ("one run, all threads", 1, everything, {}, 0),
            (f"{options.runs} runs", options.runs, (), {}, 0),
        ]
        for words, variables in (("busy", {}), ("busy, threads spin", SPINNING)):
            for how, flags in (("all threads", everything), ("as it chooses", ()), ("one thread", one)):
                cases.append((f"{words}: one run, {how}", 1, flags, variables, options.busy))
        for _ in range(options.rounds):
            for label, runs, flags, variables, busy in cases:
                if options.only not in label:
                    continue
                with busy_processes(busy):
                    found.setdefault(label, []).append(train(options, folder, runs, flags, variables))
                print(label, found[label][-1], flush=True)
    facts = {**asdict(options), "out": str(options.out), "cores": os.cpu_count()}
    options.out.write_text(json.dumps({"options": facts, "measured": found}, indent=1) + "\n")
    for label, rounds in found.items():
        speed = statistics.median(each["images_per_second"] for each in rounds)
        ways = sorted({(each["processes"], each["threads"]) for each in rounds})
        print(f"| {label} | {speed:.0f} | {', '.join(f'{many} x {threads}' for many, threads in ways)} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
