"""The command line: `codistill train | resume | evaluate | predict | export | list`; commands without logic."""

import dataclasses
import errno
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codistill.config import default_config
from codistill.data import DATASETS
from codistill.errors import CodistillError, DivergedError, UsageError, WorkerError
from codistill.flags import mapping_arguments, parse_flags, setting_names, unknown_option
from codistill.methods import METHODS
from codistill.networks import NETWORKS
from codistill.options import (
    BenchOptions,
    EvaluateOptions,
    ExportOptions,
    ListOptions,
    PredictOptions,
    ResumeOptions,
    SweepOptions,
    TrainOptions,
)
from codistill.presets import PRESETS, find_preset, preset_run, renamed
from codistill.recipe import read_recipe, with_place
from codistill.registry import near_matches
from codistill.signals import Terminated, terminate

if TYPE_CHECKING:
    from codistill.run import Run

USAGE = """\
usage: codistill COMMAND ...

  train [METHOD] --networks A B .. --data NAME   train students together, in a new run folder
  resume RUN                                     go on with an interrupted run
  sweep SPEC.toml --out DIR                      train many runs in processes of their own; goes on if stopped
  evaluate RUN                                   score every predictor of a run on its test set
  predict FILE_OR_RUN IMAGE ..                   name the classes of images
  export RUN --predictor student0 --format onnx  write one predictor as one file, and check it
  bench [METHOD] --networks A B .. [--compare]   time training steps here, also against a plain PyTorch loop
  list                                           methods, networks and data sets

codistill COMMAND --help says more. --debug before the command shows tracebacks."""

TRAIN_FLAGS = ("out", "seeds", "verify_resume", "max_restarts", "recipe", "recipes", "preset")
BENCH_FLAGS = ("runs", "compare", "seconds", "profile", "json")
T = TypeVar("T")


def options(kind: type[T], arguments: Sequence[str], command: str) -> T:
    """Parse the flags of a command.

    Raises:
        UsageError: In one line.
    """
    parsed, unknown = parse_flags(kind, arguments, None, command)
    if unknown:
        raise UsageError(unknown_option(unknown[0], (field.name for field in dataclasses.fields(kind)), command))  # type: ignore[arg-type]
    assert isinstance(parsed, kind)
    return parsed


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
    from codistill.bench import bench
    from codistill.bench_text import lines

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
    from codistill.train import free_folder, train_fleet, train_from_config, train_seeds

    if parsed.verify_resume:
        from codistill.verify import verify_resume

        for config in configs:
            print(verify_resume(config))
    if paths:
        out = parsed.out or free_folder(configs[0], "recipes")
        refuse_diverged(train_fleet(configs, [out / one.stem for one in paths]))
    elif parsed.seeds:
        refuse_diverged(train_seeds(configs[0], parsed.seeds, parsed.out))
    else:
        train_from_config(configs[0], parsed.out, max_restarts=parsed.max_restarts)


def several_recipes(arguments: Sequence[str], named: str | None) -> tuple[Path, ...]:
    """Read `--recipes`.

    Raises:
        UsageError: No file, two whose runs would have one folder, or another flag that says what is trained.
    """
    command = f"codistill train {named or 'mfef'}"
    for flag in ("--recipe", "--seeds", "--preset"):
        if has_flag(arguments, flag):
            raise UsageError(f"{command}: --recipes and {flag}: give one of them only")
    parsed, _ = parse_flags(TrainOptions, arguments, TrainOptions(config=default_config(named or "mfef")), command)
    assert isinstance(parsed, TrainOptions)
    if not parsed.recipes:
        raise UsageError(f"{command}: --recipes: name at least one file")
    found: dict[str, Path] = {}
    for path in parsed.recipes:
        if path.stem in found:
            raise UsageError(
                f"{command}: --recipes {found[path.stem]} and {path}: both runs would be in {path.stem}: "
                "rename one of the files"
            )
        found[path.stem] = path
    return parsed.recipes


def train_options(rest: Sequence[str], named: str | None, path: Path | None) -> TrainOptions:
    """Parse what `codistill train` is given.

    Args:
        rest: The flags.
        named: The method that stands before them, if any.
        path: The recipe, if any.

    Raises:
        UsageError: In one line.
    """
    recipe, from_recipe = read_recipe(path) if path else (None, [])
    if named and recipe and named != recipe:
        raise UsageError(f"the recipe is for {recipe}, not for {named}: name one of them only")
    method, from_preset, preset = named or recipe, [], None
    if has_flag(rest, "--preset"):
        preset = find_preset(flag_value(rest, "--preset"), method)
        method = preset.method
        written = [*from_recipe, *rest]
        epochs = flag_value(written, "--epochs") if has_flag(written, "--epochs") else None
        from_preset = mapping_arguments(preset_run(preset, epochs), preset.settings, method, lambda key: "preset")
    method = method or "mfef"
    default = TrainOptions(config=default_config(method))
    command = f"codistill train {method}"
    # Later flags win: the method's defaults, then the preset, the recipe, and what was written by hand.
    try:
        parsed, unknown = parse_flags(TrainOptions, [*from_preset, *from_recipe, *rest], default, command)
    except UsageError as error:
        raise (with_place(error, path, method, from_recipe) if path else error) from None
    if unknown:
        raise UsageError(unknown_option(unknown[0], [*setting_names(method), *TRAIN_FLAGS], command))
    assert isinstance(parsed, TrainOptions)
    config = parsed.config
    if "" in config.networks:
        raise UsageError(
            "a network without a name: only the program that built it can train it; name one with --networks"
        )
    if preset is not None:
        config = dataclasses.replace(config, networks=renamed(preset, config.networks))
    return dataclasses.replace(parsed, config=config)


