"""Measure MFEF's whole training step in each of its executions, of one run and of fleets.

    python benchmarks/executions.py --out runs/executions     # on a GPU: later cases take a minute each to compile
    python benchmarks/executions.py --out runs/dry --device cpu --networks resnet20 --runs 1 2 --variants stock block \
        --backend aot_eager --batch-size 8 --rounds 1 --seconds 1     # does it run?

Variants are stock and fused kernels and stages compiled, which the product chooses among, each with and without
overlapping streams, and other granularities of the compiler: blocks, branches, or the whole method as one. Compiled
ones are measured with an empty and then with a filled folder of compiled code.

Each case is a process of its own and a JSON file below --out; a case whose file is there is not measured again.
`table.md` has all results. benchmarks/kernels.py measures chains of small operations alone.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import cases
import torch
import tyro

from codistill.bench_loop import CLASSES, SIDE, resident_loop
from codistill.bench_measurement import synchronise
from codistill.compiling import RECOMPILE_LIMIT, compile_in_place, parts_of
from codistill.config import RunConfig, TrainSettings, default_config
from codistill.device import choose_device, set_up_gpu
from codistill.execution import Execution
from codistill.methods import Method
from codistill.run import build_method

Variant = Literal[
    "stock", "stock-overlap", "fused", "fused-overlap", "stage", "stage-overlap", "block", "branch", "whole"
]
EXECUTIONS: dict[Variant, Execution] = {
    "stock": Execution(),
    "stock-overlap": Execution(overlap=True),
    "fused": Execution("fused"),
    "fused-overlap": Execution("fused", overlap=True),
    "stage": Execution(compiled=True),
    "stage-overlap": Execution(compiled=True, overlap=True),
    # What these compile is not the product's to choose.
    "block": Execution(compiled=True),
    "branch": Execution(compiled=True),
    "whole": Execution(compiled=True),
}
# The fleet's three plain steps, and the one that is captured.
STEPS_UNTIL_CAPTURED = 4


@dataclass(frozen=True)
class Options(cases.Options):
    """What to measure."""

    networks: tuple[str, ...] = ("resnet32", "wrn-16-2", "resnet110")
    """Each one is trained as two equal students."""
    runs: tuple[int, ...] = (1, 6)
    """So many runs side by side."""
    variants: tuple[Variant, ...] = tuple(EXECUTIONS)
    backend: str = "inductor"
    """Of torch.compile, where it compiles other parts than stages; aot_eager makes a dry run quick."""


def listed(options: Options) -> list[str]:
    """Name all cases, the most telling ones first: <network>/x<runs>/<variant>/<folder of compiled code>."""
    plain = [each for each in options.variants if not EXECUTIONS[each].compiled]
    names = [
        f"{network}/x{runs}/{variant}/none"
        for runs in options.runs
        for network in options.networks
        for variant in plain
    ]
    filled = set()
    for variant in options.variants:
        for runs in options.runs if EXECUTIONS[variant].compiled else ():
            for network in options.networks:
                case = f"{network}/x{runs}/{variant}"
                names += [f"{case}/empty"] * (folder(case) not in filled) + [f"{case}/filled"]
                filled.add(folder(case))
    return names


def folder(case: str) -> str:
    """Name the folder of compiled code, which fleets and overlapping streams have in common with one run's."""
    network, _, variant, *_ = case.split("/")
    return f"{network}-{variant.removesuffix('-overlap')}"


def variables(case: str, options: Options) -> dict[str, str]:
    """Say where a case's compiled code is, and empty the folder where the case asks for it."""
    cache = (options.out / "compiled" / folder(case)).absolute()
    if case.endswith("/empty"):
        shutil.rmtree(cache, ignore_errors=True)
    return {"TORCHINDUCTOR_CACHE_DIR": str(cache)}


def compile_branches(method: Method, backend: str) -> None:
    """Compile each student's branch with all that belongs to it as one, beside the trunk's stages and the fusion."""
    # Branches of all runs have one code object, which the limit is for.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
    cohort = method.cohort
    alone = list(cohort[0].stages[: cohort.shared_stages])
    for name, child in method.named_children():
        if name not in ("cohort", "enhancements"):
            alone += parts_of(child, "stage")
    for part in alone:
        part.compile(dynamic=False, backend=backend)
    each_student = cohort.each_student
    cohort.each_student = lambda branch: each_student(torch.compile(branch, dynamic=False, backend=backend))


def prepare(variant: Variant, method: Method, options: Options, device: torch.device) -> None:
    """Let a method compute as a variant says."""
    if variant == "branch":
        compile_branches(method, options.backend)
    elif variant == "block" or variant == "whole":
        compile_in_place(method, variant, backend=options.backend)
    else:
        EXECUTIONS[variant].prepare(method, device, deterministic=False)


def measure(options: Options) -> dict[str, Any]:
    """Time the training step of the case that the options name, on CUDA captured, and how long the first one takes."""
    network, fleet, name, _ = options.case.split("/")
    variant = cast(Variant, name)
    runs = int(fleet.removeprefix("x"))
    device = choose_device(options.device, options.precision)
    set_up_gpu(device, deterministic=False)
    settings = TrainSettings(batch_size=options.batch_size, precision=options.precision, device=options.device)
    config: RunConfig = replace(default_config("mfef"), networks=(network, network), train=settings)
    torch.manual_seed(0)
    started = time.perf_counter()
    methods = []
    for _ in range(runs):
        method = build_method(config, CLASSES, (SIDE, SIDE)).to(device).train()
        prepare(variant, method, options, device)
        methods.append(method.to(memory_format=torch.channels_last))
    run = resident_loop(methods, config, device, EXECUTIONS[variant])
    run(1)
    synchronise(device)
    first = time.perf_counter() - started
    run(STEPS_UNTIL_CAPTURED)
    synchronise(device)
    ready = time.perf_counter() - started
    rounds = [each / runs for each in cases.rounds_of(run, options, device)]
    finite = all(bool(each.isfinite().all()) for method in methods for each in method.state_dict().values())
    result = {"ms_per_step": rounds, "first_step_seconds": first, "captured_after_seconds": ready}
    result |= {"weights_are_finite": finite, "backend": options.backend}
    if device.type == "cuda":
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return result


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Write Markdown: milliseconds per step of a run, medians of the rounds, and their range."""
    heads = ["networks", "runs", "execution", "compiled code", "ms per step of a run", "of stock", "first step s"]
    heads += ["MiB per run", "finite"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    stock = {result["case"]: result.get("ms_per_step") for result in results}
    for result in results:
        network, fleet, variant, cache = result["case"].split("/")
        cells = [f"2 x {network}", fleet.removeprefix("x"), variant, cache]
        if "failed" in result:
            cells += ["failed"] + ["-"] * 4
        else:
            cells += [cases.spread(result["ms_per_step"])]
            cells += [cases.share(result["ms_per_step"], stock.get(f"{network}/{fleet}/stock/none"))]
            memory = result.get("peak_memory_mib")
            cells += [f"{result['first_step_seconds']:.1f}", f"{memory / int(cells[1]):,.0f}" if memory else "-"]
            cells += ["yes" if result["weights_are_finite"] else "NO"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    if options.case:
        print(cases.described(measure(options), options))
        return
    print(
        cases.measure_missing(__file__, listed(options), options, lambda case: variables(case, options), table), end=""
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
