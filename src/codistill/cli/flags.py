"""Flags of the command line: made from the fields of dataclasses, and parsed by tyro."""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from codistill.cli.options import AUGMENTATION, FIRST
from codistill.core.errors import UsageError
from codistill.settings.removed import REMOVED

T = TypeVar("T")
TITLES = {"": "run", "train": "optimisation", "execution": "execution", "teaching": "teacher"}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag, or one argument without a flag.

    Attributes:
        key: The name of the field.
        kind: Its type.
        default: Its default; MISSING: it must be given.
        text: Its help.
        metadata: That of the field: `alias`, `metavar`, and `positional`, which is the metavar of one without a flag.
        group: The title of its group in the help; empty: the first.
        negated: Whether `--no-..` exists, if its type is bool.
    """

    key: str
    kind: Any
    default: Any = None
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    negated: bool = True

    def spellings(self) -> list[str]:
        """Return the flag as it may be written."""
        prefix, name = "--method." if self.group == "method" else "--", self.key.replace("_", "-")
        negation = [f"{prefix}no-{name}"] if self.kind is bool and self.negated else []
        alias = [self.metadata["alias"]] if "alias" in self.metadata else []
        return [] if "positional" in self.metadata else [prefix + name, *negation, *alias]


def parse(kind: type[T], arguments: Sequence[str], command: str) -> T:
    """Parse the options of a command.

    Raises:
        UsageError: An unknown flag or a value that it does not take, in one line.
    """
    return kind(**_parse(option_flags(kind), arguments, command, inspect.getdoc(kind)))


def parse_some(kind: type[T], arguments: Sequence[str], command: str) -> T:
    """Parse some of the options of a command; the others, and `--help`, are passed over.

    Raises:
        UsageError: A value that one does not take, in one line.
    """
    rest = [each for each in arguments if each not in ("-h", "--help")]
    return kind(**_parse(option_flags(kind), rest, command, refuse=False))


def parse_with_settings(
    kind: type[T], arguments: Sequence[str], command: str, defaults: Mapping[str, Any]
) -> tuple[T, dict[str, Any]]:
    """Parse the options of a command that takes the settings of a run, too.

    Args:
        kind: The command's own options.
        arguments: Flags; later ones win.
        command: For error lines: `codistill train mfef`.
        defaults: All settings of a run by key.

    Returns:
        The options, and the settings as `defaults` with the flags in their place.

    Raises:
        UsageError: An unknown flag or a value of another type, in one line.
    """
    own, name = option_flags(kind), defaults["method"]["name"]
    flags = arranged([*own, *setting_flags(defaults)], FIRST[command.split()[1]])
    values = _parse(flags, arguments, command, inspect.getdoc(kind))
    options = kind(**{flag.key: values.pop(flag.key) for flag in own})
    return options, {**values, "method": {"name": name, **values["method"]}}


def option_flags(kind: type) -> list[Flag]:
    """Return the flags of a dataclass of options."""
    texts, types = attribute_texts(kind), get_type_hints(kind)
    return [
        Flag(
            key=each.name,
            kind=types[each.name],
            default=each.default,
            text=texts.get(each.name, ""),
            metadata=each.metadata,
            group=TITLES[""],
            negated=False,
        )
        for each in dataclasses.fields(kind)
    ]


def setting_flags(defaults: Mapping[str, Any]) -> list[Flag]:
    """Return the flags of a run's settings."""
    from codistill.methods import METHODS
    from codistill.settings.config import RunConfig

    run = RunConfig()
    kinds = {type(getattr(run, part) if part else run): title for part, title in TITLES.items()}
    found = [replace(flag, group=title) for kind, title in kinds.items() for flag in option_flags(kind)]
    found = [replace(flag, default=defaults[flag.key]) for flag in found if flag.key in {*defaults} - {"method"}]
    settings = option_flags(METHODS[defaults["method"]["name"]].Settings)
    found += [replace(flag, default=defaults["method"][flag.key], group="method") for flag in settings]
    return [replace(flag, negated=True) for flag in found]


def arranged(flags: Iterable[Flag], first: Sequence[str]) -> list[Flag]:
    """Put the flags that matter first at the beginning, and those of the data in a group of their own."""
    groups = dict.fromkeys(first, "") | dict.fromkeys(AUGMENTATION, "data and augmentation")
    placed = [replace(each, group=groups.get(each.key, each.group)) for each in flags]
    return sorted(placed, key=lambda each: first.index(each.key) if not each.group else len(first))


