"""The speed of a training step on this machine, alone and beside a plain PyTorch loop of the usual style."""

import contextlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from codistill.bench.limit import products_loop
from codistill.bench.loops import plain_loop, random_images, refuse_unlike_work, resident_loop
from codistill.bench.measurement import Contestant, count_launches, ratio, rounds_in_turn, timed
from codistill.core.console import warn
from codistill.core.device import choose_device, choose_precision, set_up_gpu
from codistill.core.errors import UsageError
from codistill.core.host import set_up_cpu
from codistill.methods import Method
from codistill.networks.network import parameter_count
from codistill.networks.probe import forward_flop
from codistill.runs.metadata import environment
from codistill.settings.build import load_named_data
from codistill.settings.config import RunConfig
from codistill.training.compiling import choose_execution
from codistill.training.prepare import build_taught

STEPS_UNTIL_CAPTURED = 8
OWN, LIMIT, PLAIN, DETERMINISTIC = "codistill", "limit", "plain", "deterministic"


def bench(
    config: RunConfig, runs: int = 1, compare: bool = False, seconds: float = 15.0, table: Path | None = None
) -> dict[str, Any]:
    """Measure training steps on the run's data set, or on random images of CIFAR-100's shape where it names none.

    Args:
        config: Method, networks, data set, batch size, augmentation, precision, device and compile (auto: off).
        runs: How many independent runs train side by side.
        compare: Whether to measure the plain loop too, and on CUDA the deterministic setting, in turn with ours.
        seconds: About how long to measure, set-up not included.
        table: A text file for the operators or kernels that took longest in one step; None: none is written.

    Returns:
        What was measured, speed and launches of each run, and peak memory of all runs. first_step_seconds reaches from
        building the networks to the end of a first step, compilation included. Ratios are medians over rounds in turn:
        `ratio_to_plain` is our images per second over the plain loop's, `deterministic_ratio` those of the
        deterministic setting over ours.

    Raises:
        UsageError: The batch is too large; or `compare`, and the plain loop does not do the work of these settings.
    """
    if config.execution.stream == "on":
        raise UsageError("bench measures steps with all images in memory: leave out --stream on")
    device = choose_device(config.execution.device, config.execution.precision)
    config = config.in_precision(choose_precision(config.execution.precision, device))
    set_up_gpu(device, config.execution.deterministic)
    set_up_cpu(config.execution.threads, device)
    data, on_gpu = load_named_data(config) if config.data else random_images(), device.type == "cuda"
    size = min(config.train.batch_size, len(data.train))
    if size < config.train.batch_size and not config.data:
        raise UsageError(f"batch_size is {config.train.batch_size}; bench has {size} images: use a smaller batch")
    if size < config.train.batch_size:
        warn(f"there are {size} training images, less than a batch of {config.train.batch_size}: steps are of {size}")

    if compare:
        refuse_unlike_work(build_taught(config, data).train(), config)

    def build() -> Method:
        return build_taught(config, data).to(device).train()

    def own(name: str, deterministic: bool) -> Contestant:
        methods = [build() for _ in range(runs)]
        for method in methods:
            running.enter_context(execution.on(method, device, deterministic))
        return Contestant(name, resident_loop(methods, config, device, data), deterministic)

    started = time.perf_counter()
    # For so few steps that compile auto, which takes longer than it is measured for here, is off.
    execution = choose_execution(config.execution, device, pixels=0, overlap=runs == 1)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.ExitStack() as running:
        contestants = [own(OWN, config.execution.deterministic)]
        pace = {OWN: timed(contestants[0], 1, device)}
        first_step = time.perf_counter() - started
        measured: dict[str, float] = {}
        if on_gpu:
            pace[OWN] = timed(contestants[0], STEPS_UNTIL_CAPTURED, device)
            measured["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
            measured["peak_reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
        # Of a first step, which is eager on CUDA too.
        first = resident_loop([build() for _ in range(runs)], config, device, data)
        contestants.append(Contestant(LIMIT, products_loop(first, device), config.execution.deterministic))
        unit, count = count_launches(contestants[0], device, table)
        measured[f"{unit}_per_step"] = count // runs
        if compare:
            contestants.append(
                Contestant(PLAIN, plain_loop(build(), config, device, data), config.execution.deterministic)
            )
            if on_gpu and not config.execution.deterministic:
                contestants.append(own(DETERMINISTIC, True))
        pace |= {each.name: timed(each, STEPS_UNTIL_CAPTURED if on_gpu else 1, device) for each in contestants[1:]}
        rounds = rounds_in_turn(contestants, pace, seconds, device)
    step = {name: statistics.median(each) for name, each in rounds.items()}
    method = build()
    result: dict[str, Any] = {
        "method": config.method_name,
        "networks": list(config.networks),
        "data": config.data or data.name,
        "image_size": list(data.image_size),
        "classes": data.num_classes,
        "training_images": len(data.train),
        "batch_size": size,
        "precision": config.execution.precision,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "execution": asdict(execution),
        "ms_per_step": 1000 * step[OWN] / runs,
        "images_per_second": size / step[OWN],
        "limit_ms_per_step": 1000 * step[LIMIT] / runs,
        "times_limit": ratio(rounds, OWN, LIMIT),
        "first_step_seconds": first_step,
        **measured,
        "parameters": parameter_count(method),
        "forward_mflop_per_image": forward_flop(method, data.image_size, method.views) / 1e6,
        "environment": environment(device),
    }
    if PLAIN in step:
        result |= {"plain_ms_per_step": 1000 * step[PLAIN], "plain_images_per_second": size / step[PLAIN]}
        result["ratio_to_plain"] = runs * ratio(rounds, PLAIN, OWN)
    if DETERMINISTIC in step:
        result["deterministic_ratio"] = ratio(rounds, OWN, DETERMINISTIC)
    return result


def lines(result: Mapping[str, Any]) -> list[str]:
    """Write a result of `bench` for people."""
    ways = ", ".join(name for name, chosen in result["execution"].items() if chosen)
    speed = f"{result['ms_per_step']:.2f} ms per step of a run, {result['images_per_second']:,.0f} images/s each"
    height, width = result["image_size"]
    images = f"{result['data']}: {height}x{width} pixels, {result['classes']} classes"
    times = f" x {result['runs']} runs" if result["runs"] > 1 else ""
    text = [
        f"{result['method']} with {' + '.join(result['networks'])}{times} on {images}; batch {result['batch_size']}, "
        f"{result['precision']}, {result['device']}, {result['threads']} CPU threads",
        f"{speed} ({ways})" if ways else speed,
    ]
    limit = f"{result['limit_ms_per_step']:.2f} ms of it in convolutions and matrix products alone"
    text.append(f"{limit}; the step takes {result['times_limit']:.2f} times as long")
    if "ratio_to_plain" in result:
        plain = f"{result['plain_ms_per_step']:.2f} ms per step, {result['plain_images_per_second']:,.0f} images/s"
        text.append(f"plain loop: {plain}; ours is {result['ratio_to_plain']:.2f} times as fast")
    if "deterministic_ratio" in result:
        text.append(f"with --deterministic: {result['deterministic_ratio']:.2f} times that speed")
    unit = "kernels" if "kernels_per_step" in result else "operators"
    text.append(f"{result[f'{unit}_per_step']:,} {unit} per step")
    mflop = f"{result['forward_mflop_per_image']:,.0f} MFLOP per image forward, three times as many in training"
    text.append(f"{result['parameters']:,} parameters; {mflop}")
    if "peak_memory_mib" in result:
        return [*text, f"peak memory {result['peak_memory_mib']:,.0f} MiB, reserved {result['peak_reserved_mib']:,.0f}"]
    return [*text, "memory is measured on CUDA only"]