def refuse_diverged(runs: "Sequence[Run]") -> None:
    """Say which of several runs diverged.

    Raises:
        DivergedError: One did.
    """
    lost = [str(run.path) for run in runs if not run.finished]
    if lost:
        raise DivergedError(f"{len(lost)} of {len(runs)} runs diverged: {', '.join(lost)}; the others are finished")


def has_flag(arguments: Sequence[str], flag: str) -> bool:
    """Say whether a flag that takes a value was given, as `--flag value` or `--flag=value`."""
    return any(argument.partition("=")[0] == flag for argument in arguments)


def flag_value(arguments: Sequence[str], flag: str) -> str:
    """Give the value of a flag that was given; of the last one, if it was given twice."""
    found = ""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            found = value if equals else next(iter(arguments[index + 1 :]), "")
    return found


def resume_command(arguments: Sequence[str]) -> None:
    """Run `codistill resume`."""
    chosen = options(ResumeOptions, arguments, "codistill resume")
    if not chosen.runs:
        raise UsageError("codistill resume: no run: name at least one run folder")
    from codistill.train import resume_together

    runs = resume_together(
        chosen.runs, chosen.data_dir, override=key_values(chosen.override), max_restarts=chosen.max_restarts
    )
    refuse_diverged(runs)


def key_values(written: Sequence[str]) -> dict[str, str]:
    """Read `key=value` words.

    Raises:
        UsageError: One without an equals sign.
    """
    for each in written:
        if "=" not in each:
            raise UsageError(f"codistill resume --override {each}: write it as key=value, for example device=cpu")
    return dict(each.split("=", 1) for each in written)


def evaluate_command(arguments: Sequence[str]) -> None:
    """Run `codistill evaluate`."""
    chosen = options(EvaluateOptions, arguments, "codistill evaluate")
    from codistill.evaluate import evaluate_run
    from codistill.run import Run

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
    from codistill.classifier import load_classifier
    from codistill.predict import predict

    for each in predict(load_classifier(chosen.model, chosen.predictor), chosen.images, chosen.top):
        ranked = list(zip(each.classes, each.probabilities, strict=True))
        if chosen.json:
            print(json.dumps({"image": str(each.image), "classes": dict(ranked)}))
        else:
            print(f"{each.image}: " + "  ".join(f"{name} {100 * share:.1f} %" for name, share in ranked))


def export_command(arguments: Sequence[str]) -> None:
    """Run `codistill export`."""
    chosen = options(ExportOptions, arguments, "codistill export")
    from codistill.export import export_predictor
    from codistill.run import Run

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
    from codistill.sweep import own_program, sweep

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


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train_command,
    "resume": resume_command,
    "evaluate": evaluate_command,
    "predict": predict_command,
    "export": export_command,
    "bench": bench_command,
    "sweep": sweep_command,
    "list": list_command,
}


def run_command(arguments: Sequence[str]) -> None:
    """Run a command line.

    Raises:
        CodistillError: What was wrong with it, or with what it met.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
    elif arguments[0] == "--version":
        from codistill.run import VERSION

        print(f"codistill {VERSION}")
    elif arguments[0] in COMMANDS:
        COMMANDS[arguments[0]](arguments[1:])
    else:
        raise UsageError(f"unknown command {arguments[0]!r}: {near_matches(arguments[0], COMMANDS)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit status; an error is one line on stderr.

    Args:
        arguments: Without the program's name; None: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [each for each in given if each != "--debug"]
    signal.signal(signal.SIGTERM, terminate)
    try:
        run_command(given)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if type(error) is SystemExit:  # --help of a command
            return int(error.code or 0)
        if debug:
            raise
        status, line = explain(error)
        print(f"codistill: error: {line}", file=sys.stderr)
        return status


def explain(error: BaseException) -> tuple[int, str]:
    """Turn an error into an exit status and one line."""
    import torch

    line = " ".join(str(error).split())
    match error:
        case CodistillError():
            return error.exit_status, line
        case KeyboardInterrupt():
            return 130, line or "interrupted; what was saved before is kept: codistill resume RUN goes on"
        case Terminated():
            return 143, line
        case torch.OutOfMemoryError() | MemoryError():
            return 6, f"out of memory: use a smaller --batch-size or fewer or smaller --networks ({line[:200]})"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            return 6, f"disk full or failing: {line}: mend that; what was written before is kept"
        case _:
            return 1, f"bug: {type(error).__name__}: {line}: please report it with the output of --debug"
