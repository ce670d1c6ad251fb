"""From the arguments of a command to its run: later ones of defaults, preset, recipe and flags win."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.cli import options
from codistill.cli.flags import keys_written, parse_with_settings
from codistill.core.console import note, warn
from codistill.core.errors import UsageError
from codistill.core.registry import with_options
from codistill.settings.automatic import automatic, look_up, shown
from codistill.settings.config import RunConfig, default_config
from codistill.settings.mapping import run_from_mapping, typed_mapping
from codistill.settings.presets import completed, find_preset, preset_config
from codistill.settings.recipe import read_recipe


def split_named(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """Split the arguments of a command into the method that stands first, if any, and the flags."""
    named = bool(arguments) and not arguments[0].startswith("-")
    return (arguments[0], arguments[1:]) if named else (None, arguments)


def train_options(
    flags: Sequence[str], named: str | None, path: Path | None, preset_name: str | None
) -> tuple[options.TrainOptions, RunConfig]:
    """Return the run that `codistill train` is given: later ones of defaults, preset, recipe and flags win."""
    recipe = read_recipe(path) if path else None
    if named and recipe and recipe.method not in (None, named):
        raise UsageError(f"the recipe is for {recipe.method}, not for {named}: name one of them only")
    began = recipe.mapping.get("initial_weights") if recipe else None
    if isinstance(began, dict) and not began.get("from_recipe"):
        warn(f"{path}: its run started from weights of its own; this one draws them from the seed")
    method = named or (recipe.method if recipe else None)
    preset = find_preset(preset_name, method) if preset_name is not None else None
    method = preset.method if preset else method
    command = f"codistill train {method or 'mfef'}"
    values = (preset_config(preset) if preset else default_config(method or "mfef")).values()
    written = typed_mapping(recipe.mapping, recipe.where, method) if recipe else {"method": {}}
    values |= {**written, "method": values["method"] | written["method"]}
    chosen, values = parse_with_settings(options.TrainOptions, flags, command, defaults := values)
    refuse_two_sources(chosen, command)
    if not values["networks"] and values["data"] and "--networks" not in flags:
        values = with_automatic(flags, command, defaults, values, values if preset else written)

    def where(key: str) -> str:
        found, of_recipe = ({**each, **each["method"]}.get(key) for each in (values, written))
        # Not `==`: NaN is unlike itself.
        return recipe.where(key) if recipe and found is of_recipe else command

    config = run_from_mapping(values, where)
    config = completed(preset, config) if preset else config
    if "" in config.networks:
        raise UsageError("a network without a name, which only your program can build: name one with --networks")
    return chosen, skipping(config, chosen)


def with_automatic(
    flags: Sequence[str],
    command: str,
    defaults: Mapping[str, Any],
    values: Mapping[str, Any],
    written: Mapping[str, Any],
) -> dict[str, Any]:
    """Choose what is neither in flags nor written, for a run that names data but no networks; show why.

    `written` is a recipe; with a preset it is all that a run has, for that is a protocol as a whole.
    """
    flagged = keys_written(flags, defaults)
    given = {key: each for key, each in values.items() if key != "networks" and (key in written or key in flagged)}
    known = look_up(values["data"], values["data_dir"])
    choices = automatic(known, values["data"], given, values["method"]["name"])
    made = {each.key: each.value for each in choices}
    _, parsed = parse_with_settings(options.TrainOptions, flags, command, {**defaults, **made})
    parsed["data"] = made.get("data", values["data"])  # with a size, although a flag names it
    kept = tuple(each for each in choices if parsed[each.key] == each.value)
    for line in shown(known, kept):
        note(line)
    return parsed


def skipping(config: RunConfig, chosen: options.DataOptions) -> RunConfig:
    """Return a run whose data set leaves out bad images, if that was asked for."""
    skip = chosen.skip_bad and config.data
    return dataclasses.replace(config, data=with_options(config.data, skip_bad="true")) if skip else config


def refuse_two_sources(chosen: options.TrainOptions, command: str) -> None:
    """Refuse `--recipes` beside another flag that says what is trained, and two recipes that share a folder."""
    names = [path.stem for path in chosen.recipes]
    for flag, value in (("--recipe", chosen.recipe), ("--seeds", chosen.seeds), ("--preset", chosen.preset)):
        if names and value:
            raise UsageError(f"{command}: --recipes and {flag}: give one of them only")
    for path, name in zip(chosen.recipes, names, strict=True):
        if names.count(name) > 1:
            raise UsageError(f"{command}: --recipes {path}: two runs would be in {name}: rename one of the files")
