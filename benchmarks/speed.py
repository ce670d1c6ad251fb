"""Measure on a GPU the speed of MFEF with two students, alone and in fleets, without and with compiled chains.

    python benchmarks/speed.py --out results/speed-h200 --budget 560           # what is most worth knowing: 10 minutes
    python benchmarks/speed.py --out /tmp/speed --device cpu --networks resnet8 --runs 2 --students 1 3 --tests "" \
        --batch-size 8 --seconds 0.1 --modes off --precision float32           # a rehearsal on a CPU: a few minutes

Each case is a `codistill bench` in a process of its own with a time limit, the most telling ones first, and the tests
that need a GPU among them. Its result is added with its command to OUT/measured.json, and then the table of all is
written: whatever ends this script, its results stay, and another start, with these files in OUT, measures the cases
that are missing. Nothing is started that the budget leaves no time for, and what it cuts short counts as missing.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

LINES_OF_A_FAILURE = 20
LEAST_SECONDS = 30.0
"""No case is done sooner on a GPU."""
TARGETS = {"resnet32": (2.5, 1.0), "wrn-16-2": (1.7, 0.8), "resnet110": (7.5, 3.0)}
"""Milliseconds a step of one run alone, and of each of six, at batch 128 in bf16 on an H100 or faster, at most."""


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    out: Path
    networks: tuple[str, ...] = ("resnet32", "wrn-16-2", "resnet110")
    runs: tuple[int, ...] = (6, 2, 3, 8)
    """Fleets of so many runs; the first number is measured before all that is less telling."""
    students: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Cohorts of so many students, of the first network."""
    batch_size: int = 128
    precision: Literal["bf16", "float32"] = "bf16"
    """That of all cases but float32 ones."""
    modes: tuple[Literal["off", "on"], ...] = ("off", "on")
    """Without and with compiled chains, --compile."""
    tests: str = "tests"
    """Where the tests are that need a GPU; empty: they are not run."""
    device: str = "auto"
    seconds: float = 5.0
    """How long to measure each case."""
    limit: float = 200.0
    """How long a case may take in all, seconds."""
    budget: float = 24 * 3600.0
    """How long this start may take in all, seconds."""


@dataclass(frozen=True)
class Case:
    """One `codistill bench`, or the tests."""

    name: str
    networks: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    profiled: bool = False
    target: float | None = None


TESTS = Case("tests")


def cases(options: Options) -> list[Case]:
    """List the cases, the most telling ones first."""

    def each_way(suffix: str, *flags: str, fleet: bool = False, profiled: bool = False) -> list[Case]:
        return [
            Case(
                f"{network}{suffix}-{mode}",
                (network, network),
                ("--precision", options.precision, "--compile", mode, *flags),
                profiled and mode == options.modes[-1],
                TARGETS[network][fleet] if network in TARGETS and (not fleet or suffix == "-x6") else None,
            )
            for mode in options.modes
            for network in options.networks
        ]

    first, *others = options.runs
    listed = each_way("", profiled=True) + each_way(f"-x{first}", "--runs", str(first), fleet=True)
    listed += [TESTS] if options.tests else []
    # Beside the plain loop and deterministic algorithms.
    plain, exact = (("--precision", each, "--compile", "off", "--compare") for each in (options.precision, "float32"))
    listed += [Case(f"{each}-compare", (each, each), plain) for each in options.networks]
    listed += [Case(f"{each}-float32", (each, each), exact) for each in options.networks]
    for count in options.students:
        alone = ("--method.distillation", "none") if count == 1 else ()
        flags = ("--precision", options.precision, "--compile", "off", *alone)
        listed.append(Case(f"{options.networks[0]}-students{count}", (options.networks[0],) * count, flags))
    for runs in others:
        listed += each_way(f"-x{runs}", "--runs", str(runs), fleet=True)
    return listed


def command(case: Case, options: Options) -> list[str]:
    """Write a case as the arguments of Python."""
    if case is TESTS:
        return ["-m", "pytest", options.tests, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    written = ["bench", "mfef", "--networks", *case.networks, "--batch-size", str(options.batch_size), *case.flags]
    written += ["--device", options.device, "--seconds", str(options.seconds), "--json"]
    written += ["--profile", str(options.out / f"{case.name}.txt")] if case.profiled else []
    return ["-m", "codistill", *written]


def run(written: list[str], limit: float) -> str:
    """Run Python in a process of its own and return its standard output.

    Raises:
        TimeoutError: It took too long.
        RuntimeError: It failed; with its last lines.
    """
    try:
        done = subprocess.run([sys.executable, *written], capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip()).splitlines()[-LINES_OF_A_FAILURE:]
        raise RuntimeError("\n".join(last or [f"it ended with {error.returncode} and no message"])) from None
    except subprocess.TimeoutExpired as error:
        last = (error.stdout or b"").decode(errors="replace").strip().splitlines()[-1:]
        raise TimeoutError("; its last line: ".join([f"not done after {limit:.0f} s", *last])) from None
    return done.stdout


def measure(case: Case, options: Options, left: float) -> dict[str, Any] | None:
    """Measure a case; a failure is a result, too, but being cut short by the budget is none."""
    written = command(case, options)
    record: dict[str, Any] = {"command": shlex.join(["python", *written])}
    started = time.perf_counter()
    try:
        output = run(written, min(options.limit, left))
        record |= {"tests": output.strip().splitlines()[-1]} if case is TESTS else {"result": json.loads(output)}
    except TimeoutError as error:
        if left < options.limit:
            return None
        record["error"] = str(error)
    except RuntimeError as error:
        record["error"] = str(error)
    return {**record, "process_seconds": time.perf_counter() - started}


def table(options: Options, measured: Mapping[str, Any]) -> str:
    """Write the results so far as Markdown, one row a case."""
    heads = (
        "case",
        "computed with",
        "ms per step of a run",
        "at most",
        "times the limit",
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
        record = measured.get(case.name, {})
        if "result" not in record:
            if words := record.get("error", record.get("tests", "")):
                rows.append(f"| {case.name} | {words.splitlines()[-1]} {'|' * len(heads)}")
            continue
        result = record["result"]
        environment = result["environment"]
        runs, launches = result["runs"], result.get("kernels_per_step", result.get("operators_per_step"))
        memory = result["peak_memory_mib"] / runs if "peak_memory_mib" in result else None
        cells = [
            case.name,
            ", ".join(name for name, chosen in result["execution"].items() if chosen) or "-",
            f"{result['ms_per_step']:.2f}",
            number(case.target, ".1f"),
            number(result.get("times_limit"), ".2f"),
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
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "measured.json"
    measured: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for case in cases(options):
        left = options.budget - (time.perf_counter() - started)
        if case.name in measured:
            continue
        record = measure(case, options, left) if left >= LEAST_SECONDS else None
        if record is None:
            print(f"the budget ends before {case.name}: start this again with {path}", flush=True)
            break
        measured[case.name] = record
        path.write_text(json.dumps(measured, indent=1) + "\n")
        (options.out / "table.md").write_text(table(options, measured))
        print(f"{case.name}: {record['process_seconds']:.0f} s", flush=True)
    print(table(options, measured))


if __name__ == "__main__":
    main(tyro.cli(Options))
