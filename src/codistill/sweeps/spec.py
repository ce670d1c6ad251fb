"""From the spec of a sweep to its runs: each with a name, its settings and the group that differs in the seed only."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches
from codistill.methods import METHODS
from codistill.settings.config import RunConfig
from codistill.settings.mapping import refuse_untyped, run_from_mapping
from codistill.settings.recipe import read_table
from codistill.sweeps.naming import canonical, digest, unique_names

# Settings that are lists themselves, so that [grid] has lists of lists of them.
LISTS = ("networks", "milestones")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: Made of the values in which the runs differ; a folder name, unlike every other one in any case.
        group: The same without the seed.
        recipe: The run as a recipe: the contents of a JSON file that `codistill train --recipe` takes.
        config: The whole run; None where a value cannot be.
        problem: What is wrong with that value.
    """

    name: str
    group: str
    recipe: dict[str, Any]
    config: RunConfig | None
    problem: str = ""


def read_spec(path: Path) -> list[PlannedRun]:
    """Read the spec of a sweep.

    The settings at the top are those of every run. The lists of `[grid]` are multiplied with each other, and with the
    entries of `[[runs]]`, where there are any.

    Args:
        path: A TOML file.

    Returns:
        The runs, in the order of the spec.

    Raises:
        UsageError: Unreadable, an unknown key, a value of a wrong type, the same run twice, or no run that could work;
            names the line where there is one.
    """
    mapping, text = read_table(path, "sweep")

    def where(key: str) -> str:
        name = re.escape(key)
        # The last place: what stands in [grid] and [[runs]] comes after, and wins over, what stands at the top.
        found = list(re.finditer(rf'^[ \t]*(\[\[?[ \t]*)?"?{name}\b', text, re.MULTILINE))
        found = found or list(re.finditer(rf"\b{name}\b", text))
        return f"sweep {path}:{text.count(chr(10), 0, found[-1].start()) + 1}" if found else f"sweep {path}"

    axes, entries = grid_axes(mapping.pop("grid", {}), where), mapping.pop("runs", [{}])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{where('runs')}: runs must be tables of settings: [[runs]]")
    shared = {"method.name": "mfef", **flat(mapping, where)}
    settings = []
    for entry in entries:
        for point in itertools.product(*axes):
            own = merged([flat(entry, where), *point], where)
            settings.append(shared | own)
    seedless = [without_seed(each) for each in settings]
    groups = {canonical(each): each for each in seedless}
    group_names = dict(zip(groups, unique_names(list(groups.values())), strict=True))
    runs = [
        planned(each, name, group_names[canonical(rest)], where)
        for each, rest, name in zip(settings, seedless, unique_names(settings), strict=True)
    ]
    refuse_equals(runs, path)
    if all(run.config is None for run in runs):
        raise UsageError(f"sweep {path}: no run can work: {runs[0].problem}")
    return runs


def flat(settings: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """Give the method's name and settings keys of their own, `method.name` and so on.

    Raises:
        UsageError: The method is neither a name nor a table.
    """
    result = {}
    for key, value in settings.items():
        if key != "method":
            result[key] = value
        elif isinstance(value, str):
            result["method.name"] = value
        elif isinstance(value, dict):
            result |= {f"method.{inner}": each for inner, each in value.items()}
        else:
            raise UsageError(f'{where(key)}: method must be a name, or a table with a name: [method] name = "mfef"')
    return result


def grid_axes(grid: Any, where: Callable[[str], str]) -> list[list[dict[str, Any]]]:
    """Turn `[grid]` into what is multiplied: for each key its alternatives, as settings.

    Raises:
        UsageError: Not lists, or without values.
    """
    if not isinstance(grid, dict):
        raise UsageError(f"{where('grid')}: grid must be a table of lists: [grid]")
    lists = dict(grid)
    if isinstance(lists.get("method"), dict):  # written method.temperature = [2, 3], without quotes
        lists = {**flat({"method": lists.pop("method")}, where), **lists}
    axes = []
    for key, values in lists.items():
        kind = list if key in LISTS else object
        if not isinstance(values, list) or not values or not all(isinstance(each, kind) for each in values):
            form = '[["resnet20", "resnet20"], ["resnet32", "wrn-16-2"]]' if key == "networks" else "[[..], [..]]"
            form = f"list of lists, {key} = {form}" if key in LISTS else "list of values"
            raise UsageError(f"{where(key)}: {key} in [grid] must be a {form}")
        axes.append([flat({key: value}, where) for value in values])
    return axes


def merged(parts: Iterable[Mapping[str, Any]], where: Callable[[str], str]) -> dict[str, Any]:
    """Put settings together.

    Raises:
        UsageError: A key in two of them: one value would be lost.
    """
    result: dict[str, Any] = {}
    for part in parts:
        for key in part:
            if key in result:
                raise UsageError(f"{where(key)}: {key} is in [grid] and in [[runs]], or twice in [grid]: write it once")
        result |= part
    return result


def without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the seed."""
    return {key: value for key, value in settings.items() if key != "seed"}


def planned(settings: Mapping[str, Any], name: str, group: str, where: Callable[[str], str]) -> PlannedRun:
    """Make a run of its settings.

    Raises:
        UsageError: An unknown key or method, or a value of a wrong type; what else may be wrong with a value is told in
            the run's `problem`.
    """
    run = {key: value for key, value in settings.items() if not key.startswith("method.")}
    method = {key.removeprefix("method."): value for key, value in settings.items() if key.startswith("method.")}
    chosen = method.pop("name")
    if not isinstance(chosen, str) or chosen not in METHODS:
        raise UsageError(f"{where(str(chosen))}: unknown method {chosen!r}: {near_matches(str(chosen), METHODS)}")
    recipe = {"method": {"name": chosen, **method}, **run}
    refuse_untyped(recipe, where)
    try:
        config = run_from_mapping(recipe, lambda key: "")
    except UsageError as error:
        return PlannedRun(name=name, group=group, recipe=recipe, config=None, problem=str(error).removeprefix(": "))
    return PlannedRun(name=name, group=group, recipe=recipe, config=config)


def refuse_equals(runs: Iterable[PlannedRun], path: Path) -> None:
    """Refuse the same run twice, also where it is written in two ways, as with a default that only one of them names.

    Raises:
        UsageError: It is there twice.
    """
    names: dict[str, str] = {}
    for run in runs:
        key = canonical(run.recipe) if run.config is None else digest(run.config)
        if key in names:
            raise UsageError(f"sweep {path}: {names[key]} and {run.name} are the same run: leave one of them out")
        names[key] = run.name
