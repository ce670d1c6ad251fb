"""Measure how time and memory of a training step grow, beside a plain PyTorch loop, and draw them.

    python benchmarks/scaling.py --out results/scaling-cpu                     # two cores: under 10 minutes

MFEF, float32, on a CPU; one axis at a time from two ResNet-8 at batch 64 on 1,024 images of 32x32 pixels: students,
depth, width, batch, image size, number of images. A point is two processes: one trains with codistill until its memory
is known, and then both loops in turn for the processor's time; the other one the plain loop alone, for its memory, with
the C library's usual habits. Peak memory of the step is the most that a process has held (resource.getrusage) beyond
what it held when network, images and optimiser were made. Points are kept in OUT/measured.json; another start measures
those that are missing. OUT/scaling.png draws them, OUT/table.md has slopes: the power of x with which time and memory
grow, and the power of the work, in floating-point operations, with which time does: above 1, it grows faster than its
work.
"""

import functools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Before torch: it sets how threads wait.
import codistill  # noqa: F401  # isort: skip
import numpy as np
import torch
import tyro

from codistill.bench.loops import plain_loop, resident_loop
from codistill.bench.measurement import ratio
from codistill.core.host import release_freed_memory, set_up_cpu
from codistill.data.dataset import Dataset, Split
from codistill.methods import Method
from codistill.methods.mfef import MFEF
from codistill.networks import Network
from codistill.networks.layers import initialise
from codistill.networks.probe import forward_flop
from codistill.networks.resnet import BasicBlock, basic_resnet
from codistill.runs.metadata import environment
from codistill.settings.config import TrainSettings, default_config

CPU, CLASSES = torch.device("cpu"), 100
OURS, PLAIN = "codistill", "plain"
STEPS_FOR_MEMORY = 6
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Point:
    """One place on the axes."""

    students: int = 2
    depth: int = 8
    width: int = 16
    batch: int = 64
    size: int = 32
    images: int = 1024


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    out: Path
    students: tuple[int, ...] = (1, 2, 3, 4, 5)
    depth: tuple[int, ...] = (8, 14, 20, 32)
    width: tuple[int, ...] = (8, 16, 32, 64)
    """Channels of the first stage, of 16 in the usual ResNets."""
    batch: tuple[int, ...] = (32, 64, 128, 256)
    size: tuple[int, ...] = (16, 24, 32, 48)
    """Height and width of the images, pixels."""
    images: tuple[int, ...] = (512, 1024, 4096, 16384)
    start: Point = field(default_factory=Point)
    """Where all axes meet."""
    seconds: float = 5.0
    """How long to measure the time of each point."""
    threads: int = 1
    """More than one wait for each other, and waiting costs the processor's time, too."""

    def axes(self) -> dict[str, list[Point]]:
        names = ("students", "depth", "width", "batch", "size", "images")
        return {name: [replace(self.start, **{name: each}) for each in getattr(self, name)] for name in names}


def network(point: Point) -> Network:
    width, blocks = point.width, (point.depth - 2) // 6
    block = functools.partial(BasicBlock, shortcut="B")
    made = basic_resnet(CLASSES, (width, width, 2 * width, 4 * width), blocks, block)
    initialise(made)
    return made


def method_of(point: Point) -> Method:
    # One student has nobody to learn from.
    settings = MFEF.Settings() if point.students > 1 else MFEF.Settings(distillation="none")
    students = [network(point) for _ in range(point.students)]
    return MFEF(students, CLASSES, settings, image_size=(point.size, point.size)).train()


def held_mib() -> float:
    """Return what this process holds now, resident."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(point: Point, loop: str, seconds: float, threads: int) -> dict[str, Any]:
    """Train a loop in this process for its memory, and, if it is codistill's, then both loops in turn for time."""
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (point.images, point.size, point.size, 3), dtype=np.uint8)
    split = Split(pixels, random.integers(0, CLASSES, point.images))
    data = Dataset("random images", split, split, tuple(map(str, range(CLASSES))))
    method, config = method_of(point), replace(default_config("mfef"), train=TrainSettings(batch_size=point.batch))
    if loop == OURS:
        set_up_cpu(threads, CPU)
        train = resident_loop([method], config, CPU, data)
    else:
        train = plain_loop(method, config, CPU, data)
    # What making the images has freed, and its peak, are not the step's.
    release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = held_mib()
    train(STEPS_FOR_MEMORY)
    found = {"peak_mib": peak_mib(), "step_mib": peak_mib() - before}
    if loop == PLAIN:
        return found
    loops = {OURS: train, PLAIN: plain_loop(method_of(point), config, CPU, data)}
    rounds = in_turn(loops, seconds)
    times = {name: 1000 * statistics.median(each) for name, each in rounds.items()}
    work = 3 * forward_flop(method, data.image_size, method.views) * point.batch / 1e9
    return found | {"ms": times, "ratio_to_plain": ratio(rounds, PLAIN, OURS), "gflop": work}


