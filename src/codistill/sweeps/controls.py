"""Controls beside the runs of a sweep: what a student reaches alone, for the same cost or with the same parameters."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from codistill.core.errors import CodistillError, UsageError
from codistill.core.files import write_json
from codistill.methods import METHODS
from codistill.report.differences import ALONE, EMA, EQUAL_COMPUTE, FACTORS, MATCHED
from codistill.settings.build import load_named_data
from codistill.settings.config import RunConfig, default_config
from codistill.sweeps.naming import canonical, digest, identity, unique_names
from codistill.sweeps.spec import PlannedRun, planned
from codistill.training.prepare import DeviceSplits, build_taught, check
from codistill.training.sharing import timed_steps

CONTROLS = {
    ALONE: "The student trained alone, by the labels.",
    EMA: "The student trained alone, with a moving average of its weights as a predictor of its own.",
    EQUAL_COMPUTE: "The student trained alone for as many epochs as take the time of the run, by measured steps.",
    MATCHED: "The student with the components that the method deploys, trained alone.",
}
EMA_DECAY = 0.999
ROUNDS = 5


def with_controls(runs: Sequence[PlannedRun], folder: Path, keep: bool = True) -> list[PlannedRun]:
    """Add the controls of the runs of a sweep, each once: of every network of a run and with its seed.

    A run that cannot be built has none, and costs no other its own.
    The factor on the epochs of `equal-compute` is measured once, and unless `keep` is False, kept in `controls.json` of
    the sweep's folder.

    Raises:
        UsageError: That file is damaged.
    """
    factors = read_factors(folder / FACTORS)
    wanted: dict[str, list[dict[str, Any]]] = {kind: [] for kind in CONTROLS}
    for run in runs:
        if run.config is None or run.config.method_name == "independent":
            continue
        for network in dict.fromkeys(run.config.networks):
            key = canonical({**identity(run.config), "seed": 0, "control of": network})
            if key not in factors:
                try:
                    factors[key] = measured_factor(run.config, network)
                except CodistillError:  # its process reports it
                    continue
                if keep:
                    write_json(folder / FACTORS, factors)
            for kind, settings in controls_of(run.config, run.recipe, network, factors[key]).items():
                wanted[kind].append(settings)
    known = {digest(run.config) for run in runs if run.config}
    added = []
    for kind, settings_of_all in wanted.items():
        seedless = [{key: value for key, value in each.items() if key != "seed"} for each in settings_of_all]
        names, groups = unique_names(settings_of_all), unique_names(seedless)
        for each, name, group in zip(settings_of_all, names, groups, strict=True):
            control = planned(each, f"{kind}-{name}", f"{kind}-{group}", lambda key: "controls")
            if control.config is not None and digest(control.config) not in known:
                known.add(digest(control.config))
                added.append(control)
    return [*runs, *added]


def controls_of(config: RunConfig, recipe: Mapping[str, Any], network: str, factor: float) -> dict[str, dict[str, Any]]:
    """Return the settings of each control of a run, by its kind; methods' settings have keys `method.*`."""
    kept = {key: value for key, value in recipe.items() if key != "method" and not key.startswith("teacher")}
    if "weights" in kept:  # what the first student of this network begins with
        begun = f"student{config.networks.index(network)}="
        kept["weights"] = [each.replace(begun, "student0=", 1) for each in kept["weights"] if each.startswith(begun)]
    alone = {**kept, "networks": [network], "method.name": "independent"}
    found = {ALONE: alone, EMA: {**alone, "ema_decay": EMA_DECAY}}
    longer = {**alone, "epochs": max(1, round(factor * config.train.epochs))}
    if "milestones" in kept:
        longer["milestones"] = [round(factor * each) for each in kept["milestones"]]
    found[EQUAL_COMPUTE] = longer
    components = METHODS[config.method_name].alone(config.method)
    if components is not None:
        settings = {f"method.{key}": value for key, value in dataclasses.asdict(components).items()}
        settings = {key: value for key, value in settings.items() if value is not None}
        found[MATCHED] = {**alone, **settings, "method.name": config.method_name}
    return found


def measured_factor(config: RunConfig, network: str) -> float:
    """Measure how many times as long a step of a run takes as one of a network alone: the median of steps in turn."""
    plain = default_config("independent")
    single = dataclasses.replace(
        config,
        method_name="independent",
        networks=(network,),
        weights=(),
        method=plain.method,
        teaching=plain.teaching,
    )
    data, device = load_named_data(config), torch.device("cpu")
    plans = [check(build_taught(each, data), data, each, device) for each in (config, single)]
    splits, threads = DeviceSplits(data, device), torch.get_num_threads()
    with timed_steps(plans[0], splits) as together, timed_steps(plans[1], splits) as alone:
        together(threads), alone(threads)
        return statistics.median(together(threads) / alone(threads) for _ in range(ROUNDS))


def read_factors(path: Path) -> dict[str, float]:
    """Return the factors that an earlier start of the sweep has measured."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {str(key): float(value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): remove it, and factors are measured again") from None
