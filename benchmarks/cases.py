"""What benchmarks of many cases share: each case is a process of its own and a JSON file, and how calls are timed."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from codistill.bench.measurement import synchronise
from codistill.core.device import choose_device
from codistill.runs.metadata import environment

LINES_OF_A_FAILURE = 5


@dataclass(frozen=True)
class Options:
    """How to measure."""

    out: Path
    batch_size: int = 128
    precision: Literal["float32", "bf16"] = "bf16"
    device: str = "auto"
    rounds: int = 5
    seconds: float = 5.0
    """How long to measure a thing, all rounds together, beside making ready."""
    limit: float = 400.0
    """How long a case may take in all, seconds."""
    case: str = ""
    """Measure this one case in this process and print it; used by the script itself."""


def rounds_of(run: Callable[[int], None], options: Options, device: torch.device) -> list[float]:
    """Time a loop that has run before, milliseconds a step for each round."""

    def timed(steps: int) -> float:
        synchronise(device)
        started = time.perf_counter()
        run(steps)
        synchronise(device)
        return (time.perf_counter() - started) / steps

    steps = max(1, round(options.seconds / options.rounds / timed(1)))
    return [1000 * timed(steps) for _ in range(options.rounds)]


def spread(values: Sequence[float]) -> str:
    """Write the median of rounds, and their range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def share(values: Sequence[float], stock: Sequence[float] | None) -> str:
    """Write the ratio of two medians, where there are two."""
    return f"{statistics.median(values) / statistics.median(stock):.3f}" if stock else "-"


def in_a_process(command: Sequence[str], variables: Mapping[str, str], limit: float) -> str:
    """Run Python with arguments and give its standard output.

    Args:
        command: The arguments.
        variables: Of the environment, beside those that are inherited.
        limit: How long it may take, seconds.

    Raises:
        RuntimeError: It failed, or took too long; what it said last.
    """
    try:
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **variables},
            check=True,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-LINES_OF_A_FAILURE:]
        raise RuntimeError("\n".join(said or [f"it ended with {error.returncode} and no message"])) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {limit:g} s") from None
    return done.stdout


def measured(script: str, case: str, options: Options, variables: Mapping[str, str]) -> dict[str, Any]:
    """Let a script measure a case in a process of its own; a failure is a result, too."""
    command = [script, "--case", case]
    for name, value in vars(options).items():
        if name not in ("case", "limit") and isinstance(value, (str, int, float, Path)):
            command += [f"--{name.replace('_', '-')}", str(value)]
    where = {"batch_size": options.batch_size, "precision": options.precision}
    try:
        result: dict[str, Any] = json.loads(in_a_process(command, variables, options.limit).splitlines()[-1])
    except (RuntimeError, ValueError, IndexError) as error:  # the last ones: what it printed is no result
        return {"case": case, **where, "failed": str(error).splitlines()}
    return {"case": case, **where, **result}


def described(result: Mapping[str, Any], options: Options) -> str:
    """Write the result of the case that a process was started for as one line of JSON, with where it was measured."""
    device = choose_device(options.device, options.precision)
    return json.dumps({**result, "environment": environment(device)})


def measure_missing(
    script: str,
    listed: Sequence[str],
    options: Options,
    variables: Callable[[str], Mapping[str, str]],
    table: Callable[[Sequence[Mapping[str, Any]]], str],
) -> str:
    """Measure the cases that have no file yet, and write all results anew as OUT/table.md after each.

    Args:
        script: What measures a case.
        listed: The cases, parts of their names divided by slashes.
        options: The script's own.
        variables: Makes ready for a case and gives variables for the environment of its process.
        table: Writes results as Markdown.

    Returns:
        The table.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for case in listed:
        path = options.out / f"{case.replace('/', '-')}.json"
        if not path.exists():
            print(case, file=sys.stderr, flush=True)
            result = measured(script, case, options, variables(case))
            path.write_text(json.dumps(result, indent=2) + "\n")
        results.append(json.loads(path.read_text()))
        (options.out / "table.md").write_text(table(results))
    return table(results)
