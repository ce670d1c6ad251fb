"""The commands of the command line, a function each."""

import contextlib
import csv
import dataclasses
import functools
import inspect
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codistill.cli import options
from codistill.cli.flags import parse, parse_with_settings
from codistill.cli.sources import skipping, split_named, train_options
from codistill.core.console import lasting_console, warn
from codistill.core.errors import CodistillError, DataError, DivergedError, UsageError, WorkerError
from codistill.data import DATASETS
from codistill.data.listing import LISTED
from codistill.deploy.budget import BEST, choose_predictor
from codistill.deploy.card import export_folder, is_folder, refuse_licence, refuse_taken
from codistill.deploy.classifier import load_classifier
from codistill.deploy.export import RUNTIMES, choose_format, export_predictor, refuse_accuracy_loss
from codistill.deploy.latency import measure_latency
from codistill.deploy.predict import answers
from codistill.deploy.run import Run
from codistill.evaluation.presentation import as_json, scores_table, where_wrong
from codistill.methods import METHODS
from codistill.modules import MULTISCALE
from codistill.networks import NETWORKS
from codistill.networks.network import parameter_count
from codistill.networks.probe import forward_flop
from codistill.report.comparison import write_comparison, write_page
from codistill.report.pictures import complete_pictures
from codistill.report.sources import groups_of, is_sweep, run_folders
from codistill.runs.choice import choice
from codistill.runs.evaluate import evaluate_images
from codistill.runs.latency import rows
from codistill.runs.predictions import write_predictions_csv
from codistill.settings.config import RunConfig, default_config
from codistill.settings.mapping import run_from_mapping
from codistill.settings.presets import PRESETS
from codistill.sweeps.chain import is_chain, train_chain
from codistill.sweeps.controls import CONTROLS
from codistill.sweeps.driver import own_program, sweep
from codistill.sweeps.reproduce.reproduce import reproduce
from codistill.sweeps.spec import read_settings
from codistill.training.fleet import train_fleet, train_seeds
from codistill.training.resume import resume_together
from codistill.training.train import kept_if_used, train_from_config
from codistill.training.verify import verify_resume

LISTED_MAP = (64, 8, 8)
"""Channels, height and width of the feature map that costs of blocks are listed for: ResNet-20's for 32x32 images."""


def bench_command(arguments: Sequence[str]) -> None:
    """Run `codistill bench`."""
    from codistill.bench.bench import bench, lines  # counting operations takes long to import

    named, rest = split_named(arguments)
    default = default_config(named or "mfef")
    command = f"codistill bench {default.method_name}"
    chosen, values = parse_with_settings(options.BenchOptions, rest, command, default.values())
    config = skipping(run_from_mapping(values, lambda key: command), chosen)
    if chosen.runs < 1 or not 0 < chosen.seconds < 3600:
        raise UsageError(f"{command}: --runs must be at least 1, and --seconds above 0 and below 3600")
    if chosen.profile and not chosen.profile.parent.is_dir():
        raise UsageError(f"{command}: --profile {chosen.profile}: there is no folder {chosen.profile.parent}")
    result = bench(config, chosen.runs, chosen.compare, chosen.seconds, chosen.profile)
    print(json.dumps(result, indent=2) if chosen.json else "\n".join(lines(result)))


def train_command(arguments: Sequence[str]) -> None:
    """Run `codistill train`."""
    named, rest = split_named(arguments)
    sources = parse(options.SourceOptions, rest, f"codistill train {named or 'mfef'}", strict=False)
    paths = sources.recipes or (sources.recipe,)
    each = [train_options(rest, named, path, sources.preset) for path in paths]
    chosen, configs = each[0][0], [config for _, config in each]
    for flag, given in (("--recipes", chosen.recipes), ("--seeds", chosen.seeds)):
        if flag in rest and not given:
            raise UsageError(f"codistill train: {flag}: name at least one")
    if chosen.verify_resume and is_chain(configs[0]):
        raise UsageError("codistill train: --verify-resume is of one run, and a chain has several: leave it out")
    if chosen.verify_resume:
        for config in configs:
            print(verify_resume(config))
    if chosen.recipes:
        with kept_if_used(configs[0], chosen.out, "recipes") as out:
            refuse_diverged(train_fleet(configs, [out / path.stem for path in chosen.recipes]))
    elif is_chain(configs[0]):
        train_chains(configs[0], chosen.seeds, chosen.out)
    elif chosen.seeds:
        refuse_diverged(train_seeds(configs[0], chosen.seeds, chosen.out))
    else:
        train_from_config(configs[0], chosen.out)


