"""From the spec of a sweep to its runs: each with a name, its settings and the group that differs in the seed only."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches, with_options
from codistill.data.dataset import DATASETS
from codistill.networks import NETWORKS
from codistill.settings.config import RunConfig
from codistill.settings.mapping import LISTS, Where, run_from_mapping, split_method, typed_mapping
from codistill.settings.recipe import read_table
from codistill.sweeps.chain import is_chain
from codistill.sweeps.engines.registry import ENGINES
from codistill.sweeps.naming import TAKEN, canonical, digest, unique_names

KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", lambda value: isinstance(value, str) and bool(value)),
    int: ("a whole number above 0", lambda value: type(value) is int and value > 0),
    float: ("a number, 0 or more", lambda value: type(value) in (int, float) and 0 <= value < math.inf),
    list: ("a list of lines", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value)),
}
"""What settings of engines may be, by their type."""
LABEL = re.compile(r"[A-Za-z0-9+-][A-Za-z0-9.+-]*")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: its name, that of its group, and the recipe that `codistill train --recipe` takes."""

    name: str
    group: str  # the name without the seed
    recipe: dict[str, Any]
    config: RunConfig | None  # None where a value is out of range, which `problem` names
    problem: str


def read_spec(path: Path, skip_bad: bool = False) -> list[PlannedRun]:
    """Return the runs of a spec in its order.

    The settings at the top are those of every run. The lists of `[grid]` are multiplied with each other, and with the
    entries of `[[runs]]`, where there are any; an entry's `name` begins the names of its runs, and is that of a single
    one. With `skip_bad` all data sets leave out bad images.
    """
    mapping, where = read_settings(path)
    axes, entries = grid_axes(mapping.pop("grid", {}), where), mapping.pop("runs", [{}])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{where('runs')}: runs must be tables of settings: [[runs]]")
    shared = {"method.name": "mfef", **flat(mapping, where)}
    settings, labels = [], []
    for entry in entries:
        label = entry.get("name", "")
        if not isinstance(label, str) or (label and not LABEL.fullmatch(label)):
            form = "a text of letters, digits and . + -, the first no point"
            raise UsageError(f"{where('name')}: name must be {form}, not {label!r}")
        if label.lower() in TAKEN:
            raise UsageError(f"{where('name')}: {label} is a file of the sweep itself: choose another name")
        entry = {key: value for key, value in entry.items() if key != "name"}
        for point in itertools.product(*axes):
            own: dict[str, Any] = {}
            for part in (flat(entry, where), *point):
                for key in own.keys() & part.keys():  # one value would be lost
                    raise UsageError(f"{where(key)}: {key} is in [grid] and in [[runs]], or twice in [grid]")
                own |= part
            settings.append(shared | own)
            labels.append(label)
            if skip_bad and isinstance(data := settings[-1].get("data"), str):
                settings[-1]["data"] = with_options(data, skip_bad="true")
    groups = unique_names([{key: value for key, value in each.items() if key != "seed"} for each in settings])
    groups = labelled(groups, labels)
    runs: dict[str, PlannedRun] = {}
    names = unique_names(settings)
    for each, label, name, group in zip(settings, labels, names, groups, strict=True):
        if label:
            name = f"{label}-{name}" if labels.count(label) > 1 else label
        run = findable(planned(each, name, group, where))
        # The same run may be written in two ways, as with a default that only one of them names.
        key = digest(run.config) if run.config else canonical(run.recipe)
        if key in runs:
            raise UsageError(f"sweep {path}: {runs[key].name} and {name} are the same run: leave one of them out")
        runs[key] = run
    if all(run.problem for run in runs.values()):
        raise UsageError(f"sweep {path}: no run can work: {next(iter(runs.values())).problem}")
    return list(runs.values())


