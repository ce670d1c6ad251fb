"""Measure the speed of MFEF with two students, alone and in fleets, and write JSON files and a table.

    python benchmarks/speed.py --out results/speed-h100                        # on a GPU: about an hour
    python benchmarks/speed.py --out /tmp/speed --device cpu --networks resnet20 --runs 2 --students 1 2 \
        --batch-size 8 --seconds 0.1 --no-compile --precision float32          # a rehearsal on a CPU: a few minutes

Each case is a `codistill bench` in a process of its own with a time limit. Its result is written, with its command, as
OUT/CASE.json, and then the table of all: whatever ends this script, its results stay, and another start measures the
cases that have no file.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

LINES_OF_A_FAILURE = 5


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    out: Path
    networks: tuple[str, ...] = ("resnet32", "wrn-16-2", "resnet110")
    runs: tuple[int, ...] = (6, 2, 3, 8)
    """Fleets of so many runs."""
    students: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Cohorts of so many students, of the first network."""
    batch_size: int = 128
    precision: Literal["bf16", "float32"] = "bf16"
    """That of all cases but float32 ones."""
    compile: bool = True
    """Measure compiled steps, too."""
    device: str = "auto"
    seconds: float = 10.0
    """How long to measure each case."""
    limit: float = 400.0
    """How long a case may take in all, seconds."""


@dataclass(frozen=True)
class Case:
    """One `codistill bench`."""

    name: str
    networks: tuple[str, ...]
    flags: tuple[str, ...] = ()
    profiled: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    empties_cache: bool = False


def cases(options: Options) -> list[Case]:
    """List the cases, the most telling ones first."""

    def pair(network: str) -> tuple[str, str]:
        return network, network

    def cache(network: str) -> dict[str, str]:
        return {"TORCHINDUCTOR_CACHE_DIR": str((options.out / "cache" / network).absolute())}

    fast, compiled = ("--precision", options.precision), ("--precision", options.precision, "--compile", "on")
    listed = [Case(each, pair(each), (*fast, "--compare"), profiled=True) for each in options.networks]
    fleets = [(each, runs, ("--runs", str(runs))) for runs in options.runs for each in options.networks]
    listed += [Case(f"{each}-x{runs}", pair(each), (*fast, *fleet)) for each, runs, fleet in fleets]
    if options.compile:
        # The first one finds an empty cache and fills it, the second one reads it: the time of a first step of each.
        for each in options.networks:
            name = f"{each}-compiled"
            listed.append(Case(f"{name}-first", pair(each), compiled, environment=cache(each), empties_cache=True))
            listed.append(Case(f"{name}-again", pair(each), compiled, profiled=True, environment=cache(each)))
        for each, runs, fleet in fleets:
            listed.append(Case(f"{each}-compiled-x{runs}", pair(each), (*compiled, *fleet), environment=cache(each)))
    exact = ("--precision", "float32", "--compare")
    listed += [Case(f"{each}-float32", pair(each), exact) for each in options.networks]
    for count in options.students:
        alone = ("--method.distillation", "none") if count == 1 else ()
        first = options.networks[0]
        listed.append(Case(f"{first}-students{count}", (first,) * count, (*fast, *alone)))
    return listed


def arguments(case: Case, options: Options) -> list[str]:
    """Write a case as the arguments of `codistill`."""
    written = ["bench", "mfef", "--networks", *case.networks, "--batch-size", str(options.batch_size), *case.flags]
    written += ["--device", options.device, "--seconds", str(options.seconds), "--json"]
    return written + (["--profile", str(options.out / f"{case.name}.txt")] if case.profiled else [])


def run(written: list[str], environment: Mapping[str, str], limit: float) -> str:
    """Run `codistill` in a process of its own and return its standard output.

    Raises:
        RuntimeError: It failed, or took too long; with its last lines.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "codistill", *written],
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **environment},
            check=True,
        )
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-LINES_OF_A_FAILURE:]
        raise RuntimeError("\n".join(last or [f"it ended with {error.returncode} and no message"])) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {limit:g} s") from None
    return done.stdout


def measure(case: Case, options: Options) -> dict[str, Any]:
    """Measure a case; a failure is a result, too."""
    written = arguments(case, options)
    if case.empties_cache:  # an earlier start may have been stopped within it
        shutil.rmtree(case.environment["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
    record: dict[str, Any] = {"command": " ".join(["codistill", *written]), **case.environment}
    started = time.perf_counter()
    try:
        record["result"] = json.loads(run(written, case.environment, options.limit))
    except RuntimeError as error:
        record["error"] = str(error)
    return {**record, "process_seconds": time.perf_counter() - started}


def table(options: Options) -> str:
    """Write the results so far as Markdown, one row a case."""
    heads = (
        "case",
        "computed with",
        "ms per step of a run",
        "images/s in all",
        "plain loop, ms per step",
        "ours / plain",
        "deterministic / ours",
        "launches per step",
        "MiB per run",
        "first step s",
    )
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    environment = {}
    for case in cases(options):
        path = options.out / f"{case.name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        if "error" in record:
            rows.append(f"| {case.name} | {record['error'].splitlines()[-1]} {'|' * len(heads)}")
            continue
        result = record["result"]
        environment = result["environment"]
        runs, launches = result["runs"], result.get("kernels_per_step", result.get("operators_per_step"))
        memory = result["peak_memory_mib"] / runs if "peak_memory_mib" in result else None
        cells = [
            case.name,
            ", ".join(name for name, chosen in result["execution"].items() if chosen) or "-",
            f"{result['ms_per_step']:.2f}",
            f"{runs * result['images_per_second']:,.0f}",
            number(result.get("plain_ms_per_step"), ".2f"),
            number(result.get("ratio_to_plain"), ".2f"),
            number(result.get("deterministic_ratio"), ".2f"),
            f"{launches:,}",
            number(memory, ",.0f"),
            f"{result['first_step_seconds']:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", f"`{json.dumps(environment)}`", ""])


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    for case in cases(options):
        path = options.out / f"{case.name}.json"
        if path.exists():
            continue
        path.write_text(json.dumps(measure(case, options), indent=2) + "\n")
        (options.out / "table.md").write_text(table(options))
        print(f"{case.name}: {path}", flush=True)
    print(table(options))


if __name__ == "__main__":
    main(tyro.cli(Options))