def train_chains(config: RunConfig, seeds: Sequence[int], out: Path | None) -> None:
    """Train a chain, or one for each seed, one after the other."""
    if not seeds:
        train_chain(config, out)
        return
    with kept_if_used(config, out, "seeds") as folder:
        for seed in seeds:
            seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            train_chain(seeded, folder / f"seed{seed}")


def refuse_diverged(runs: Sequence[Run]) -> None:
    """Raise DivergedError if some of several runs diverged."""
    lost = [str(run.path) for run in runs if not run.finished]
    if lost:
        raise DivergedError(f"{len(lost)} of {len(runs)} runs diverged: {', '.join(lost)}; the others are finished")


def resume_command(arguments: Sequence[str]) -> None:
    """Run `codistill resume`."""
    chosen = parse(options.ResumeOptions, arguments, "codistill resume")
    if not chosen.runs:
        raise UsageError("codistill resume: no run: name at least one run folder")
    named: dict[str, list[Any]] = {}
    for each in chosen.override:
        key, equals, value = each.partition("=")
        if not equals:
            raise UsageError(f"codistill resume --override {each}: write it as key=value, for example device=cpu")
        named.setdefault(key, []).append(int(value) if key == "threads" and value.isdecimal() else value)
    changed = {key: values if len(values) > 1 else values[0] for key, values in named.items()}
    together = functools.partial(resume_together, chosen.runs, chosen.data_dir, override=changed)
    refuse_diverged(together(skip_bad=chosen.skip_bad, epochs=chosen.epochs))


def evaluate_command(arguments: Sequence[str]) -> None:
    """Run `codistill evaluate`."""
    chosen = parse(options.EvaluateOptions, arguments, "codistill evaluate")
    if (table := chosen.predictions) and (table.is_dir() or not table.parent.is_dir()):
        why = "is a folder: name a file in it" if table.is_dir() else f"there is no folder {table.parent}: make it"
        raise UsageError(f"--predictions {table}: {why}")
    run = Run(chosen.run)
    where = (chosen.checkpoint, chosen.data_dir, chosen.device, chosen.skip_bad, chosen.split)
    scores, predictions, same = evaluate_images(run, *where)
    if chosen.predictor not in (None, *scores):
        raise UsageError(f"{run.path} has no predictor {chosen.predictor!r}: choose from {', '.join(scores)}")
    if chosen.predictions:
        write_predictions_csv(chosen.predictions, predictions, run.class_names)
    if chosen.json:
        print(as_json(scores, predictions, run.class_names))
        return
    console, shown, how = lasting_console(True), chosen.predictor or next(iter(scores)), ""
    with contextlib.suppress(CodistillError):  # a damaged summary.json; the scores do not depend on it
        if run.finished:
            how = choice(run.summary, chosen.checkpoint) if same else ""  # its errors are those of the training
            shown = chosen.predictor or run.best_student(chosen.checkpoint)
    title = f"{chosen.run}, {chosen.checkpoint} checkpoint: {len(predictions)} {chosen.split} images"
    title += f" of {chosen.data_dir}" if chosen.data_dir else ""
    console.print(title, soft_wrap=True)
    console.print(scores_table(scores, predictions))
    if how:
        console.print(how, soft_wrap=True)
    for each in where_wrong(predictions, shown, run.class_names):
        console.print()
        console.print(each)


