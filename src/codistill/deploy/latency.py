"""How long each predictor of a run takes here, with the size of its file, its parameters and operations."""

import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codistill.core.console import track, warn
from codistill.core.errors import CodistillError, UsageError, reason
from codistill.core.host import cores
from codistill.data.dataset import Pixels
from codistill.deploy.classifier import make_card, on_pixels, onnx_session
from codistill.deploy.formats import calibration_images, quantise, write_onnx
from codistill.networks.network import parameter_count
from codistill.networks.probe import forward_flop
from codistill.runs.folder import RunFolder
from codistill.runs.latency import FILE, Cost, Latency, Runtime, Timing, read_latency, write_latency

BATCHES = (1, 64)
ROUNDS, LEAST_ROUNDS = 7, 3
SECONDS = 10.0
"""Of measurement, all predictors together; less where they are slow, for each is called in `LEAST_ROUNDS` rounds."""


def this_machine() -> dict[str, Any]:
    """Return what a latency depends on: processor, cores, GPU and versions."""
    try:
        import onnxruntime
    except ImportError:
        version = None
    else:
        version = onnxruntime.__version__
    return {
        "cpu": _processor(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "onnxruntime": version,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def known_latency(run: RunFolder, runtime: Runtime) -> Latency | None:
    """Return the measurements of RUN/latency.json if they are of this machine and all predictors in a runtime."""
    try:
        found = read_latency(run)
    except CodistillError:
        return None
    whole = found is not None and found.machine == this_machine() and found.image_size == run.image_size
    predictors = run.summary.get("parameters", {}) if run.status else {}
    if found is None or not whole or {name: each.parameters for name, each in found.predictors.items()} != predictors:
        return None
    return found if found.milliseconds(runtime).keys() == found.predictors.keys() else None


def measure_latency(
    run: RunFolder,
    runtimes: Sequence[Runtime] = ("torch", "onnx"),
    which: str = "last",
    images: Pixels | None = None,
    seconds: float = SECONDS,
) -> Latency:
    """Measure every predictor of a run on this machine, and write RUN/latency.json.

    Batches of 1 and 64 images, with one CPU thread and with all, on the CPU and on a GPU where there is one, as torch
    and as an ONNX file in ONNX Runtime. All of it is measured in turn, so that a busy minute strikes all alike. The
    weights do not matter: a file holds for every checkpoint of the run.

    Args:
        run: A run with a checkpoint.
        runtimes: Which of torch, onnx and onnx-int8.
        which: The `last` or the `best` checkpoint.
        images: Training images, uint8 [images, height, width, 3], that onnx-int8 is calibrated on; else not needed.
        seconds: About how long to measure, all in all; making the ONNX files is not included.

    Raises:
        UsageError: A predictor cannot be written as ONNX where onnx-int8 is asked for.
        CheckpointError: No whole checkpoint.
    """
    predictors = {name: module.eval() for name, module in run.predictors(which).items()}
    own, count = torch.get_num_threads(), cores()
    costs: dict[str, Cost] = {}
    calls: dict[tuple[Any, ...], Callable[[], object]] = {}
    for name, module in track(predictors.items(), "latency: writing ONNX files", len(predictors)):
        card = make_card(run, name)
        files = _files(module, card, runtimes, images)
        flops = forward_flop(module, run.image_size)
        sizes = {runtime: len(content) for runtime, content in files.items()}
        costs[name] = Cost(parameters=parameter_count(module), flops=flops, bytes=sizes)
        for batch in BATCHES:
            pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, *run.image_size), np.uint8)
            for threads in sorted({1, count}):
                if "torch" in runtimes:
                    calls[name, "torch", "cpu", batch, threads] = _torch_call(module, card, pixels, threads)
                for runtime, content in files.items():
                    calls[name, runtime, "cpu", batch, threads] = _onnx_call(content, pixels, threads)
            if torch.cuda.is_available():
                calls |= _gpu_calls(name, module, card, files, pixels, "torch" in runtimes)
    try:
        rounds = in_turn(calls, seconds)
    finally:
        torch.set_num_threads(own)
    fields = ("predictor", "runtime", "device", "batch", "threads")
    timings = [
        Timing(**dict(zip(fields, key, strict=True)), milliseconds=1000 * statistics.median(times))
        for key, times in rounds.items()
    ]
    found = Latency(machine=this_machine(), image_size=run.image_size, predictors=costs, timings=timings)
    try:
        write_latency(run, found)
    except OSError as error:
        warn(f"{run.path / FILE} is not written: {reason(error)}; the next command measures again")
    return found


