"""Measure on a CPU the fixed choices: layout, threads, compiler, how threads wait, whether memory stays.

    python benchmarks/cpu.py --out results/speed-cpu            # on a machine that is otherwise idle: about 10 minutes

MFEF on two ResNet-20, float32. Layouts, threads and the plain loop are measured in turn in one process; ways of
waiting and of giving memory back, which hold for a whole process, in a process each, in turn, alone and beside
processes that keep a core busy. The load of the machine before each measurement is written beside it.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Before torch: it sets how threads wait.
import codistill  # noqa: F401  # isort: skip
import torch
import tyro

from codistill.bench.loops import CLASSES, SIDE, plain_loop, random_images, resident_loop
from codistill.bench.measurement import Contestant, ratio, rounds_in_turn, timed
from codistill.methods import Method
from codistill.runs.metadata import environment
from codistill.settings.build import build_method
from codistill.settings.config import ExecutionSettings, RunConfig, TrainSettings, default_config

# What torch does by default is libgomp's own count, which it uses where nothing is set. A tunable with its default
# value leaves the C library as it is, and keeps codistill from changing how it gives memory back.
WAITING = {
    "torch's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "spin 1000, memory given back": {"GOMP_SPINCOUNT": "1000", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"},
}


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    out: Path
    network: str = "resnet20"
    batch_size: int = 64
    seconds: float = 60.0
    """How long the layouts, and how long all ways of waiting together at each load, are measured."""
    rounds: int = 3
    """How many processes for each way of waiting."""
    busy: tuple[int, ...] = (0, 1)
    """Beside how many busy processes."""
    compiled: bool = True
    """Measure a step whose stages are compiled, too; compiling takes minutes."""


def config_of(options: Options) -> RunConfig:
    train, execution = TrainSettings(batch_size=options.batch_size), ExecutionSettings(device="cpu")
    networks = (options.network, options.network)
    return replace(default_config("mfef"), networks=networks, train=train, execution=execution)


def contestants(options: Options) -> list[Contestant]:
    """Make loops that differ in layout, threads or compilation, and the plain loop."""
    config, device, most = config_of(options), torch.device("cpu"), torch.get_num_threads()
    data = random_images()

    def build(layout: Any) -> Method:
        return build_method(config, CLASSES, (SIDE, SIDE)).train().to(memory_format=layout)

    def with_threads(train: Callable[[int], None], threads: int) -> Callable[[int], None]:
        def run(steps: int) -> None:
            torch.set_num_threads(threads)
            train(steps)

        return run

    made = []
    for threads in sorted({1, most}, reverse=True):
        for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
            train = resident_loop([build(layout)], config, device, data, layout)
            made.append(Contestant(f"{name}, threads {threads}", with_threads(train, threads), False))
    if options.compiled:
        method = build(torch.channels_last)
        for student in method.cohort:
            for stage in student.stages:
                stage.compile(dynamic=False)
        train = resident_loop([method], config, device, data)
        made.append(Contestant(f"channels_last, compiled, threads {most}", with_threads(train, most), False))
    plain = plain_loop(build(torch.contiguous_format), config, device, data)
    return [*made, Contestant(f"plain loop, threads {most}", with_threads(plain, most), False)]


def layouts(options: Options) -> dict[str, Any]:
    """Measure layouts and threads in turn in this process."""
    device, entered = torch.device("cpu"), contestants(options)
    pace = {each.name: timed(each, 2, device) for each in entered}
    load = os.getloadavg()
    rounds = rounds_in_turn(entered, pace, options.seconds, device)
    reference = entered[0].name
    return {
        "load": load,
        "rounds": rounds,
        "images_per_second": {
            name: options.batch_size / statistics.median(seconds) for name, seconds in rounds.items()
        },
        "relative": {name: ratio(rounds, reference, name) for name in rounds},
    }


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many cores busy, at most as long as this process lives."""
    program = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    held = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(count)]
    try:
        yield
    finally:
        for each in held:
            each.kill()
            each.wait()


def bench(variables: dict[str, str], seconds: float, options: Options) -> dict[str, Any]:
    """Run `codistill bench --compare` with environment variables of OpenMP."""
    command = [sys.executable, "-m", "codistill", "bench", "mfef", "--networks", options.network, options.network]
    command += ["--batch-size", str(options.batch_size), "--device", "cpu", "--compare", "--json"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [*command, "--seconds", str(seconds)], capture_output=True, text=True, check=True, env=inherited | variables
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def waiting(options: Options) -> list[dict[str, Any]]:
    """Measure the ways of waiting in turn, at each load."""
    share = options.seconds / options.rounds / len(WAITING)
    found = []
    for busy in options.busy:
        for _ in range(options.rounds):
            for name, variables in WAITING.items():
                load = os.getloadavg()
                with busy_processes(busy):
                    result = bench(variables, share, options)
                kept = {key: result[key] for key in ("images_per_second", "plain_images_per_second", "ratio_to_plain")}
                found.append({"waiting": name, "busy": busy, "load": load, **kept})
    return found


def table(first: dict[str, Any], second: list[dict[str, Any]], options: Options) -> str:
    """Write Markdown: medians, images per second."""
    rows = ["| one process, in turn | images/s | relative to the first |", "|---|---|---|"]
    for name, speed in first["images_per_second"].items():
        rows.append(f"| {name} | {speed:.0f} | {first['relative'][name]:.2f} |")
    heads = [f"{loop}, {busy} busy" for busy in options.busy for loop in ("ours", "plain loop", "ours / plain")]
    rows += ["", f"| threads wait | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in WAITING:
        cells = []
        for busy in options.busy:
            same = [each for each in second if each["waiting"] == name and each["busy"] == busy]
            for key, form in (
                ("images_per_second", ".0f"),
                ("plain_images_per_second", ".0f"),
                ("ratio_to_plain", ".2f"),
            ):
                cells.append(format(statistics.median(each[key] for each in same), form))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment(torch.device("cpu")), "cores": os.cpu_count(), "batch_size": options.batch_size}
    first, second = layouts(options), waiting(options)
    text = table(first, second, options)
    (options.out / "measured.json").write_text(
        json.dumps({**facts, "layouts": first, "waiting": second}, indent=1) + "\n"
    )
    (options.out / "table.md").write_text(f"{text}\n\n`{json.dumps(facts)}`\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options))
