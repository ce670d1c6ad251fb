"""The commands of the command line, a function each, without logic."""

import dataclasses
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codistill.cli.flags import flag_value, has_flag, options, parse_flags, setting_names, unknown_option
from codistill.cli.options import (
    BenchOptions,
    EvaluateOptions,
    ExportOptions,
    ListOptions,
    PredictOptions,
    ResumeOptions,
    SweepOptions,
)
from codistill.cli.train_options import several_recipes, train_options
from codistill.core.errors import DivergedError, UsageError, WorkerError
from codistill.data import DATASETS
from codistill.methods import METHODS
from codistill.networks import NETWORKS
from codistill.settings.config import default_config
from codistill.settings.presets import PRESETS

if TYPE_CHECKING:
    from codistill.deploy.run import Run


BENCH_FLAGS = ("runs", "compare", "seconds", "profile", "json")


def bench_command(arguments: Sequence[str]) -> None:
    """Run `codistill bench`."""
    rest = list(arguments)
    method = rest.pop(0) if rest and not rest[0].startswith("-") else "mfef"
    command = f"codistill bench {method}"
    parsed, unknown = parse_flags(BenchOptions, rest, BenchOptions(config=default_config(method)), command)
    if unknown:
        known = [*setting_names(method), *BENCH_FLAGS]
        raise UsageError(unknown_option(unknown[0], known, command))
    if parsed.runs < 1 or not 0 < parsed.seconds < 3600:
        raise UsageError(f"{command}: --runs must be at least 1, and --seconds above 0 and below 3600")
    if parsed.profile and not parsed.profile.parent.is_dir():
        raise UsageError(f"{command}: --profile {parsed.profile}: there is no folder {parsed.profile.parent}")
    from codistill.bench.bench import bench, lines

    result = bench(parsed.config, parsed.runs, parsed.compare, parsed.seconds, parsed.profile)
    print(json.dumps(result, indent=2) if parsed.json else "\n".join(lines(result)))


def train_command(arguments: Sequence[str]) -> None:
    """Run `codistill train`."""
    rest = list(arguments)
    named = rest.pop(0) if rest and not rest[0].startswith("-") else None
    paths = several_recipes(rest, named) if has_flag(rest, "--recipes") else ()
    path = Path(flag_value(rest, "--recipe")) if has_flag(rest, "--recipe") else None
    each = [train_options(rest, named, one) for one in paths or (path,)]
    parsed, configs = each[0], [options.config for options in each]
    from codistill.training.fleet import train_fleet, train_seeds
    from codistill.training.train import free_folder, train_from_config

    if parsed.verify_resume:
        from codistill.training.verify import verify_resume

        for config in configs:
            print(verify_resume(config))
    if paths:
        out = parsed.out or free_folder(configs[0], "recipes")
        refuse_diverged(train_fleet(configs, [out / one.stem for one in paths]))
    elif parsed.seeds:
        refuse_diverged(train_seeds(configs[0], parsed.seeds, parsed.out))
    else:
        train_from_config(configs[0], parsed.out)


def refuse_diverged(runs: "Sequence[Run]") -> None:
    """Say which of several runs diverged.

    Raises:
        DivergedError: One did.
    """
    lost = [str(run.path) for run in runs if not run.finished]
    if lost:
        raise DivergedError(f"{len(lost)} of {len(runs)} runs diverged: {', '.join(lost)}; the others are finished")


def resume_command(arguments: Sequence[str]) -> None:
    """Run `codistill resume`."""
    chosen = options(ResumeOptions, arguments, "codistill resume")
    if not chosen.runs:
        raise UsageError("codistill resume: no run: name at least one run folder")
    from codistill.training.resume import resume_together

    runs = resume_together(chosen.runs, chosen.data_dir, override=key_values(chosen.override))
    refuse_diverged(runs)


