"""Recipes: TOML files, or the config.json of a run, that hold a whole run."""

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
    """The contents of a recipe: settings by key, `method` among them, and its text as it is."""

    path: Path
    mapping: dict[str, Any]
    text: str

    def where(self, key: str) -> str:
        """Return the place of a key: the file and, where it can be found, the line."""
        found = re.search(rf'^[ \t{{]*\[?"?{re.escape(key)}\b', self.text, flags=re.MULTILINE)
        line = f":{self.text.count(chr(10), 0, found.start()) + 1}" if found else ""
        return f"recipe {self.path}{line}"

    @property
    def method(self) -> str | None:
        """The method's name, if it has one; UsageError if that is unknown."""
        return split_method(self.mapping.get("method", {}), self.where)[0]


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe, or a run's config.json."""
    return Recipe(path, *read_table(path, "recipe"))


def read_table(path: Path, kind: str) -> tuple[dict[str, Any], str]:
    """Read a TOML or JSON file of a kind, for error lines, and return its table and its text.

    Raises:
        UsageError: Unreadable, not TOML or JSON, or JSON of something else than a table.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        mapping = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except IsADirectoryError:
        run = path / "config.json"
        raise UsageError(f"{kind} {path}: is a folder: name {run if run.exists() else 'a file'}") from None
    except OSError as error:
        raise UsageError(f"{kind} {path}: {error.strerror}: name a file that can be read") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{kind} {path}: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise UsageError(f"{kind} {path}: must be a table of settings")
    return mapping, text
