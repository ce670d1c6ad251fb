"""One small registry for all plug-ins: methods, networks and data sets."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin

from codistill.core.errors import UsageError

T = TypeVar("T")


def near_matches(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return the end of an error line: the known names that come close to a wrong one, or else what to do or all."""
    known = sorted(known)
    # Dashes that all flags begin with make none of them near; a beginning is near however long the rest is.
    bare, bodies = name.lower().lstrip("-"), {each.lower().lstrip("-"): each for each in known}
    near = difflib.get_close_matches(bare, bodies, n=3, cutoff=0.7)
    near = near or [body for body in bodies if len(bare) > 2 and re.split(r"[-_.]", body)[0] == bare][:3]
    close = [bodies[body] for body in near]
    return f"did you mean {' or '.join(close)}?" if close else otherwise or f"choose from {', '.join(known)}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the line that nothing of a kind has a name, with a hint where it is a path or several names in one."""
    names, place = re.split(r"[\s,]+", name.strip(), flags=re.ASCII), Path(name.partition("=")[2] or name)
    if kind == "network" and len(names) > 1:
        return f"unknown {kind} {name!r}: names are separated by spaces, without quotes: {' '.join(names)}"
    if kind in ("method", "data set") and os.path.exists(place):
        reader = "folder" if place.is_dir() else "table|packed"
        return f"unknown {kind} {name!r}: it is a path, of images to train on with --data {reader} --data-dir {place}"
    known = sorted(known)
    every = f"choose from {', '.join(known)}"
    own = "; your own are there with --import MODULE" if kind in ("method", "network", "data set") else ""
    return f"unknown {kind} {name!r}: {near_matches(name, known, every + own)}"


@functools.cache
def registered_names(package: str) -> dict[str, Path]:
    """Return the names that a package's modules register, each with its file, by their sources: nothing is imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or [] for path in sorted(Path(folder).glob("*.py"))]
    pattern = re.compile(r'^@[A-Z]+\.register\("([^"]+)"', re.MULTILINE)
    return {name: path for path in files for name in pattern.findall(path.read_text("utf-8"))}


def entry_of(name: str, known: Container[str]) -> str | None:
    """Return the known name that stands for one: itself or, for `timm/resnet18`, `timm/*`; None: there is none."""
    family = re.sub("/.+", "/*", name, count=1, flags=re.DOTALL)
    return name if name in known else family if family in known else None


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split `resnet20:shortcut=A,x=y` into a registered name and its options.

    Raises:
        UsageError: An item behind the colon is not key=value.
    """
    name, _, tail = spec.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{spec!r}: options are written name:key=value,key=value, not {item!r}")
        options[key] = value
    return name, options


def write_spec(name: str, options: Mapping[str, Any]) -> str:
    """Write a name and its options as `parse_spec` reads them."""
    return name + (":" if options else "") + ",".join(f"{key}={options[key]}" for key in sorted(options))


def with_options(spec: str, **options: str) -> str:
    """Return a spec with some of its options set."""
    name, written = parse_spec(spec)
    return write_spec(name, {**written, **options})


