"""Modules of the user's own, which `--import` names, and which register methods, networks and data sets."""

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codistill.core.errors import UsageError, typed_reason

FLAG = "--import"
ABOUT = f"{FLAG} MODULE or {FLAG} FILE.py, with any command and more than once, registers what is your own."
_done: list[str] = []


def split_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into what `--import` names, wherever it stands, and the rest.

    Raises:
        UsageError: It names nothing.
    """
    names, rest, waiting = [], [], iter(arguments)
    for each in waiting:
        flag, equals, name = each.partition("=")
        if flag != FLAG:
            rest.append(each)
            continue
        name = name if equals else next(waiting, "")
        if not name or name.startswith("-"):
            raise UsageError(f"{FLAG}: name a module or a .py file that registers what is your own")
        names.append(name)
    return names, rest


def import_own(name: str) -> None:
    """Import a module that Python finds from the current folder, or a .py file; once, whatever it is called.

    Raises:
        UsageError: It is not there, or raises an exception, as the registries do where a name is taken.
    """
    is_file = name.startswith(".") or name.endswith(".py") or os.sep in name
    path, where = Path(name).absolute(), f"{FLAG} {name}"
    if is_file and not path.is_file():
        raise UsageError(f"{where}: {'is a folder' if path.is_dir() else 'no such file'}: name a module or a .py file")
    loaded = [each for each in (getattr(module, "__file__", None) for module in [*sys.modules.values()]) if each]
    if not (is_file and os.path.realpath(path) in map(os.path.realpath, loaded)):
        # As Python does with the folder of a script, and of -m.
        folder = str(path.parent if is_file else Path.cwd())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            _import_file(path) if is_file else importlib.import_module(name)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:
            if isinstance(error, ModuleNotFoundError) and not is_file and f"{name}.".startswith(f"{error.name}."):
                fix = "name one that is installed or in this folder, or a file: --import ./my_networks.py"
                raise UsageError(f"{where}: no module {error.name!r} is found from {folder}: {fix}") from None
            raise UsageError(f"{where}: {_reason(error, folder)}: fix it there") from error
    recorded = str(path) if is_file else name
    if recorded not in _done:
        _done.append(recorded)


def _import_file(path: Path) -> None:
    """Import a file under its own name, or another one where that is taken."""
    name = path.stem
    with contextlib.suppress(ImportError, ValueError):
        if name in sys.modules or ((found := importlib.util.find_spec(name)) and found.origin != str(path)):
            name = f"{name} of {path.parent}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _reason(error: BaseException, folder: str) -> str:
    """Return the type and text of an exception, and the last line of files in a folder that it went through."""
    own = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(folder)]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own and not isinstance(error, SyntaxError) else ""
    return typed_reason(error, 500) + place


def own_place(error: BaseException) -> str:
    """Return the line of an imported module that an error came through, `my_module.py:12`; empty: of none."""
    files = {os.path.realpath(getattr(sys.modules.get(name), "__file__", None) or name) for name in _done}
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(each.filename).name}:{each.lineno}" for each in frames if os.path.realpath(each.filename) in files]
    return own[-1] if own else ""


def imported() -> list[str]:
    """Return what `import_own` has imported in this process: modules by name, files by absolute path."""
    return list(_done)


def import_flags() -> list[str]:
    """Return the flags with which another process imports the same."""
    return [part for name in _done for part in (FLAG, name)]


def resuming(*runs: object) -> str:
    """Return the command that resumes runs of this process, for lines that say so."""
    return " ".join(["codistill resume", *map(str, runs), *import_flags()])


def trained_with(metadata: Any) -> str:
    """Return the flags that registered what config.json or a card names, for lines that say so; nothing is imported."""
    names = metadata.get("imports") if isinstance(metadata, dict) else None
    if not isinstance(names, list) or not names:
        return f"{FLAG} MODULE"
    return " ".join(f"{FLAG} {name}"[:200] for name in names[:5])