def report_command(arguments: Sequence[str]) -> None:
    """Run `codistill report`."""
    chosen = parse(options.ReportOptions, arguments, "codistill report")
    if not chosen.runs:
        raise UsageError("codistill report: no run: name at least one run folder")
    folders = run_folders(chosen.runs)
    several = len(folders) > 1 or any(map(is_sweep, chosen.runs))
    if several and (chosen.data_dir or chosen.skip_bad):
        raise UsageError("codistill report: --data-dir and --skip-bad are for the page of one run: leave them out")
    measured = folders if chosen.latency and not several else []
    if chosen.latency and several:  # no seed makes a network faster
        measured = [group.finished[0].run.path for group in groups_of(chosen.runs) if group.finished]
    for run in map(Run, measured):
        headings, *cells = rows(measure_latency(run), run.summary.get("top1_error", {}) if run.status else {})
        table = Table(*headings[:2], title=f"{run.path}: uint8 pixels to logits", box=None)
        for heading in headings[2:]:
            table.add_column(heading.replace(", ", "\n"), justify="right")
        for line in cells:
            table.add_row(*line)
        console = lasting_console(True)
        console.print(table, width=max(console.width, 100), crop=False)
    if several:
        print(f"ok: {write_comparison(chosen.runs, chosen.out)}")
        return
    run = Run(folders[0])
    complete_pictures(run, chosen.data_dir, chosen.skip_bad)
    print(f"ok: {write_page(run, chosen.out)}")


def predict_command(arguments: Sequence[str]) -> None:
    """Run `codistill predict`."""
    chosen = parse(options.PredictOptions, arguments, "codistill predict")
    if not chosen.images:
        raise UsageError("codistill predict: no images: name at least one file or folder")
    if chosen.top < 1:
        raise UsageError(f"codistill predict: --top is {chosen.top}; it must be at least 1")
    if chosen.json and chosen.csv:
        raise UsageError("codistill predict: --json and --csv: choose one of them")
    classifier, bad, answered = load_classifier(chosen.model, chosen.predictor), [], 0
    writer = csv.writer(sys.stdout or io.StringIO(), lineterminator="\n")
    if chosen.csv:
        places = range(1, min(chosen.top, len(classifier.class_names)) + 1)
        writer.writerow(["image", *(f"{key}{place}" for place in places for key in ("class", "probability"))])
    for each in answers(classifier, chosen.images, chosen.top):
        if isinstance(each, DataError):
            bad.append(each)
            continue
        answered += 1
        ranked = list(zip(each.classes, each.probabilities, strict=True))
        if chosen.csv:
            writer.writerow([each.image, *(value for pair in ranked for value in pair)])
        elif chosen.json:
            print(json.dumps({"image": str(each.image), "classes": dict(ranked)}))
        else:
            print(f"{each.image}: " + "  ".join(f"{name} {100 * share:.1f} %" for name, share in ranked))
    if bad and chosen.skip_bad and answered:
        more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        warn(f"{len(bad)} bad images are left out: {'; '.join(map(str, bad[:LISTED]))}{more}")
        return
    # A line each; the last one is that of the command.
    for error in bad[:-1]:
        print(f"codistill: error: {error}", file=sys.stderr)
    if bad:
        raise bad[-1]


def export_command(arguments: Sequence[str]) -> None:
    """Run `codistill export`."""
    chosen = parse(options.ExportOptions, arguments, "codistill export")
    out = chosen.out if chosen.out and not is_folder(chosen.out) else None
    folder = Path(chosen.out) if chosen.out and not out else None
    if folder:
        refuse_taken(folder)
    chooses = chosen.predictor == BEST or chosen.max_latency_ms is not None
    named = chosen.format or ("onnx" if folder or (chooses and not out) else None)
    format = (named or "onnx") if folder else choose_format(Path(out) if out else None, named)
    run, predictor, how = Run(chosen.run), chosen.predictor, ""
    if chooses:
        budget = (chosen.checkpoint, chosen.max_latency_ms, RUNTIMES[format])
        refuse_accuracy_loss(chosen.max_accuracy_loss)  # all that may be refused, before minutes of measurement
        refuse_licence(chosen.license)
        data = run.load_data(chosen.data_dir, chosen.skip_bad)
        predictor, how = choose_predictor(run, predictor or BEST, *budget, lambda: data.train.images)
        print(how)
    where = (format, chosen.checkpoint, chosen.data_dir, chosen.skip_bad, chosen.max_accuracy_loss)
    if folder:
        done = export_folder(run, folder, predictor, *where, licence=chosen.license)
    else:
        done = [export_predictor(run, predictor, Path(out) if out else None, *where)]
    for each in done:
        print(each.line)
    if folder:
        print(f"{folder}: python {folder / 'load.py'} IMAGE .. needs neither codistill nor torch")
    if predictor is None and (how := choice(run.summary, chosen.checkpoint)):
        print(how)