def key_values(written: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` words.

    Raises:
        UsageError: One without an equals sign.
    """
    for each in written:
        if "=" not in each:
            raise UsageError(f"codistill resume --override {each}: write it as key=value, for example device=cpu")
    pairs = (each.split("=", 1) for each in written)
    return {key: int(value) if key == "threads" and value.isdecimal() else value for key, value in pairs}


def evaluate_command(arguments: Sequence[str]) -> None:
    """Run `codistill evaluate`."""
    chosen = options(EvaluateOptions, arguments, "codistill evaluate")
    from codistill.deploy.run import Run
    from codistill.runs.evaluate import evaluate_run

    scores = evaluate_run(Run(chosen.run), chosen.checkpoint, chosen.data_dir, chosen.device)
    if chosen.json:
        print(json.dumps({name: dataclasses.asdict(each) for name, each in scores.items()}, indent=2))
        return
    table = Table(title=f"{chosen.run}, {chosen.checkpoint} checkpoint: test set")
    table.add_column("predictor")
    for heading in ("top-1 error %", "top-5 error %", "NLL", "ECE %"):
        table.add_column(heading, justify="right")
    for name, each in scores.items():
        table.add_row(name, f"{each.top1_error:.2f}", f"{each.top5_error:.2f}", f"{each.nll:.4f}", f"{each.ece:.2f}")
    Console().print(table)


def predict_command(arguments: Sequence[str]) -> None:
    """Run `codistill predict`."""
    chosen = options(PredictOptions, arguments, "codistill predict")
    if not chosen.images:
        raise UsageError("codistill predict: no images: name at least one file")
    if chosen.top < 1:
        raise UsageError(f"codistill predict: --top is {chosen.top}; it must be at least 1")
    from codistill.deploy.classifier import load_classifier
    from codistill.deploy.predict import predict

    for each in predict(load_classifier(chosen.model, chosen.predictor), chosen.images, chosen.top):
        ranked = list(zip(each.classes, each.probabilities, strict=True))
        if chosen.json:
            print(json.dumps({"image": str(each.image), "classes": dict(ranked)}))
        else:
            print(f"{each.image}: " + "  ".join(f"{name} {100 * share:.1f} %" for name, share in ranked))


def export_command(arguments: Sequence[str]) -> None:
    """Run `codistill export`."""
    chosen = options(ExportOptions, arguments, "codistill export")
    from codistill.deploy.export import export_predictor
    from codistill.deploy.run import Run

    done = export_predictor(
        Run(chosen.run), chosen.predictor, chosen.out, chosen.format, chosen.checkpoint, chosen.data_dir
    )
    print(
        f"ok: {done.path}: {done.predictor}, {done.parameters:,} parameters; loaded again and compared on "
        f"{done.images} test images: logits differ by at most {done.difference:.2g}, "
        f"top-1 agrees on {100 * done.agreement:.2f} %"
    )


def list_command(arguments: Sequence[str]) -> None:
    """Run `codistill list`."""
    chosen = options(ListOptions, arguments, "codistill list")
    entries: dict[str, list[dict[str, Any]]] = {
        "methods": [{"name": name, "summary": first_line(METHODS[name]), **preset_of(name)} for name in METHODS],
        "networks": [{"name": name, "summary": first_line(NETWORKS[name])} for name in NETWORKS],
        "data": [{"name": name, "summary": first_line(DATASETS[name])} for name in DATASETS],
    }
    if chosen.json:
        print(json.dumps(entries, indent=2))
        return
    for kind, members in entries.items():
        table = Table(title=kind, title_justify="left", show_header=False, box=None)
        for member in members:
            table.add_row(member["name"], escape(member["summary"]))
        Console().print(table)
    for member in entries["methods"]:
        if "preset" in member:
            preset = member["preset"]
            sets = [f"{key} {value}" for key, value in preset["sets"].items()]
            sets += [f"{name} is {network}" for name, network in preset["networks"].items()]
            print(f"\n--preset {member['name']}: {preset['source']}\n  {', '.join(sets)}")


def preset_of(method: str) -> dict[str, Any]:
    """Give what the paper's preset of a method sets, where it has one."""
    if method not in PRESETS:
        return {}
    preset = PRESETS[method]
    sets = {**preset.run, **{f"method.{key}": value for key, value in preset.settings.items()}}
    return {"preset": {"source": preset.source, "sets": sets, "networks": dict(preset.networks)}}


def first_line(plugin: object) -> str:
    """Give the summary line of a plug-in's docstring."""
    return (inspect.getdoc(plugin) or "").partition("\n")[0]


def sweep_command(arguments: Sequence[str]) -> None:
    """Run `codistill sweep`."""
    chosen = options(SweepOptions, arguments, "codistill sweep")
    from codistill.sweeps.driver import own_program, sweep

    program = own_program(["sweep", *arguments])
    rows = sweep(
        chosen.spec,
        chosen.out,
        executor=chosen.executor,
        slots=chosen.slots,
        side_by_side=chosen.side_by_side,
        program=program,
    )
    failed = [row.name for row in rows if row.status == "FAILED"]
    if failed:
        some = ", ".join(failed[:5]) + (", .." if len(failed) > 5 else "")
        raise WorkerError(f"{len(failed)} of {len(rows)} runs failed: {some}: {chosen.out}/table.md says why")
