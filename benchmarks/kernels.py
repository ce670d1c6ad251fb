"""Measure compiled parts and fused kernels against PyTorch's own, alone and inside MFEF's training step.

    python benchmarks/kernels.py --out runs/kernels     # on a GPU: most of the time is compiling
    python benchmarks/kernels.py --out runs/dry --device cpu --networks resnet20 --variants stock stage \
        --backend aot_eager --batch-size 8 --rounds 1 --seconds 1     # whether it runs

Each case is a process of its own and a JSON file below --out; a case whose file is there is not measured again.
Compiled steps are measured twice, with an empty and then with a filled folder of compiled code. `table.md` has all
results.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from codistill.bench_loop import PADDING, STATISTICS, images, resident_loop
from codistill.compiling import compile_in_place, parts_of
from codistill.config import RunConfig, TrainSettings, default_config
from codistill.data.augment import Augmentation, DeviceImages, epoch_plan
from codistill.device import choose_device, set_up_gpu
from codistill.kernels import use_fused
from codistill.methods import Method
from codistill.networks.network import Normalise, normalised
from codistill.record import environment
from codistill.run import build_method
from codistill.step import Augmented

Variant = Literal["stock", "block", "stage", "branch", "whole", "fused"]
VARIANTS: tuple[Variant, ...] = ("stock", "block", "stage", "branch", "whole", "fused")
COMPILED = ("block", "stage", "branch", "whole")
# Channels and side of the maps of resnet32 and resnet110 (the same ones), then of wrn-16-2.
MAPS = ((16, 32), (32, 16), (64, 8), (32, 32), (64, 16), (128, 8))
CALLS_IN_A_GRAPH = 20
# The fleet's three plain steps, and the one that is captured.
STEPS_UNTIL_CAPTURED = 4
CLASSES, SIDE = 100, 32


@dataclass(frozen=True)
class Options:
    """What to measure."""

    out: Path
    networks: tuple[str, ...] = ("resnet32", "wrn-16-2", "resnet110")
    """Each one is trained as two equal students."""
    variants: tuple[Variant, ...] = VARIANTS
    """Of the step: nothing special, what is compiled as one, or fused kernels."""
    batch_size: int = 128
    precision: Literal["float32", "bf16"] = "bf16"
    device: str = "auto"
    backend: str = "inductor"
    """Of torch.compile; aot_eager makes a dry run quick."""
    rounds: int = 5
    seconds: float = 10.0
    """How long to measure a case, all rounds together, beside making ready."""
    limit: float = 400.0
    """How long a case may take in all, seconds."""
    case: str = ""
    """Measure this one case in this process and print it; used by the script itself."""


def cases(options: Options) -> list[str]:
    """Name all: layer/<channels>x<side>, augmentation/<images>, step/<network>/<variant>/<folder of compiled code>."""
    layers = [f"layer/{channels}x{side}" for channels, side in MAPS] + [f"augmentation/{options.batch_size}"]
    steps = [
        f"step/{network}/{variant}/{cache}"
        for network in options.networks
        for variant in options.variants
        for cache in (("empty", "filled") if variant in COMPILED else ("none",))
    ]
    return layers + steps


def rounds_of(run: Callable[[int], None], seconds: float, rounds: int, device: torch.device) -> list[float]:
    """Time a loop, milliseconds a step for each round."""

    def timed(steps: int) -> float:
        wait(device)
        started = time.perf_counter()
        run(steps)
        wait(device)
        return (time.perf_counter() - started) / steps

    pace = timed(1)
    steps = max(1, round(seconds / rounds / pace))
    return [1000 * timed(steps) for _ in range(rounds)]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def implementations(device: torch.device) -> dict[str, Normalise]:
    if device.type != "cuda":
        return {"stock": normalised}
    from codistill.kernels.batch_norm import normalised as fused

    return {"stock": normalised, "compiled": torch.compile(normalised, dynamic=False), "fused": fused}


def augmentations(device: torch.device) -> dict[str, Augmented]:
    stock = DeviceImages.augmented
    if device.type != "cuda":
        return {"stock": stock}
    from codistill.kernels.augment import augmented

    return {"stock": stock, "compiled": torch.compile(stock, dynamic=False), "fused": augmented}


def alone(call: Callable[[], object], options: Options, device: torch.device) -> list[float]:
    """Time calls, microseconds each, for each round; on CUDA within a graph, captured on the current stream."""

    def plainly(times: int) -> None:
        for _ in range(times):
            call()

    plainly(STEPS_UNTIL_CAPTURED)
    if device.type != "cuda":
        return [1000 * each for each in rounds_of(plainly, options.seconds / 10, options.rounds, device)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        plainly(CALLS_IN_A_GRAPH)

    def replay(times: int) -> None:
        for _ in range(times):
            graph.replay()

    rounds = rounds_of(replay, options.seconds / 10, options.rounds, device)
    return [1000 * each / CALLS_IN_A_GRAPH for each in rounds]


def measure_augmentation(count: int, options: Options) -> dict[str, list[float]]:
    """Time cropping, flipping and normalising a batch of `count` of the images that steps are measured with.

    Returns:
        Microseconds a call for each round; on CUDA of calls within a graph.
    """
    device = choose_device(options.device, options.precision)
    augmentation = Augmentation(padding=PADDING)
    with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
        resident = DeviceImages(images(), STATISTICS, device)
        batch = epoch_plan(len(resident), 0, 0, augmentation, device).part(0, count)
        return {
            name: alone(lambda compute=compute: compute(resident, batch, augmentation), options, device)
            for name, compute in augmentations(device).items()
        }


def measure_layer(channels: int, side: int, options: Options) -> dict[str, list[float]]:
    """Time batch normalisation with ReLU, alone and with an addition between, forward and backward, each way there is.

    Returns:
        Microseconds a call for each round; on CUDA of calls within a graph.
    """
    device = choose_device(options.device, options.precision)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def random() -> Tensor:
        values = torch.randn(options.batch_size, channels, side, side, device=device, dtype=dtype)
        return values.contiguous(memory_format=torch.channels_last)

    def measured(compute: Normalise, added: bool) -> list[float]:
        norm = nn.BatchNorm2d(channels).to(device)
        features, gradient = random().requires_grad_(), random()
        skipped = random().requires_grad_() if added else None
        inputs = [each for each in (features, skipped, norm.weight, norm.bias) if each is not None]

        def call() -> None:
            torch.autograd.grad(compute(features, norm, skipped, True), inputs, gradient)

        return alone(call, options, device)

    with torch.cuda.stream(stream):
        return {
            f"{name}, {'added' if added else 'alone'}": measured(compute, added)
            for name, compute in implementations(device).items()
            for added in (False, True)
        }


def compile_branches(method: Method, backend: str) -> int:
    """Compile each student's branch with all that belongs to it as one, beside the trunk's stages and the fusion."""
    cohort = method.cohort
    alone = list(cohort[0].stages[: cohort.shared_stages])
    for name, child in method.named_children():
        if name not in ("cohort", "enhancements"):
            alone += parts_of(child, "stage")
    for part in alone:
        part.compile(dynamic=False, backend=backend)
    each_student = cohort.each_student
    cohort.each_student = lambda branch: each_student(torch.compile(branch, dynamic=False, backend=backend))
    return len(alone) + len(cohort)


def apply(variant: str, method: Method, options: Options, device: torch.device) -> int:
    """Change a method to a variant; give how many parts it changed."""
    if variant == "fused":
        return use_fused(method, device)
    if variant == "branch":
        return compile_branches(method, options.backend)
    return compile_in_place(method, variant, backend=options.backend) if variant in COMPILED else 0


def measure_step(network: str, variant: str, options: Options) -> dict[str, Any]:
    """Time the training step of MFEF with two equal students, on CUDA captured, and how long the first one takes."""
    device = choose_device(options.device, options.precision)
    set_up_gpu(device, deterministic=False)
    settings = TrainSettings(batch_size=options.batch_size, precision=options.precision, device=options.device)
    config: RunConfig = replace(default_config("mfef"), networks=(network, network), train=settings)
    torch.manual_seed(0)
    started = time.perf_counter()
    method = build_method(config, CLASSES, (SIDE, SIDE)).to(device, memory_format=torch.channels_last).train()
    parts = apply(variant, method, options, device)
    run = resident_loop([method], config, device)
    if variant == "whole":  # streams are not for compiled code to open
        method.cohort.streams = []
    run(1)
    wait(device)
    first = time.perf_counter() - started
    run(STEPS_UNTIL_CAPTURED)
    wait(device)
    ready = time.perf_counter() - started
    rounds = rounds_of(run, options.seconds, options.rounds, device)
    finite = all(bool(each.isfinite().all()) for each in method.state_dict().values())
    result = {"parts": parts, "first_step_seconds": first, "captured_after_seconds": ready, "ms_per_step": rounds}
    result |= {"weights_are_finite": finite}
    if device.type == "cuda":
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return result


def measure(options: Options) -> dict[str, Any]:
    """Measure the case that the options name."""
    kind, *rest = options.case.split("/")
    if kind == "layer":
        channels, side = map(int, rest[0].split("x"))
        result: dict[str, Any] = {"microseconds": measure_layer(channels, side, options)}
    elif kind == "augmentation":
        result = {"microseconds": measure_augmentation(int(rest[0]), options)}
    else:
        result = measure_step(rest[0], rest[1], options)
    device = choose_device(options.device, options.precision)
    return {"case": options.case, **result, "batch_size": options.batch_size, "precision": options.precision} | {
        "backend": options.backend,
        "environment": environment(device),
    }


def run_case(case: str, options: Options) -> None:
    """Measure a case in a process of its own, and keep what it found or why it failed."""
    cache = options.out / "compiled" / "-".join(case.split("/")[:3])
    if not case.endswith("/filled"):
        shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, __file__, "--case", case, "--out", str(options.out)]
    for name in ("batch_size", "precision", "device", "backend", "rounds", "seconds"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(cache.absolute())}
    inherited = {**os.environ, **variables}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit, env=inherited, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        result = {"case": case, "failed": error.stderr.strip().splitlines()[-5:]}
    except subprocess.TimeoutExpired:
        result = {"case": case, "failed": [f"not done after {options.limit:g} s"]}
    path = options.out / f"{case.replace('/', '-')}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Write Markdown: layers in microseconds, then steps in milliseconds; medians of the rounds, and their range."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    lines = ["| layer, forward and backward | implementation | us |", "|---|---|---|"]
    steps = ["| networks | variant | compiled code | parts | ms per step | of stock | first step s | finite |"]
    steps.append("|---|---|---|---|---|---|---|---|")
    stock: dict[str, float] = {}
    for result in results:
        kind, first, *rest = result["case"].split("/")
        if "failed" in result:
            (steps if kind == "step" else lines).append(f"| {first} | {' | '.join(rest)} | failed |")
        elif kind != "step":
            label = first if kind == "layer" else f"{kind} {first}"
            lines += [f"| {label} | {name} | {spread(each)} |" for name, each in result["microseconds"].items()]
        else:
            median = statistics.median(result["ms_per_step"])
            if rest[0] == "stock":
                stock[first] = median
            share = f"{median / stock[first]:.3f}" if first in stock else "-"
            cells = [f"2 x {first}", *rest, str(result["parts"]), spread(result["ms_per_step"]), share]
            cells += [f"{result['first_step_seconds']:.1f}", "yes" if result["weights_are_finite"] else "NO"]
            steps.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *steps]) + "\n"


def main(options: Options) -> None:
    if options.case:
        print(json.dumps(measure(options)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for case in cases(options):
        path = options.out / f"{case.replace('/', '-')}.json"
        if not path.exists():
            print(case, file=sys.stderr)
            run_case(case, options)
        results.append(json.loads(path.read_text()))
        (options.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options))
