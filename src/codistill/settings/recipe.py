"""Recipes: TOML files, or the config.json of a run, that hold a whole run."""

import dataclasses
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.core.errors import UsageError
from codistill.settings.mapping import split_method


@dataclass(frozen=True)
class Recipe:
    """The contents of a recipe.

    Attributes:
        path: The file.
        mapping: Settings by key, `method` among them.
        method: The method's name, where the file says one.
        text: The file as it is.
    """

    path: Path
    mapping: dict[str, Any]
    method: str | None
    text: str

    def where(self, key: str) -> str:
        """Return the place of a key: the file and, where it can be found, the line."""
        found = re.search(rf'^[ \t{{]*\[?"?{re.escape(key)}\b', self.text, flags=re.MULTILINE)
        line = f":{self.text.count(chr(10), 0, found.start()) + 1}" if found else ""
        return f"recipe {self.path}{line}"


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe, or a run's config.json.

    Raises:
        UsageError: Unreadable, not TOML or JSON, or of a method that is unknown; names the line.
    """
    mapping, text = read_table(path, "recipe")
    recipe = Recipe(path, mapping, None, text)
    return dataclasses.replace(recipe, method=split_method(mapping.get("method", {}), recipe.where)[0])


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