def list_command(arguments: Sequence[str]) -> None:
    """Run `codistill list`."""
    chosen = parse(options.ListOptions, arguments, "codistill list")
    registries: dict[str, Mapping[str, Any]] = {
        "methods": METHODS,
        "networks": NETWORKS,
        "data": DATASETS,
        "multiscale": MULTISCALE,
    }
    entries: dict[str, list[dict[str, Any]]] = {
        kind: [{"name": name, "summary": (inspect.getdoc(each) or "").partition("\n")[0]} for name, each in all.items()]
        for kind, all in registries.items()
    }
    entries["controls"] = [{"name": name, "summary": summary} for name, summary in CONTROLS.items()]
    for member in entries["methods"]:
        if preset := PRESETS.get(member["name"]):
            sets = {**preset.run, **{f"method.{key}": value for key, value in preset.settings.items()}}
            member["preset"] = {"source": preset.source, "sets": sets, "networks": dict(preset.networks)}
    for member in entries["multiscale"]:
        block = MULTISCALE[member["name"]](LISTED_MAP[0])
        flops = forward_flop(block, LISTED_MAP[1:], channels=LISTED_MAP[0])
        member |= {"map": LISTED_MAP, "parameters": parameter_count(block), "flops": flops}
    if chosen.json:
        print(json.dumps(entries, indent=2))
        return
    titles = {"multiscale": f"multiscale, for a map of {' x '.join(map(str, LISTED_MAP))}"}
    for kind, members in entries.items():
        table = Table(title=titles.get(kind, kind), title_justify="left", show_header=False, box=None)
        for member in members:
            counts = [f"{member[each]:,} {each}" for each in ("parameters", "flops") if each in member]
            table.add_row(member["name"], escape(member["summary"]), ", ".join(counts))
        Console().print(table)
    for member in entries["methods"]:
        if shown := member.get("preset"):
            words = [f"{key} {value}" for key, value in shown["sets"].items()]
            words += [f"{name} is {network}" for name, network in shown["networks"].items()]
            print(f"\n--preset {member['name']}: {shown['source']}\n  {', '.join(words)}")


def sweep_command(arguments: Sequence[str]) -> None:
    """Run `codistill sweep`."""
    chosen = parse(options.SweepOptions, arguments, "codistill sweep")
    searches = "search" in read_settings(chosen.spec)[0]
    rows = sweep(**vars(chosen), program=own_program(["sweep", *arguments]))
    failed = [row.name for row in rows if row.status == "FAILED" and not chosen.dry_run]
    # Trials of a search may fail, if one has all its runs.
    whole = {row.group for row in rows} - {row.group for row in rows if row.status != "finished"}
    if failed and not (searches and whole):
        some = ", ".join(failed[:5]) + (", .." if len(failed) > 5 else "")
        raise WorkerError(f"{len(failed)} of {len(rows)} runs failed: {some}: {chosen.out}/table.md says why")


def reproduce_command(arguments: Sequence[str]) -> None:
    """Run `codistill reproduce`."""
    chosen = parse(options.ReproduceOptions, arguments, "codistill reproduce")
    reproduce(**vars(chosen), program=own_program(["reproduce", *arguments]))
