"""Recipes, which are TOML files or the config.json of a run: read as flags, and the line of what is wrong in them."""

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codistill.errors import UsageError
from codistill.flags import mapping_arguments, parse_config, shown
from codistill.methods import METHODS
from codistill.registry import near_matches


def read_recipe(path: Path) -> tuple[str | None, list[str]]:
    """Read a TOML recipe, or a run's config.json, as the command line that it stands for.

    Args:
        path: The file.

    Returns:
        The method's name, where the file says one, and flags with their values.

    Raises:
        UsageError: Unreadable, not TOML or JSON, or with an unknown key; names the line.
    """
    mapping, text = read_table(path, "recipe")

    def where(key: str) -> str:
        return place_in_recipe(path, text, key)

    method = mapping.pop("method", {})
    key_of_name = "method" if isinstance(method, str) else "name"
    method = {"name": method} if isinstance(method, str) else method
    if not isinstance(method, dict) or not isinstance(method.get("name", ""), str):
        raise UsageError(f'{where("method")}: method must be a name, or a table with a name: [method] name = "mfef"')
    name = method.pop("name", None)
    if name is not None and name not in METHODS:
        raise UsageError(f"{where(key_of_name)}: unknown method {shown(name)}: {near_matches(name, METHODS)}")
    return name, mapping_arguments(mapping, method, name, where)


def read_table(path: Path, kind: str) -> tuple[dict[str, Any], str]:
    """Read a TOML or JSON file.

    Args:
        path: The file.
        kind: What it is, for error lines.

    Returns:
        Its contents, parsed and as text.

    Raises:
        UsageError: Unreadable, not TOML or JSON, or JSON of something else than a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
        mapping = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{kind} {path}: {error.strerror}: name a file that can be read") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{kind} {path}: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise UsageError(f"{kind} {path}: must be a table of settings")
    return mapping, text


def place_in_recipe(path: Path, text: str, key: str) -> str:
    """Say in which file and, where it can be found, in which line a key stands."""
    found = re.search(rf'^[ \t{{]*\[?"?{re.escape(key)}\b', text, flags=re.MULTILINE)
    return f"recipe {path}:{text.count(chr(10), 0, found.start()) + 1}" if found else f"recipe {path}"


def with_place(error: UsageError, path: Path, method_name: str, arguments: Sequence[str]) -> UsageError:
    """Add the line of a recipe to an error about a setting, if the recipe alone has the same one.

    Args:
        error: What was wrong with the whole command line.
        path: The recipe.
        method_name: The method.
        arguments: The flags that the recipe stands for.
    """
    found = re.match(r"(?:method\.)?(\w+) (?:is|are) ", str(error))
    try:
        parse_config(method_name, arguments)
    except UsageError as alone:
        if found and str(alone) == str(error):
            return UsageError(f"{place_in_recipe(path, path.read_text(encoding='utf-8'), found[1])}: {error}")
    return error