def _files(module: nn.Module, card: dict[str, Any], runtimes: Sequence[str], images: Pixels | None) -> dict[str, bytes]:
    """Return the contents of the ONNX files of a predictor that are wanted."""
    wanted = [each for each in runtimes if each != "torch"]
    if not wanted:
        return {}
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        plain, int8 = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        try:
            write_onnx(module, card, plain)
        except UsageError as error:  # a package is missing, or it cannot be traced
            if "onnx-int8" in wanted or "torch" not in runtimes:
                raise
            warn(f"{card['predictor']} is measured as torch alone: {error}")
            return {}
        if "onnx" in wanted:
            files["onnx"] = plain.read_bytes()
        if "onnx-int8" in wanted:
            assert images is not None
            quantise(plain, card, calibration_images(images), int8)
            files["onnx-int8"] = int8.read_bytes()
    return files


def _torch_call(module: nn.Module, card: dict[str, Any], pixels: Any, threads: int) -> Callable[[], object]:
    whole, images = on_pixels(module, card), torch.from_numpy(pixels)

    def call() -> object:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            return whole(images)

    return call


def _onnx_call(
    content: bytes, pixels: Any, threads: int, provider: str = "CPUExecutionProvider"
) -> Callable[[], object]:
    session = onnx_session(content, threads, provider)
    return lambda: session.run(["logits"], {"images": pixels})


def _gpu_calls(
    name: str, module: nn.Module, card: dict[str, Any], files: Mapping[str, bytes], pixels: Any, as_torch: bool
) -> dict[tuple[Any, ...], Callable[[], object]]:
    """Return the calls on the GPU: pixels and logits are on the host, as where one process serves requests."""
    calls: dict[tuple[Any, ...], Callable[[], object]] = {}
    if as_torch:
        whole, images = on_pixels(copy.deepcopy(module), card).cuda(), torch.from_numpy(pixels)

        @torch.inference_mode()
        def call() -> object:
            return whole(images.cuda()).cpu()

        calls[name, "torch", "cuda", len(pixels), None] = call
    if files:
        import onnxruntime

        if (provider := "CUDAExecutionProvider") in onnxruntime.get_available_providers():
            for runtime, content in files.items():
                calls[name, runtime, "cuda", len(pixels), None] = _onnx_call(content, pixels, 1, provider)
    return calls


def in_turn(calls: Mapping[Any, Callable[[], object]], seconds: float) -> dict[Any, list[float]]:
    """Return seconds a call, by round, of each of several functions, measured in turn until the time is up.

    A turn begins with a call that does not count, which finds caches and threads as another function left them.
    """
    pace = {}
    for key, call in calls.items():
        call()  # makes plans and takes memory
        pace[key] = _timed(call, 1)
    rounds: dict[Any, list[float]] = {key: [] for key in calls}
    share, started = seconds / ROUNDS / max(1, len(calls)), time.perf_counter()
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for key, call in calls.items():
            last = rounds[key][-1] if rounds[key] else pace[key]
            call()
            rounds[key].append(_timed(call, max(1, round(share / last))))
    return rounds


def _timed(call: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def onnx_pace(files: Sequence[bytes], card: Mapping[str, Any]) -> list[float]:
    """Return the milliseconds of a call of one image with one thread, for each of several ONNX files, in turn."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, *card["image_size"]), np.uint8)
    rounds = in_turn({place: _onnx_call(each, pixels, 1) for place, each in enumerate(files)}, 1.0)
    return [1000 * statistics.median(times) for times in rounds.values()]