def in_turn(loops: Mapping[str, Callable[[int], None]], seconds: float) -> dict[str, list[float]]:
    """Return by round the processor's seconds that a step of each loop takes; they hardly depend on other work."""
    rounds: dict[str, list[float]] = {name: [] for name in loops}
    started = time.perf_counter()
    loops[PLAIN](1)
    while time.perf_counter() - started < seconds or len(rounds[OURS]) < LEAST_ROUNDS:
        for name, train in loops.items():
            before = time.process_time()
            train(1)
            rounds[name].append(time.process_time() - before)
    return rounds


def in_a_process(point: Point, loop: str, options: Options) -> dict[str, Any]:
    """Measure in a process of its own."""
    asked = json.dumps([vars(point), loop, options.seconds, options.threads])
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [sys.executable, __file__, "--point", asked], stdout=subprocess.PIPE, env=environment, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Fit y = c x^slope by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes(axis: str, points: Sequence[Point], found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the powers with which an axis raises times and memory, and with which work raises times."""
    x, work = [getattr(each, axis) for each in points], [each["gflop"] for each in found]
    result = {"work": slope(x, work)}
    for name in (OURS, PLAIN):
        times = [each["ms"][name] for each in found]
        result |= {
            f"time, {name}": slope(x, times),
            f"memory, {name}": slope(x, [each[name]["step_mib"] for each in found]),
        }
        # Where work does not grow, time per work has no power.
        result[f"time of work, {name}"] = slope(work, times) if max(work) > 1.01 * min(work) else math.nan
    return result


def table(options: Options, measured: Mapping[str, Any]) -> str:
    """Write Markdown: every point, and the slopes of every axis."""
    heads = (
        "x",
        "GFLOP a step",
        "ms a step",
        "plain loop",
        "plain / ours",
        "MiB of the step",
        "plain loop",
        "ours / plain",
    )
    rows = []
    fitted = {}
    for axis, points in options.axes().items():
        done = [(each, measured[key(each)]) for each in points if key(each) in measured]
        rows += [f"| {axis} | {' | '.join(heads[1:])} |", "|---" * len(heads) + "|"]
        for point, found in done:
            ours, plain = found[OURS]["step_mib"], found[PLAIN]["step_mib"]
            times = f"{found['ms'][OURS]:.1f} | {found['ms'][PLAIN]:.1f} | {found['ratio_to_plain']:.2f}"
            memory = f"{ours:.0f} | {plain:.0f} | {ours / plain:.2f}"
            rows.append(f"| {getattr(point, axis)} | {found['gflop']:.2f} | {times} | {memory} |")
        rows.append("")
        if len(done) > 1:
            fitted[axis] = slopes(axis, *zip(*done, strict=True))
    names = list(next(iter(fitted.values()), {}))
    rows += [f"| slopes: power of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows += [f"| {axis} | {' | '.join(f'{each[name]:.2f}' for name in names)} |" for axis, each in fitted.items()]
    return "\n".join([*rows, "", f"`{json.dumps(environment(CPU) | {'threads': options.threads})}`", ""])


def draw(options: Options, measured: Mapping[str, Any], path: Path) -> None:
    """Draw time and memory over every axis, both on logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = options.axes()
    figure, panels = plt.subplots(2, len(axes), figsize=(3 * len(axes), 6), sharex="col", sharey="row")
    colours = {OURS: "tab:blue", PLAIN: "tab:gray"}
    for column, (axis, points) in enumerate(axes.items()):
        done = [(getattr(each, axis), measured[key(each)]) for each in points if key(each) in measured]
        x = [each for each, _ in done]
        for name, colour in colours.items():
            quantities = [found["ms"][name] for _, found in done], [found[name]["step_mib"] for _, found in done]
            for panel, y in zip(panels[:, column], quantities, strict=True):
                label = f"{name}, slope {slope(x, y):.2f}" if len(x) > 1 else name
                panel.loglog(x, y, "o-", color=colour, label=label, markersize=4)
        if done:
            # Time as if it grew as work does, from the first point on.
            work = [found["gflop"] / done[0][1]["gflop"] * done[0][1]["ms"][OURS] for _, found in done]
            panels[0, column].loglog(x, work, ":", color="tab:orange", label="as the work")
        panels[1, column].set_xlabel(axis)
        panels[1, column].set_xticks(x, [f"{each:g}" for each in x])
        panels[1, column].minorticks_off()
        for panel in panels[:, column]:
            panel.legend(fontsize=7)
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("ms a step")
    panels[1, 0].set_ylabel("peak memory of the step, MiB")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def key(point: Point) -> str:
    return json.dumps(vars(point))


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "measured.json"
    measured: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for points in options.axes().values():
        for point in points:
            if key(point) in measured:
                continue
            ours = in_a_process(point, OURS, options)
            held = {name: ours.pop(name) for name in ("peak_mib", "step_mib")}
            measured[key(point)] = {**ours, OURS: held, PLAIN: in_a_process(point, PLAIN, options)}
            path.write_text(json.dumps(measured, indent=1) + "\n")
            print(key(point), json.dumps(measured[key(point)]), flush=True)
    text = table(options, measured)
    (options.out / "table.md").write_text(text)
    draw(options, measured, options.out / "scaling.png")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        point, *rest = json.loads(sys.argv[2])
        print(json.dumps(measure(Point(**point), *rest)))
    else:
        main(tyro.cli(Options))
