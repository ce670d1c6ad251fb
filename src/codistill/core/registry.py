"""One small registry for all plug-ins: methods, networks and data sets."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from codistill.core.errors import UsageError

T = TypeVar("T")


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return the end of an error line: the known names that come close to a wrong one, or else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose from {', '.join(known)}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the line that nothing of a kind has a name."""
    return f"unknown {kind} {name!r}: {near_matches(name, known)}"


@functools.cache
def registered_names(package: str) -> dict[str, Path]:
    """Return the names that a package's modules register, each with its file, by their sources: nothing is imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or [] for path in sorted(Path(folder).glob("*.py"))]
    pattern = re.compile(r'^@[A-Z]+\.register\("([^"]+)"', re.MULTILINE)
    return {name: path for path in files for name in pattern.findall(path.read_text("utf-8"))}


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


def checked_options(where: str, build: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Check options against the keyword parameters of a plug-in, and turn text into their types.

    Args:
        where: The plug-in, for error lines.
        build: The plug-in; its parameters that have a default value are its options.
        options: Values by name, as text (from a command line) or as they are.

    Raises:
        UsageError: An option that does not exist, or text that is not a value of it.
    """
    parameters = inspect.signature(build).parameters.values()
    known = {each.name: each.annotation for each in parameters if each.default is not inspect.Parameter.empty}
    for key in options:
        if key not in known:
            hint = near_matches(key, known) if known else "it has no options"
            raise UsageError(f"{where}: unknown option {key!r}: {hint}")
    return {key: _typed(f"{where}: option {key}", value, known[key]) for key, value in options.items()}


def _typed(where: str, value: Any, annotation: Any) -> Any:
    if get_origin(annotation) is Literal and value not in get_args(annotation):
        raise UsageError(f"{where} is {value!r}: {near_matches(str(value), map(str, get_args(annotation)))}")
    if annotation not in (bool, int) or type(value) is annotation:
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if annotation is bool and str(value).lower() in words:
        return words[str(value).lower()]
    if annotation is int and re.fullmatch(r"-?[0-9]+", str(value)):
        return int(value)
    raise UsageError(f"{where} is {value!r}: write {'true or false' if annotation is bool else 'a whole number'}")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from public names to plug-ins, filled by a decorator when their modules are imported.

    Args:
        kind: The kind of the entries, for error lines: `method`, `network` or `data set`.
        package: The package whose modules are imported, once, at the first look-up.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Enter the decorated object under a public name.

        Raises:
            ValueError: The name is taken.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"two entries for the {self.kind} {name!r}")
            self._entries[name] = entry
            return entry

        return enter

    def _discover(self) -> dict[str, T]:
        if not self._discovered:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._discovered = True
        return self._entries

    def __getitem__(self, name: str) -> T:
        entries = self._discover()
        if name not in entries:
            raise UsageError(unknown_name(self.kind, name, entries))
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._discover()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._discover()))

    def __len__(self) -> int:
        return len(self._discover())
