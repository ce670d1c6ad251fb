"""What each method costs beside independent training, and docs/methods.md, made of the registry and of that.

    python benchmarks/methods.py measure --out results/methods-cost-cpu/cost.json
    python benchmarks/methods.py page

`measure` trains steps of each method in turn with steps of independent training of the same students, in one process,
for the ratio of times; and each of the two in a process of its own, for the ratio of their largest memory.
"""

import contextlib
import inspect
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from codistill.bench.loops import random_images, resident_loop
from codistill.core.errors import UsageError
from codistill.methods import METHODS, Method
from codistill.methods.kd import WithTeacher
from codistill.networks import network
from codistill.networks.network import parameter_count
from codistill.runs.metadata import environment
from codistill.settings.build import build_method
from codistill.settings.config import RunConfig, default_config
from codistill.sweeps.controls import CONTROLS

ROOT = Path(__file__).parent.parent
PAGE, COST = ROOT / "docs" / "methods.md", ROOT / "results" / "methods-cost-cpu" / "cost.json"
STUDENTS = {"okddip": 3, "byot": 1}
FAMILIES = {
    "baseline": "Baseline",
    "offline": "Traditional distillation: a trained teacher, or a larger network beside the student",
    "online": "Online distillation: students teach each other",
    "self": "Self-distillation: deeper parts of a network teach earlier ones",
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Measure:
    """Measure time and memory of all methods."""

    out: Path = COST
    network: str = "resnet20"
    teacher_network: str = "resnet56"
    batch_size: int = 64
    rounds: int = 5
    threads: int = 1
    methods: tuple[str, ...] = ()
    """Which methods; none named: all. Those of an earlier measurement stay."""


@dataclass(frozen=True)
class One:
    """Print how much memory three steps of one method take beside Python and PyTorch, bytes."""

    method: Annotated[str, tyro.conf.Positional]
    students: int
    network: str
    teacher_network: str
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Page:
    """Write docs/methods.md."""


def students_of(name: str) -> int:
    """Return with how many students a method is measured: two, or as many as it needs at least."""
    return STUDENTS.get(name, max(2, METHODS[name].min_students))


def config_of(name: str, students: int, network_name: str, batch_size: int) -> RunConfig:
    """Return the settings of a run on random images."""
    config = default_config(name)
    return replace(config, networks=(network_name,) * students, train=replace(config.train, batch_size=batch_size))


def built(config: RunConfig, teacher_network: str) -> Method:
    """Build a method, with a teacher where it needs one."""
    method = build_method(config, 100, (32, 32))
    return WithTeacher(method, network(teacher_network, 100)) if method.teacher == "required" else method


def measure(options: Measure) -> None:
    """Measure, and write after each method."""
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = json.loads(options.out.read_text())["methods"] if options.out.exists() else {}
    for name in options.methods or METHODS:
        count, data = students_of(name), random_images()
        configs = [config_of(each, count, options.network, options.batch_size) for each in (name, "independent")]
        method, alone = (built(each, options.teacher_network) for each in configs)
        loops = [
            resident_loop([each], config, CPU, data) for each, config in zip((method, alone), configs, strict=True)
        ]
        times = []
        for number in range(options.rounds + 1):
            seconds = []
            for loop in loops:
                started = time.perf_counter()
                loop(1)
                seconds.append(time.perf_counter() - started)
            times += [seconds[0] / seconds[1]] if number else []
        memory = [memory_of(each, count, options) for each in (name, "independent")]
        plain = network(options.network, 100)
        found[name] = {
            "students": count,
            "time": round(statistics.median(times), 3),
            "memory": round(memory[0] / memory[1], 3),
            "trained_parameters": parameter_count(method),
            "of_students_alone": count * parameter_count(plain),
            "deployed_extra": parameter_count(method.deployed_student(0)) - parameter_count(plain),
        }
        print(name, json.dumps(found[name]), flush=True)
        settings = {key: str(value) for key, value in vars(options).items() if key not in ("out", "methods")}
        written = {"settings": settings, "environment": environment(CPU), "methods": dict(sorted(found.items()))}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(written, indent=1) + "\n")