def attribute_texts(kind: type) -> dict[str, str]:
    """Return the docstrings of a class's attributes, and of those of its bases."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        with contextlib.suppress(OSError, TypeError):  # a class without a source
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            assert isinstance(tree, ast.ClassDef)
            for statement, after in itertools.pairwise(tree.body):
                match statement, after:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = " ".join(text.split())
    return found


def unknown_option(flag: str, known: Iterable[str], command: str) -> str:
    """Return the line that a command has no such option, and which ones come close."""
    name = flag.partition("=")[0].replace("_", "-")
    key = name.lstrip("-").replace("-", "_")
    if key in REMOVED:
        return f"{command}: {name} was removed: {REMOVED[key]}"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"{command} --help lists them"
    return f"{command}: unknown option {flag}: {hint}"


def _parse(
    flags: Sequence[Flag], arguments: Sequence[str], command: str, about: str | None = None, refuse: bool = True
) -> dict[str, Any]:
    """Let tyro parse flags into values by key; those of the method are in one of their own."""
    import tyro

    groups: dict[str, list[Any]] = {}
    for flag in flags:
        groups.setdefault(flag.group, []).append(_tyro_field(flag))
    if len(groups) == 1:
        groups = {"": next(iter(groups.values()))}
    members = groups.pop("", [])
    for title, fields in groups.items():
        kind = dataclasses.make_dataclass("Group", fields, kw_only=True)
        members.append(
            (_group(title), Annotated[kind, tyro.conf.arg(name=title, help="")], field(default_factory=kind))
        )
    whole = dataclasses.make_dataclass("Options", members, kw_only=True)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Any
            parsed, unknown = tyro.cli(
                whole, args=list(arguments), prog=command, description=about or "", return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{command}: {_one_line(complaint.getvalue(), flags)}") from None
    if unknown and refuse:
        known = [name for flag in flags for name in flag.spellings()]
        raise UsageError(unknown_option(unknown[0], known, command))
    values = dict(vars(parsed))
    for title in groups:
        inner = vars(values.pop(_group(title)))
        values |= {"method": inner} if title == "method" else inner
    return values


def _group(title: str) -> str:
    return f"group_{title.replace(' ', '_')}"


def _tyro_field(flag: Flag) -> tuple[str, Any, Any]:
    import tyro

    alias, shown = flag.metadata.get("alias"), flag.metadata.get("positional") or flag.metadata.get("metavar")
    about = tyro.conf.arg(
        help=flag.text,
        metavar=None if flag.kind is bool else shown or metavar(flag.kind),
        help_behavior_hint="(required)" if flag.default is MISSING else default_text(flag.default),
        aliases=(alias,) if alias else None,
        prefix_name=flag.group == "method",
    )
    kind: Any = Annotated[flag.kind, about]
    if "positional" in flag.metadata:
        kind = tyro.conf.Positional[kind]  # type: ignore[misc]
    if flag.kind is bool and not flag.negated:
        kind = tyro.conf.FlagCreatePairsOff[kind]  # type: ignore[misc]
    return flag.key, kind, field() if flag.default is MISSING else field(default=flag.default)


def metavar(kind: Any) -> str:
    """Return what stands for a flag's value in the help."""
    if get_origin(kind) in (Union, UnionType):
        return "|".join(metavar(each) for each in get_args(kind) if each is not NoneType)
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) is tuple:
        return f"{metavar(get_args(kind)[0])} .."
    return {bool: "{True,False}", int: "N", float: "X", str: "NAME"}.get(kind, "PATH")


def default_text(value: Any) -> str:
    """Return a default for the help, numbers with three digits; empty where there is none."""
    if value in ((), ""):
        return ""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"(default: {f'{value:.3g}' if isinstance(value, float) else text})"


def _one_line(box: str, flags: Iterable[Flag]) -> str:
    """Fold what tyro found wrong, a box of several lines, into one."""
    from codistill.settings.mapping import describe

    lines = [re.sub(r"[│╭╮╰╯─]+|-{4,}", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line).partition("Argument helptext")[0].partition("For full helptext")[0]
    kinds = {name: flag.kind for flag in flags for name in flag.spellings()}
    if (wrong := re.search(r"Error parsing ([\w.-]+)[^:]*: (.*?)( Got errors|$)", text)) and wrong[1] in kinds:
        value = " ".join(re.findall(r"'(.*?)'", wrong[2]))
        return f"{wrong[1]} is {value!r}; it must be {describe(kinds[wrong[1]])}"
    if missing := re.search(r"Missing from .*?: (.*)", text):
        return f"missing: {missing[1].strip()}"
    # The box's title and its text both say it.
    return re.sub(r"^(.+?) (\1)\b", r"\2", text, flags=re.IGNORECASE).strip()
