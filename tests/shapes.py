"""The checker of annotated shapes: beartype, of equal signatures once.

jaxtyping decorates a nested function at each call of the function around it. What it hands over is no code of ours but
an empty function of the same signature, so that one of equal name and signature checks the same.
"""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

known: dict[tuple[str, str, inspect.Signature], Callable[..., Any]] = {}


def checked(empty: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that raises where arguments or result are not as annotated."""
    key = (empty.__module__, empty.__qualname__, inspect.signature(empty))
    try:
        return known[key]
    except TypeError:  # a default that has no hash
        return beartype(empty)
    except KeyError:
        return known.setdefault(key, beartype(empty))
