"""Refuse names and flags that do not exist before torch is imported, which takes seconds: by the sources alone."""

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from codistill.cli.flags import Flag, option_flags, unknown_option
from codistill.cli.options import FIRST, OPTIONS
from codistill.core.errors import UsageError
from codistill.core.registry import registered_names, unknown_name

CLASSES = ("RunConfig", "TrainSettings", "ExecutionSettings", "TeacherSettings")


def refuse_early(command: str, arguments: Sequence[str]) -> None:
    """Check the names and flags of a command, unless torch is there already: then plug-ins of a user may be, too.

    Raises:
        UsageError: A method, network, data set or flag that does not exist.
    """
    if "torch" in sys.modules or {"-h", "--help"} & {*arguments}:
        return
    method, shown, flags = "mfef", f"codistill {command}", option_flags(OPTIONS[command])
    if command in FIRST:
        if arguments and not arguments[0].startswith("-"):
            method = _registered("method", "codistill.methods", arguments[0])
        elif any(each.startswith(("--recipe", "--preset")) for each in arguments):
            # The method is written elsewhere.
            arguments = [each for each in arguments if not each.startswith("--method.")]
        shown += f" {method}"
        flags += setting_flags_of_source(method)
    known = [name for flag in flags for name in flag.spellings()]
    current = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("-") and not re.match(r"-[\d.]", name):
            current = name.replace("_", "-")
            if current not in known:
                raise UsageError(unknown_option(argument, known, shown))
        else:
            equals, value = "=", argument
        if equals and value and command in FIRST:
            if current == "--networks":
                _registered("network", "codistill.networks", value.partition(":")[0])
            if current == "--data":
                _registered("data set", "codistill.data", value.partition(":")[0])


def _registered(kind: str, package: str, name: str) -> str:
    known = registered_names(package)
    if name not in known:
        raise UsageError(unknown_name(kind, name, known))
    return name


def setting_flags_of_source(method: str) -> list[Flag]:
    """Return the flags of a run's settings with a method, without types but bool, help and defaults."""
    flags = [flag for name in CLASSES for flag in _fields("codistill.settings.config", name)]
    path = registered_names("codistill.methods")[method]
    module = f"codistill.methods.{path.stem}"
    (name,) = re.findall(rf'@METHODS\.register\("{re.escape(method)}"\)\n+class (\w+)', path.read_text("utf-8"))
    for place, node in _lineage(module, name):
        # The first class on the way up that says which settings it has.
        found = re.findall(r"^    (?:Settings = |settings: )(\w+)", ast.unparse(node), re.MULTILINE)
        if found:
            return flags + _fields(place, found[0], "method")
    return flags


def _fields(module: str, name: str, group: str = "") -> list[Flag]:
    found = {}
    for _, node in reversed([*_lineage(module, name)]):
        for field in node.body:
            match field:
                case ast.AnnAssign(target=ast.Name(id=key)) if key not in ("method", "method_name"):
                    kind = ast.unparse(field.annotation)
                    alias = re.search(r"'alias': '(\S+)'", ast.unparse(field))
                    if not kind.startswith("ClassVar") and not kind.endswith("Settings"):
                        about = {"alias": alias[1]} if alias else {}
                        found[key] = Flag(key=key, kind=bool if kind == "bool" else None, metadata=about, group=group)
    return list(found.values())


def _lineage(module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield a class of this package and its bases, each with its module."""
    for node in _source(module).body:
        match node:
            case ast.ImportFrom(module=str(origin)) if origin.startswith("codistill.") and any(
                each.name == name for each in node.names
            ):
                yield from _lineage(origin, name)
            case ast.ClassDef() if node.name == name:
                yield module, node
                for base in node.bases:
                    yield from _lineage(module, ast.unparse(base).partition("[")[0])


@functools.cache
def _source(module: str) -> ast.Module:
    root = Path(str(importlib.util.find_spec("codistill").origin)).parent  # type: ignore[union-attr]
    path = root.joinpath(*module.split(".")[1:])
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))
