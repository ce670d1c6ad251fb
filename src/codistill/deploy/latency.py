"""How long each predictor of a run takes here, with the size of its file, its parameters and operations."""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from codistill.core.console import track, warn
from codistill.core.errors import CheckpointError, CodistillError, UsageError
from codistill.core.files import read_json, write_json
from codistill.core.host import cores
from codistill.data.dataset import Pixels
from codistill.deploy.classifier import make_card, on_pixels, onnx_session
from codistill.deploy.formats import calibration_images, quantise, write_onnx
from codistill.networks.network import parameter_count
from codistill.networks.probe import forward_flop
from codistill.runs.folder import RunFolder

FILE = "latency.json"
FORMAT = 1
BATCHES = (1, 64)
ROUNDS, LEAST_ROUNDS = 7, 3
SECONDS = 10.0
"""Of measurement, all predictors together; less where they are slow, for each is called in `LEAST_ROUNDS` rounds."""

Runtime = Literal["torch", "onnx", "onnx-int8"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One measurement: the median over rounds of a call's time.

    Attributes:
        predictor: As the run names it.
        runtime: torch, or a file in ONNX Runtime: onnx in float32, onnx-int8.
        device: cpu or cuda.
        batch: Images in a call.
        threads: CPU threads; None on a GPU.
        milliseconds: From uint8 pixels in memory to logits in memory, normalisation included; the whole batch.
    """

    predictor: str
    runtime: str
    device: str
    batch: int
    threads: int | None
    milliseconds: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a predictor is beside its time.

    Attributes:
        parameters: Number of them.
        flops: Floating-point operations of one image; a multiplication and an addition are two.
        bytes: Size of its file by runtime.
    """

    parameters: int
    flops: int
    bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The contents of RUN/latency.json.

    Attributes:
        machine: Processor, cores, GPU and versions; see `this_machine`.
        image_size: Height and width, pixels.
        predictors: Of each that was measured.
        timings: All measurements.
    """

    machine: dict[str, Any]
    image_size: tuple[int, int]
    predictors: dict[str, Cost]
    timings: list[Timing]

    def milliseconds(
        self, runtime: str = "onnx", batch: int = 1, threads: int | None = 1, device: str = "cpu"
    ) -> dict[str, float]:
        """Return the time of each predictor that was measured so, milliseconds a call."""
        wanted = (runtime, batch, threads, device)
        return {
            each.predictor: each.milliseconds
            for each in self.timings
            if (each.runtime, each.batch, each.threads, each.device) == wanted
        }


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


def read_latency(run: RunFolder) -> Latency | None:
    """Read RUN/latency.json; None: nothing was measured.

    Raises:
        CheckpointError: It is damaged, or of another format.
    """
    path = run.path / FILE
    if not path.exists():
        return None
    found = read_json(path)
    try:
        if found["format"] != FORMAT:
            raise CheckpointError(f"{path}: of format {found['format']}, but this version reads format {FORMAT}")
        height, width = found["image_size"]
        return Latency(
            machine=dict(found["machine"]),
            image_size=(int(height), int(width)),
            predictors={str(name): Cost(**each) for name, each in found["predictors"].items()},
            timings=[Timing(**each) for each in found["timings"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}): measure again") from None


def write_latency(run: RunFolder, found: Latency) -> None:
    """Write RUN/latency.json, in the place of what is there."""
    write_json(run.path / FILE, {"format": FORMAT, **asdict(found)})


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
    write_latency(run, found)
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
        import copy

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


def onnx_pace(files: Sequence[bytes], card: Mapping[str, Any], seconds: float = 1.0) -> list[float]:
    """Return the milliseconds of a call of one image with one thread, for each of several ONNX files, in turn."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, *card["image_size"]), np.uint8)
    rounds = in_turn({place: _onnx_call(each, pixels, 1) for place, each in enumerate(files)}, seconds)
    return [1000 * statistics.median(times) for times in rounds.values()]


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of points that no other one beats: none is at most as large in both numbers, and less in one.

    Args:
        points: Two numbers each, both the better the lower: milliseconds and error.

    Returns:
        The front, sorted by the first number; of equal points all.
    """
    front = [
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points.values())
    ]
    return sorted(front, key=lambda name: (*points[name], name))


def rows(found: Latency, errors: Mapping[str, float], predictors: Sequence[str] | None = None) -> list[list[str]]:
    """Return measurements as a table, headings first: a row for each predictor and runtime.

    Args:
        found: The measurements.
        errors: Top-1 error of predictors, percent; without any there is no such column.
        predictors: Which ones; None: all.
    """
    ways = sorted({(each.device, each.batch, each.threads) for each in found.timings}, key=str)

    def title(device: str, batch: int, threads: int | None) -> str:
        where = "GPU" if device != "cpu" else f"{threads} thread{'s' if threads != 1 else ''}"
        return f"ms, batch {batch}, {where}"

    named = ["error %"] if errors else []
    times = [title(*way) for way in ways]
    cells = [["predictor", "runtime", *named, "parameters", "MFLOP", "file KiB", *times]]
    known = {(each.predictor, each.runtime, each.device, each.batch, each.threads): each for each in found.timings}
    for name in found.predictors if predictors is None else predictors:
        cost = found.predictors[name]
        for runtime in dict.fromkeys(each.runtime for each in found.timings if each.predictor == name):
            error = [f"{errors[name]:.2f}" if name in errors else ""] if errors else []
            size = f"{cost.bytes[runtime] / 1024:,.0f}" if runtime in cost.bytes else ""
            measured = [known.get((name, runtime, *way)) for way in ways]
            times = [written(each.milliseconds) if each else "" for each in measured]
            cells.append([name, runtime, *error, f"{cost.parameters:,}", f"{cost.flops / 1e6:,.1f}", size, *times])
    return cells


def written(milliseconds: float) -> str:
    """Write a time with three digits, and all of its whole milliseconds."""
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
