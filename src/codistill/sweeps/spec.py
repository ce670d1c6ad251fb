"""From the spec of a sweep to its runs: each with a name, its settings and the group that differs in the seed only."""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches
from codistill.methods import METHODS
from codistill.settings.config import RunConfig
from codistill.settings.mapping import LISTS, run_from_mapping, typed_mapping
from codistill.settings.recipe import read_table
from codistill.sweeps.naming import canonical, digest, unique_names


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: Made of the values in which the runs differ; a folder name, unlike every other one in any case.
        group: The same without the seed.
        recipe: The run as a recipe: the contents of a JSON file that `codistill train --recipe` takes.
        config: The whole run; None where a value is out of range.
        problem: Which value, and why.
    """

    name: str
    group: str
    recipe: dict[str, Any]
    config: RunConfig | None = None
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
            own: dict[str, Any] = {}
            for part in (flat(entry, where), *point):
                for key in own.keys() & part.keys():  # one value would be lost
                    raise UsageError(
                        f"{where(key)}: {key} is in [grid] and in [[runs]], or twice in [grid]: write it once"
                    )
                own |= part
            settings.append(shared | own)
    groups = unique_names([{key: value for key, value in each.items() if key != "seed"} for each in settings])
    runs: list[PlannedRun] = []
    known: dict[str, str] = {}
    for each, name, group in zip(settings, unique_names(settings), groups, strict=True):
        run = planned(each, name, group, where)
        # The same run may be written in two ways, as with a default that only one of them names.
        key = digest(run.config) if run.config else canonical(run.recipe)
        if key in known:
            raise UsageError(f"sweep {path}: {known[key]} and {name} are the same run: leave one of them out")
        known[key] = name
        runs.append(run)
    if all(run.problem for run in runs):
        raise UsageError(f"sweep {path}: no run can work: {runs[0].problem}")
    return runs


def flat(settings: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """Return settings with keys of their own for the method's name and settings: `method.name` and so on.

    Raises:
        UsageError: The method is neither a name nor a table.
    """
    result = {key: value for key, value in settings.items() if key != "method"}
    method = settings.get("method", {})
    if isinstance(method, str):
        method = {"name": method}
    if not isinstance(method, dict):
        raise UsageError(f'{where("method")}: method must be a name, or a table with a name: [method] name = "mfef"')
    return {**{f"method.{key}": value for key, value in method.items()}, **result}


def grid_axes(grid: Any, where: Callable[[str], str]) -> list[list[dict[str, Any]]]:
    """Return the factors of `[grid]`: for each key its alternatives, as settings.

    Raises:
        UsageError: Not lists, or without values.
    """
    if not isinstance(grid, dict):
        raise UsageError(f"{where('grid')}: grid must be a table of lists: [grid]")
    if isinstance(grid.get("method"), dict):  # written method.temperature = [2, 3], without quotes
        grid = flat(grid, where)
    axes = []
    for key, values in grid.items():
        kind = list if key in LISTS else object
        if not isinstance(values, list) or not values or not all(isinstance(each, kind) for each in values):
            form = '[["resnet20", "resnet20"], ["resnet32", "wrn-16-2"]]' if key == "networks" else "[[..], [..]]"
            form = f"list of lists, {key} = {form}" if key in LISTS else "list of values"
            raise UsageError(f"{where(key)}: {key} in [grid] must be a {form}")
        axes.append([flat({key: value}, where) for value in values])
    return axes


def planned(settings: Mapping[str, Any], name: str, group: str, where: Callable[[str], str]) -> PlannedRun:
    """Make a run of its settings; a value out of range is the run's `problem`.

    Raises:
        UsageError: An unknown key or method, or a value of a wrong type.
    """
    recipe = {key: value for key, value in settings.items() if not key.startswith("method.")}
    method = {key.removeprefix("method."): value for key, value in settings.items() if key.startswith("method.")}
    chosen = method["name"]
    if not isinstance(chosen, str) or chosen not in METHODS:
        raise UsageError(f"{where(str(chosen))}: unknown method {chosen!r}: {near_matches(str(chosen), METHODS)}")
    recipe["method"] = method
    typed_mapping(recipe, where)
    try:
        config = run_from_mapping(recipe, lambda key: "")
    except UsageError as error:
        return PlannedRun(name=name, group=group, recipe=recipe, problem=str(error).removeprefix(": "))
    return PlannedRun(name=name, group=group, recipe=recipe, config=config)
