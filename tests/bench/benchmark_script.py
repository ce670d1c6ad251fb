"""A script of benchmarks/ as a module, and its cases in this process."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tyro

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load a script as Python does that runs it: with its folder first in the path."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def in_this_process(module: ModuleType) -> Any:
    """Stand in for `cases.in_a_process`, which takes seconds; gives what the script would print there."""

    def run(command: Sequence[str], variables: Mapping[str, str], limit: float) -> str:
        assert command[0] == module.__file__ and "TORCHINDUCTOR_CACHE_DIR" in variables and limit > 0
        with contextlib.redirect_stdout(io.StringIO()) as output:
            print("noise")
            module.main(tyro.cli(module.Options, args=command[1:]))
        return output.getvalue()

    return run


def cells(line: str) -> list[str]:
    """Divide a row of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]
