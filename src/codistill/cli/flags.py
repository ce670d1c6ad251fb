"""Flags of the command line: made from the fields of dataclasses, and parsed by tyro."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from codistill.cli.options import DATA, FIRST
from codistill.core.errors import UsageError
from codistill.core.imports import ABOUT, FLAG
from codistill.core.registry import near_matches
from codistill.settings.removed import instead

T = TypeVar("T")
# The parts of a run's settings, and the groups of their flags in the help.
TITLES = {
    "": "run",
    "train": "optimisation",
    "augment": "data and augmentation",
    "execution": "execution",
    "teaching": "teacher",
}


@dataclass(frozen=True)
class Flag:
    """One flag, or one argument without a flag, made of a field of a dataclass and its docstring."""

    key: str
    kind: Any
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """`alias`, `metavar`, and `positional`: the metavar of an argument without a flag."""
    default: Any = None  # MISSING: it must be given
    group: str = TITLES[""]
    """The title of its group in the help; empty: the first."""
    negated: bool = True
    """Whether a bool has a flag `--no-..`, too."""

    def spellings(self) -> list[str]:
        """Return the flag as it may be written."""
        prefix, name = "--method." if self.group == "method" else "--", self.key.replace("_", "-")
        negation = [f"{prefix}no-{name}"] if self.kind is bool and self.negated else []
        alias = [self.metadata["alias"]] if "alias" in self.metadata else []
        return [] if "positional" in self.metadata else [prefix + name, *negation, *alias]


def parse(kind: type[T], arguments: Sequence[str], command: str, strict: bool = True) -> T:
    """Parse the options of a command, `codistill train mfef`; unless strict, pass over `--help` and other flags."""
    rest = [each for each in arguments if strict or each not in ("-h", "--help")]
    return kind(**_parse(option_flags(kind), rest, command, inspect.getdoc(kind), strict))


def parse_with_settings(
    kind: type[T], arguments: Sequence[str], command: str, defaults: Mapping[str, Any]
) -> tuple[T, dict[str, Any]]:
    """Parse the options of a command that takes the settings of a run, too: return both, by these default settings."""
    own, first = option_flags(kind), FIRST[command.split()[1]]
    # In the help, flags that matter first are at the beginning, and those of the data have a group of their own.
    groups = dict.fromkeys(DATA, "data and augmentation") | dict.fromkeys(first, "")
    flags = [replace(each, group=groups.get(each.key, each.group)) for each in [*own, *setting_flags(defaults)]]
    flags.sort(key=lambda each: len(first) if each.group else first.index(each.key))
    values = _parse(flags, arguments, command, inspect.getdoc(kind))
    options = kind(**{flag.key: values.pop(flag.key) for flag in own})
    return options, {**values, "method": {"name": defaults["method"]["name"], **values["method"]}}


def option_flags(kind: type) -> list[Flag]:
    """Return the flags of a dataclass of options."""
    types, declared = get_type_hints(kind), declared_fields(kind.__module__, kind.__name__)
    texts = {each.name: declared[each.name].text if each.name in declared else "" for each in dataclasses.fields(kind)}
    return [
        Flag(each.name, types[each.name], texts[each.name], each.metadata, each.default, negated=False)
        for each in dataclasses.fields(kind)
    ]


def setting_flags(defaults: Mapping[str, Any]) -> list[Flag]:
    """Return the flags of a run's settings with these defaults."""
    from codistill.methods import METHODS
    from codistill.settings.config import RunConfig

    run, found = RunConfig(), []
    for part, title in TITLES.items():
        flags = option_flags(type(getattr(run, part) if part else run))
        found += [replace(flag, default=defaults[flag.key], group=title) for flag in flags if flag.key in defaults]
    method = defaults["method"]
    own = option_flags(METHODS[method["name"]].Settings)
    found += [replace(flag, default=method[flag.key], group="method") for flag in own]
    return [replace(flag, negated=True) for flag in found if (flag.key, flag.group) != ("method", "run")]


def keys_written(arguments: Sequence[str], defaults: Mapping[str, Any]) -> set[str]:
    """Return the keys of a run's settings, the method's aside, whose flags are among some arguments."""
    written = _names_written(arguments)
    flags = [each for each in setting_flags(defaults) if each.group != "method"]
    return {each.key for each in flags if not written.isdisjoint(each.spellings())}


def _names_written(arguments: Sequence[str]) -> set[str]:
    return {each.partition("=")[0].replace("_", "-") for each in arguments}


def unknown_option(flag: str, known: Iterable[str], command: str) -> str:
    """Return the line that a command has no such option, and which ones come close."""
    name = flag.partition("=")[0].replace("_", "-")
    known = [*known, FLAG]
    if text := instead(name.lstrip("-").replace("-", "_"), known):
        return f"{command}: {name} {text}"
    return f"{command}: unknown option {flag}: {near_matches(name, known, f'{command} --help lists them')}"


@functools.cache
def declared_fields(module: str, name: str, group: str = TITLES[""]) -> Mapping[str, Flag]:
    """Return the fields of a dataclass and its bases as flags, by their sources: of the types only bool is known."""
    found: dict[str, Flag] = {}
    for _, node in reversed([*lineage(module, name)]):
        for statement, after in itertools.pairwise([*node.body, ast.Pass()]):
            match statement:
                case ast.AnnAssign(target=ast.Name(id=key), annotation=annotation):
                    # Or else that of the base whose default it changes.
                    text = found[key].text if key in found else ""
                    text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else text
                    metadata = dict(re.findall(r"'(alias)': '(\S+)'", ast.unparse(statement)))
                    kind = bool if ast.unparse(annotation) == "bool" else annotation
                    found[key] = Flag(key, kind, " ".join(text.split()), metadata, group=group)
    return found


