"""A progress bar where somebody is watching: on standard error, if that is a terminal."""

from collections.abc import Iterable
from typing import TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None) -> Iterable[T]:
    """Go through items and show how far that is; the bar vanishes at the end.

    Args:
        items: Anything that takes long.
        what: What is being done, for the bar.
        total: How many items there are, if that is known.

    Returns:
        The items.
    """
    console = Console(stderr=True)
    quiet = not console.is_terminal
    return rich.progress.track(items, what, total=total, console=console, transient=True, disable=quiet)
