"""Refuse names and flags that do not exist before torch is imported, which takes seconds: by the sources alone."""

import ast
import re
import sys
from collections.abc import Sequence

from codistill.cli.flags import Flag, declared_fields, lineage, option_flags, unknown_option
from codistill.cli.options import FIRST, OPTIONS
from codistill.core.errors import UsageError
from codistill.core.registry import entry_of, registered_names, unknown_name

NAMED = {"--networks": ("network", "codistill.networks"), "--data": ("data set", "codistill.data")}
PARTS = ("RunConfig", "TrainSettings", "AugmentSettings", "ExecutionSettings", "TeacherSettings")


def refuse_early(command: str, arguments: Sequence[str]) -> None:
    """Refuse methods, networks, data sets and flags that do not exist, unless torch is loaded, as plug-ins may be."""
    if "torch" in sys.modules or {"-h", "--help"} & {*arguments}:
        return
    method, shown, flags = "mfef", f"codistill {command}", option_flags(OPTIONS[command])
    if command in FIRST:
        if arguments and not arguments[0].startswith("-"):
            method = _registered("method", "codistill.methods", arguments[0])
        elif any(each.startswith(("--recipe", "--preset")) for each in arguments):
            # They name the method.
            arguments = [each for each in arguments if not each.startswith("--method.")]
        shown, flags = f"{shown} {method}", flags + setting_flags_of_source(method)
    known = [name for flag in flags for name in flag.spellings()]
    flag = ""
    for argument in arguments:
        value = argument
        if re.match(r"-[^\d.]", argument):
            flag, _, value = argument.partition("=")
            flag = flag.replace("_", "-")
            if flag not in known:
                raise UsageError(unknown_option(argument, known, shown))
        if value and command in FIRST and flag in NAMED:
            _registered(*NAMED[flag], value.partition(":")[0])


def _registered(kind: str, package: str, name: str) -> str:
    known = registered_names(package)
    if entry_of(name, known) is None:
        raise UsageError(unknown_name(kind, name, known))
    return name


def setting_flags_of_source(method: str) -> list[Flag]:
    """Return the flags of a run's settings with a method, without importing it."""
    declared = [flag for part in PARTS for flag in declared_fields("codistill.settings.config", part).values()]
    # The parts themselves are no flags.
    flags = [flag for flag in declared if flag.kind is bool or not re.search("Settings$", ast.unparse(flag.kind))]
    path = registered_names("codistill.methods")[method]
    pattern = rf'^@METHODS\.register\("{re.escape(method)}"\)\nclass (\w+)'
    (name,) = re.findall(pattern, path.read_text("utf-8"), re.MULTILINE)
    for module, node in lineage(f"codistill.methods.{path.stem}", name):
        # The first class on the way up that names its settings.
        if found := re.search(r"^    (?:Settings = |settings: )(\w+)", ast.unparse(node), re.MULTILINE):
            flags += declared_fields(module, found[1], "method").values()
            break
    return [flag for flag in flags if flag.key != "method_name"]