def lineage(module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield a class and its bases, as far as they are found, each with the name of its module."""
    for node in _tree(module).body:
        match node:
            case ast.ImportFrom(module=str(origin), names=names) if any(each.name == name for each in names):
                yield from lineage(origin, name)
            case ast.ClassDef(name=found, bases=bases) if found == name:
                yield module, node
                for base in bases:
                    yield from lineage(module, ast.unparse(base).partition("[")[0])


@functools.cache
def _tree(module: str) -> ast.Module:
    path = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    with contextlib.suppress(OSError, TypeError):  # a class of a user's program may have no source
        if module in sys.modules:
            return ast.parse(inspect.getsource(sys.modules[module]))
        if module.startswith("codistill."):
            return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))
    return ast.Module([], [])


def _parse(
    flags: Sequence[Flag], arguments: Sequence[str], command: str, about: str | None, strict: bool = True
) -> dict[str, Any]:
    """Return the values of flags by key; those of the method are in one of their own."""
    import tyro

    # tyro takes 2 ms a flag: those that nobody wrote have their defaults without it, unless they are to be printed.
    written = _names_written(arguments)
    groups: dict[str, list[Flag]] = {}
    own: dict[str, Any] = {}
    method: dict[str, Any] = {}
    for flag in flags:
        (method if flag.group == "method" else own)[flag.key] = flag.default
        known = ("-h", "--help", *flag.spellings())
        if not written.isdisjoint(known) or "positional" in flag.metadata or flag.default is MISSING:
            groups.setdefault(flag.group, []).append(flag)
    top = groups.pop("" if any(not flag.group for flag in flags) else TITLES[""], [])
    members = [_tyro_field(flag) for flag in top]
    for title, inner in groups.items():
        kind: Any = dataclasses.make_dataclass("Group", [_tyro_field(flag) for flag in inner], kw_only=True)
        named = Annotated[kind, tyro.conf.arg(name=title, help="")]
        members.append((title.replace(" ", "_"), named, field(default_factory=kind)))
    whole = dataclasses.make_dataclass("Options", members, kw_only=True)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed: Any
            parsed, unknown = tyro.cli(
                whole, args=list(arguments), prog=command, description=f"{about}\n\n{ABOUT}", return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{command}: {_one_line(box.getvalue(), flags)}") from None
    if unknown and strict:
        raise UsageError(unknown_option(unknown[0], [name for flag in flags for name in flag.spellings()], command))
    for title in groups:
        (method if title == "method" else own).update(vars(getattr(parsed, title.replace(" ", "_"))))
    own |= {flag.key: getattr(parsed, flag.key) for flag in top}
    return {**own, "method": method} if method else own


def _tyro_field(flag: Flag) -> tuple[str, Any, Any]:
    import tyro

    alias, shown = flag.metadata.get("alias"), flag.metadata.get("positional") or flag.metadata.get("metavar")
    about = tyro.conf.arg(
        # What None stands for is what happens without the flag.
        help=flag.text if flag.default is not None else flag.text.replace("None: ", "Default: "),
        metavar=None if flag.kind is bool else shown or metavar(flag.kind),
        help_behavior_hint=default_text(flag),
        aliases=(alias,) if alias else None,
        prefix_name=flag.group == "method",
    )
    kind: Any = Annotated[flag.kind, about]
    if "positional" in flag.metadata:
        kind = tyro.conf.Positional[kind]  # type: ignore[misc]
    if flag.kind is bool and not flag.negated:
        kind = tyro.conf.FlagCreatePairsOff[kind]  # type: ignore[misc]
    return flag.key, kind, field(default=flag.default)


def metavar(kind: Any) -> str:
    """Return the word that stands for a value of a type in the help."""
    if get_origin(kind) in (Union, UnionType):
        return "|".join(metavar(each) for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) is tuple:
        return f"{metavar(get_args(kind)[0])} .."
    return {bool: "{True,False}", int: "N", float: "X", str: "NAME"}.get(kind, "PATH")


def default_text(flag: Flag) -> str:
    """Return the default of a flag for the help, numbers with three digits; empty where the text says it."""
    value = flag.default
    if value is MISSING:
        return "(required)"
    if value in ((), "", None) or (value is False and not flag.negated):
        return ""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"(default: {f'{value:.3g}' if isinstance(value, float) else text})"


def _one_line(box: str, flags: Iterable[Flag]) -> str:
    """Fold what tyro found wrong, a box of several lines, into one."""
    from codistill.core.kinds import describe

    text = " ".join(re.sub(r"[│╭╮╰╯─]+|-{4,}", " ", box).split())
    text = re.split("Argument helptext|For full helptext", text)[0]
    kinds = {name: flag.kind for flag in flags for name in flag.spellings()}
    if (wrong := re.search(r"Error parsing ([\w.-]+)[^:]*: (.*?)( Got errors|$)", text)) and wrong[1] in kinds:
        value = " ".join(re.findall(r"'(.*?)'", wrong[2]))
        return f"{wrong[1]} is {value!r}; it must be {describe(kinds[wrong[1]])}"
    if missing := re.search(r"Missing value for argument '(.*?)'", text):
        return f"{missing[1]}: name a value after it"
    if missing := re.search(r"Missing from .*?: (.*)", text):
        return f"missing: {missing[1].strip()}"
    # The box's title and its text both say it.
    return re.sub(r"^(.+?) (\1)\b", r"\2", text, flags=re.IGNORECASE).strip()