def labelled(groups: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Name groups by the labels of their runs, where all of a group have one; they stay the same groups."""
    pairs = set(zip(groups, labels, strict=True))
    names = {}
    for group, label in pairs:
        alone = [pair[0] for pair in pairs if pair[1] == label] == [group]
        whole = [pair[1] for pair in pairs if pair[0] == group] == [label]
        names[group] = group if not (label and whole) else label if alone else f"{label}-{group}"
    return [names[group] for group in groups] if len(set(names.values())) == len(names) else list(groups)


def read_settings(path: Path) -> tuple[dict[str, Any], Where]:
    """Return what a spec says of its runs, and the place of a key; what sets up engines is left out."""
    mapping, text = read_table(path, "sweep")
    return {key: value for key, value in mapping.items() if key not in ENGINES}, functools.partial(place, path, text)


def place(path: Path, text: str, key: str) -> str:
    """Return the place of a key in a spec, by file and line."""
    name = re.escape(key)
    # The last place: what stands in [grid] and [[runs]] comes after, and wins over, what stands at the top.
    found = list(re.finditer(rf'^[ \t]*(\[\[?[ \t]*)?"?{name}\b', text, re.MULTILINE))
    found = found or list(re.finditer(rf"\b{name}\b", text))
    return f"sweep {path}:{text.count(chr(10), 0, found[-1].start()) + 1}" if found else f"sweep {path}"


def engine_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tables of a spec that set up engines, by their names; they are no part of a run."""
    mapping, text = read_table(path, "sweep")
    tables = {name: mapping.get(name, {}) for name in ENGINES}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{place(path, text, name)}: {name} must be a table of settings: [{name}]")
        known = ENGINES[name].settings
        for key, value in table.items():
            if key not in known:
                words = near_matches(key, known) if known else f"{name} has no settings"
                raise UsageError(f"{place(path, text, key)}: unknown key {key!r} in [{name}]: {words}")
            what, right = KINDS[known[key]]
            if not right(value):
                raise UsageError(f"{place(path, text, key)}: {key} in [{name}] is {value!r}; it must be {what}")
    return tables


def flat(settings: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """Return settings with keys of their own for the method's name and settings: `method.name` and so on."""
    name, method = split_method(settings.get("method", {}), where)
    method |= {} if name is None else {"name": name}
    rest = {key: value for key, value in settings.items() if key != "method"}
    return {**{f"method.{key}": value for key, value in method.items()}, **rest}


def grid_axes(grid: Any, where: Where) -> list[list[dict[str, Any]]]:
    """Return the factors of `[grid]`: for each key its alternatives, as settings."""
    if not isinstance(grid, dict):
        raise UsageError(f"{where('grid')}: grid must be a table of lists: [grid]")
    if isinstance(grid.get("method"), dict):  # written method.temperature = [2, 3], without quotes
        grid |= {f"method.{key}": values for key, values in grid.pop("method").items()}
    axes = []
    for key, values in grid.items():
        kind = list if key in LISTS else object
        if not isinstance(values, list) or not values or not all(isinstance(each, kind) for each in values):
            form = '[["resnet20", "resnet20"], ["resnet32", "wrn-16-2"]]' if key == "networks" else "[[..], [..]]"
            form = f"list of lists, {key} = {form}" if key in LISTS else "list of values"
            raise UsageError(f"{where(key)}: {key} in [grid] must be a {form}")
        axes.append([flat({key: value}, where) for value in values])
    return axes


def planned(settings: Mapping[str, Any], name: str, group: str, where: Where) -> PlannedRun:
    """Make a run of its settings; a value out of range is the run's `problem`."""
    recipe = {key: value for key, value in settings.items() if not key.startswith("method.")}
    recipe["method"] = {key[len("method.") :]: value for key, value in settings.items() if key not in recipe}
    typed_mapping(recipe, where)
    try:
        return PlannedRun(name, group, recipe, run_from_mapping(recipe, lambda key: ""), "")
    except UsageError as error:
        return PlannedRun(name, group, recipe, None, str(error).removeprefix(": "))


def findable(run: PlannedRun) -> PlannedRun:
    """Return a run; a network or a data set that is not registered here, or a chain, is its `problem`."""
    if run.config is None:
        return run
    try:
        if is_chain(run.config):
            raise UsageError("takd in a sweep is one link of a chain: one network, and a teacher or a run that teaches")
        for network in run.config.networks:
            NETWORKS.find(network)
        if run.config.data:
            DATASETS.find(run.config.data)
    except UsageError as error:
        return replace(run, config=None, problem=str(error))
    return run