def checked_options(where: str, build: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Check options against those parameters of a plug-in that have a default, and turn text into their types.

    Where a plug-in takes any option (`**options`), text that is none of its parameters becomes what it looks like: a
    number, true, false or none.

    Raises:
        UsageError: An option that does not exist, or text that is not a value of it.
    """
    try:
        parameters = inspect.signature(build, eval_str=True).parameters.values()
    except Exception:  # an annotation that only a type checker can evaluate
        parameters = inspect.signature(build).parameters.values()
    known = {each.name: each.annotation for each in parameters if each.default is not each.empty}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for each in parameters:
        if each.name in known and (each.annotation is each.empty or isinstance(each.annotation, str)):
            known[each.name] = Any if each.default is None else type(each.default)
    for key in options:
        if key not in known and not takes_any:
            hint = near_matches(key, known) if known else "it has no options"
            raise UsageError(f"{where}: unknown option {key!r}: {hint}")
    return {key: _typed(f"{where}: option {key}", value, known.get(key, _ANY)) for key, value in options.items()}


_ANY = int | float | bool | None | str  # in the order in which they are tried
_FORMS = {bool: "true or false", int: "a whole number", float: "a number", types.NoneType: "none"}


def _typed(where: str, value: Any, annotation: Any) -> Any:
    """Turn text into a value of an annotation, or raise a UsageError."""
    choices, origin, text = get_args(annotation), get_origin(annotation), str(value)
    alias = getattr(annotation, "__value__", None) or getattr(annotation, "__supertype__", None)
    if alias or origin is Annotated:
        return _typed(where, value, alias or choices[0])
    if origin is Literal:
        for choice in choices:
            if text == str(choice):
                return choice
        raise UsageError(f"{where} is {value!r}: {near_matches(text, map(str, choices))}")
    if origin in (Union, types.UnionType):
        if type(value) in choices and type(value) is not str:
            return value
        reasons = []
        for choice in sorted(choices, key=lambda choice: (choice is not types.NoneType) + (choice is str)):
            try:
                return _typed(where, value, choice)
            except UsageError as error:
                reasons.append(str(error).removeprefix(f"{where} is {value!r}: "))
        raise UsageError(f"{where} is {value!r}: {', or '.join(reasons)}")
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if annotation is bool and text.lower() in words:
        return words[text.lower()]
    if annotation is int and re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    if annotation is float and re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", text.lower()):
        return float(text)
    if annotation is types.NoneType and text.lower() == "none":
        return None
    if annotation in _FORMS:
        raise UsageError(f"{where} is {value!r}: write {_FORMS[annotation]}")
    if annotation is Path:
        return Path(value)
    if isinstance(value, str) and annotation not in (str, Any, object):
        raise UsageError(f"{where} is {value!r}: no text for {getattr(annotation, '__name__', annotation)} is read")
    return value


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from public names to plug-ins, filled by a decorator when their modules are imported.

    An entry `timm/*` stands for all names that begin with `timm/`; it is called with the rest of the name first.

    Args:
        kind: The kind of the entries, for error lines: `method`, `network` or `data set`.
        package: The package whose modules are imported at the first look-up.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._registered: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Enter the decorated object under a public name.

        Raises:
            ValueError: The name is taken.
        """

        def enter(entry: T) -> T:
            # Not only those that are imported: names of one's own come before the first look-up.
            path = registered_names(self.package).get(name)
            if name in self._registered or (path and not getattr(entry, "__module__", "").startswith(self.package)):
                raise ValueError(f"two entries for the {self.kind} {name!r}")
            self._registered[name] = entry
            return entry

        return enter

    @functools.cached_property
    def _entries(self) -> dict[str, T]:
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        return self._registered

    def __getitem__(self, name: str) -> T:
        entry = entry_of(name, self._entries)
        if entry is None:
            raise UsageError(unknown_name(self.kind, name, self._entries))
        if entry == name:
            return self._entries[name]
        found: Any = functools.partial(cast(Any, self._entries[entry]), name.removeprefix(entry[:-1]))
        return cast(T, found)

    def find(self, spec: str, options: Mapping[str, Any] | None = None) -> tuple[str, T, dict[str, Any]]:
        """Return the name in a spec such as `resnet20:shortcut=A`, its entry, and its options with others, checked.

        Raises:
            UsageError: There is no such entry, or it takes no such option or value.
        """
        name, written = parse_spec(spec)
        entry = self[name]
        return name, entry, checked_options(f"{self.kind} {name}", cast(Any, entry), {**written, **(options or {})})

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry, or the default where there is none of this name."""
        return default if entry_of(name, self._entries) is None else self[name]

    def __contains__(self, name: object) -> bool:
        return entry_of(str(name), self._entries) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
