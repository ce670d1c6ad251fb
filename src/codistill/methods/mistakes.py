"""Mistakes in a user's own method, in one line with the method, the term and the place."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from codistill.core.errors import CodistillError, UsageError, place

FORM = 'return a dict of scalar tensors such as {"ce/student0": loss}'


def is_own(kind: type) -> bool:
    """Whether a class was written by a user: those of this package are tested."""
    return not kind.__module__.startswith("codistill.")


def title(kind: type) -> str:
    """Return the public name of a method's class, or the name of a class that is not registered."""
    return f"method {vars(kind).get('name') or kind.__name__}"


def checked_terms(kind: type, terms: Any) -> dict[str, Tensor]:
    """Return the terms of a loss, or raise `UsageError` where they are not named scalars whose sum can be minimised."""
    fault = ""
    if not isinstance(terms, Mapping):
        what = "nothing" if terms is None else f"a {type(terms).__name__}"
        fault = f"losses returns {what}: {FORM}"
    elif not terms:
        fault = f"losses returns an empty dict: {FORM}"
    else:
        for name, term in terms.items():
            if not isinstance(name, str):
                fault = f"the name of a term is {name!r}: {FORM}"
            elif not isinstance(term, Tensor):
                fault = f"term {name!r} is a {type(term).__name__}, not a tensor: {FORM}"
            elif term.ndim:
                fault = (
                    f"term {name!r} has the shape {list(term.shape)}, not that of a scalar: take its mean or its sum"
                )
            elif not term.is_floating_point():
                fault = f"term {name!r} is {str(term.dtype).removeprefix('torch.')}, not a floating-point number"
            elif name == "loss" and len(terms) > 1:
                fault = "a term has the name 'loss', which is that of the sum of all: name it otherwise"
            if fault:
                break
    if fault:
        raise UsageError(f"{title(kind)}: {fault}")
    return dict(terms)


def in_order(kind: type, terms: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return terms in the order of those before, or raise `UsageError` where they have other names."""
    if tuple(terms) == names or not names:
        return terms
    if changed := sorted({*names} ^ {*terms}):
        how = "is new" if changed[0] in terms else "is missing"
        raise UsageError(
            f"{title(kind)}: term {changed[0]!r} {how}, but every step has the same terms: "
            "return each from the first step on, times 0 where it has no weight yet"
        )
    return {name: terms[name] for name in names}


def refuse_dead_terms(method: nn.Module, terms: Mapping[str, Tensor]) -> None:
    """Refuse terms of an own method, before any update, that are not finite, or from which nothing would be learnt.

    Reads values: not for a step. A constant 0, and what frozen parameters alone lead to, may have no gradient.
    """
    kind = type(method)
    frozen = not all(each.requires_grad for each in method.parameters())
    learnt = [name for name, term in terms.items() if term.requires_grad]
    for name, term in terms.items():
        if not term.isfinite():
            raise UsageError(
                f"{title(kind)}: term {name!r} is {term.item()} before any update: is there a division by 0?"
            )
        if not term.requires_grad and (not learnt or (term != 0 and not frozen)):
            raise UsageError(
                f"{title(kind)}: term {name!r} has no gradient, so that nothing is learnt from it: "
                "was it computed with detach(), .item() or no_grad()?"
            )


@contextlib.contextmanager
def blamed(kind: type, part: str) -> Iterator[None]:
    """Raise a `UsageError` that names method, part and line of the source, for whatever an own method raises within."""
    try:
        yield
    except (CodistillError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # While a graph is captured, the error tells what cannot be.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing or not is_own(kind):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{title(kind)}: {part} fails{place(error)}: {type(error).__name__}: {reason}") from error
