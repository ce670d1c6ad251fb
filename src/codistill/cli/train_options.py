"""What `codistill train` is given: method, preset, recipes and flags as one value."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codistill.cli.flags import flag_value, has_flag, parse_flags, setting_names, unknown_option
from codistill.cli.options import TrainOptions
from codistill.core.errors import UsageError
from codistill.settings.config import default_config
from codistill.settings.mapping import run_from_mapping
from codistill.settings.presets import find_preset, preset_config, renamed
from codistill.settings.recipe import Recipe, read_recipe

TRAIN_FLAGS = ("out", "seeds", "verify_resume", "recipe", "recipes", "preset")


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
    recipe = read_recipe(path) if path else None
    written = recipe.method if recipe else None
    if named and written and named != written:
        raise UsageError(f"the recipe is for {written}, not for {named}: name one of them only")
    method, preset = named or written, None
    config = default_config(method or "mfef")
    if has_flag(rest, "--preset"):
        preset = find_preset(flag_value(rest, "--preset"), method)
        method = preset.method
        config = preset_config(preset, epochs_asked(rest, recipe))
    if recipe:
        config = run_from_mapping(recipe.mapping, recipe.where, method, config)
    method = method or "mfef"
    command = f"codistill train {method}"
    # Later ones win: the method's defaults, then the preset, the recipe, and what was written by hand.
    parsed, unknown = parse_flags(TrainOptions, rest, TrainOptions(config=config), command)
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


def epochs_asked(arguments: Sequence[str], recipe: Recipe | None) -> int | None:
    """Return the epochs that flags or else the recipe ask for, where they are a number above 0."""
    asked: Any = recipe.mapping.get("epochs") if recipe else None
    if has_flag(arguments, "--epochs"):
        asked = flag_value(arguments, "--epochs")
    return int(asked) if str(asked).isdecimal() and int(asked) > 0 else None