def memory_of(name: str, students: int, options: Measure) -> float:
    """Return the memory of a process of its own beside Python and PyTorch, bytes."""
    flags = ("--network", options.network, "--teacher-network", options.teacher_network)
    more = ("--batch-size", str(options.batch_size), "--threads", str(options.threads))
    command = [sys.executable, __file__, "one", name, "--students", str(students), *flags, *more]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def largest() -> float:
    """Return the most memory that this program has held, bytes; `ru_maxrss` would be that of its parent, too."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * float(status.partition("VmHWM:")[2].split()[0])


def one(options: One) -> None:
    """Train three steps."""
    torch.set_num_threads(options.threads)
    before = largest()
    config = config_of(options.method, options.students, options.network, options.batch_size)
    resident_loop([built(config, options.teacher_network)], config, CPU, random_images())(3)
    print(largest() - before)


def least_students(kind: type[Method]) -> int:
    """Return how many students a method needs at least at its default settings."""
    for count in range(kind.min_students, 5):
        with contextlib.suppress(UsageError):
            kind([network("resnet8", 10) for _ in range(count)], 10)
            return count
    raise AssertionError(f"{kind.name} cannot be built with one to four students")


def needs(kind: type[Method]) -> str:
    """Return what a method needs beside one student, in a few words."""
    words = {"required": "a trained teacher", "allowed": "", "refused": ""}[kind.teacher]
    least, most = least_students(kind), kind.max_students
    like = "equal " if kind.like_students else ""
    students = "" if least == 1 else f"{least} {like}students" if most == least else f"at least {least} {like}students"
    return ", ".join(each for each in (words, students) if each) or "nothing"


def times(value: float) -> str:
    """Write a ratio."""
    return f"{value:.2f}"


def thousands(count: int) -> str:
    """Write a number of parameters with its sign."""
    return "0" if count == 0 else f"{count / 1000:+.1f} k"


def page() -> str:
    """Return docs/methods.md as it should be."""
    cost = json.loads(COST.read_text())
    settings = cost["settings"]
    lines = [
        "# Methods",
        "",
        "<!-- written by: python benchmarks/methods.py page -->",
        "",
        "All methods train in one loop, on one set of networks, and are scored by one evaluator. They stand in the "
        "order of section 2 of MFEF's paper, and by year.",
        "",
        "- **exchanges**: what a student learns from the others or from a teacher, beside the labels.",
        "- **deployed**: parameters that a deployed student has beside those of its network.",
        "- **trained**: parameters in training beside those of the same students alone; below 0 where they share "
        "stages.",
        "- **time**, **memory**: of a training step and of its process, as a multiple of those of independent training "
        "of the same students; of methods with an initialisation, after it.",
        "",
    ]
    kinds = [(name, kind) for name, kind in METHODS.items() if kind.family is not None]
    for family, title in FAMILIES.items():
        members = sorted((each for each in kinds if each[1].family == family), key=lambda each: each[1].year or 0)
        lines += [f"## {title}", ""]
        lines += ["| method | year | | exchanges | needs | deployed | trained | time | memory |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for name, kind in members:
            found = cost["methods"].get(name)
            numbers = (
                ["", "", "", ""]
                if found is None
                else [
                    thousands(found["deployed_extra"]),
                    thousands(found["trained_parameters"] - found["of_students_alone"]),
                    times(found["time"]),
                    times(found["memory"]),
                ]
            )
            summary = (inspect.getdoc(kind) or "").partition("\n")[0].partition(": loss =")[0]
            cells = [f"[{name}]({kind.__module__.rpartition('.')[2].replace('_', '-')}.md)", str(kind.year or "")]
            lines.append("| " + " | ".join([*cells, summary, kind.exchanges, needs(kind), *numbers]) + " |")
        lines.append("")
    lines += [
        "## Controls",
        "",
        "`codistill sweep --controls` trains them beside the runs of a [sweep](sweep.md#controls).",
        "",
    ]
    lines += ["| control | |", "|---|---|", *(f"| {name} | {summary} |" for name, summary in CONTROLS.items()), ""]
    place = cost["environment"]
    counted = {name: found["students"] for name, found in cost["methods"].items() if found["students"] != 2}
    others = ", ".join(f"{name} {count}" for name, count in counted.items())
    lines += [
        "## Measured with",
        "",
        f"    python benchmarks/methods.py measure --rounds {settings['rounds']}",
        "",
        f"{settings['network']}, batch {settings['batch_size']}, float32, {settings['threads']} thread, two students "
        f"({others}), teacher {settings['teacher_network']}; {place['device']}, {place['platform']}, "
        f"torch {place['torch']}. Times are the median ratio of {settings['rounds']} steps in turn; memory is "
        "the largest of a process of three steps, beside Python and PyTorch.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "one": One, "page": Page})
    if isinstance(chosen, Measure):
        measure(chosen)
    elif isinstance(chosen, One):
        one(chosen)
    else:
        PAGE.write_text(page(), encoding="utf-8")
