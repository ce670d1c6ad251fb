"""What `codistill train` is given: method, preset, recipes and flags as one value."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from codistill.config import default_config
from codistill.errors import UsageError
from codistill.flags import flag_value, has_flag, mapping_arguments, parse_flags, setting_names, unknown_option
from codistill.options import TrainOptions
from codistill.presets import find_preset, preset_run, renamed
from codistill.recipe import read_recipe, with_place

TRAIN_FLAGS = ("out", "seeds", "verify_resume", "max_restarts", "recipe", "recipes", "preset")


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
