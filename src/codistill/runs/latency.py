"""What was measured of a run's predictors: RUN/latency.json, its table, and the front of milliseconds and error."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from codistill.core.errors import CheckpointError
from codistill.core.files import read_json, write_json
from codistill.runs.folder import RunFolder

FILE = "latency.json"
FORMAT = 1

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
        machine: Processor, cores, GPU and versions; see `codistill.deploy.latency`.
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
