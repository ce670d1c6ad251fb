"""Which networks are interchangeable, so that students may share their stages."""

import functools
import itertools
from dataclasses import is_dataclass
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

INTERNAL = vars(nn.Module()).keys()
"""What every module has."""
PLAIN = (bool, int, float, str, tuple, type(None))
IDENTITY: Any = object.__eq__


Pairs = tuple[tuple[int, int], ...]


def alike(one: nn.Module, other: nn.Module, above: Pairs = ()) -> bool:
    """Return whether two modules are interchangeable: in structure, attributes and forms of tensors; see `same`."""

    def forms(module: nn.Module) -> list[object]:
        state = module.state_dict(keep_vars=True).values()
        return [(tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in state]

    pairs = list(itertools.zip_longest(one.modules(), other.modules()))
    if repr(one) != repr(other) or forms(one) != forms(other):
        return False
    return all(alike_alone(*pair, above) for pair in pairs)


def alike_alone(one: nn.Module, other: nn.Module, above: Pairs = ()) -> bool:
    """Return whether two modules have equal types and attributes, whatever modules and weights they hold."""
    if isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule):  # each has a type of its own
        return plain_values(one) == plain_values(other)
    return type(one) is type(other) and same(attributes(one), attributes(other), above)


def plain_values(module: nn.Module) -> dict[str, object]:
    """Return the attributes that are numbers or text, the code of a trace among them."""
    return {name: value for name, value in vars(module).items() if isinstance(value, PLAIN) and name not in INTERNAL}


def attributes(module: nn.Module) -> dict[str, object]:
    """Return what a module has beside what every module has, and the buffers that are in no state."""
    buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
    return {name: value for name, value in vars(module).items() if name not in INTERNAL} | buffers


def same(one: Any, other: Any, above: Pairs = ()) -> bool:
    """Return whether two values do the same: functions by their code, objects by what they hold; in doubt they do not.

    `above` are the pairs that have led to this one, for an object may hold itself.
    """
    if one is other or (id(one), id(other)) in above:
        return True
    if type(one) is not type(other):
        return False
    above = (*above, (id(one), id(other)))
    inner = functools.partial(same, above=above)
    match one:
        case Tensor():
            forms = [(each.shape, each.dtype, each.device) for each in (one, other)]
            computed = one.is_meta or not (one.is_leaf or other.is_leaf)  # the latter in a pass, and kept
            return forms[0] == forms[1] and (computed or torch.equal(one, other))
        case np.ndarray():
            return np.array_equal(one, other)
        case nn.Module():
            return alike(one, other, above)
        case dict():
            return one.keys() == other.keys() and all(inner(one[key], other[key]) for key in one)
        case list() | tuple():
            return len(one) == len(other) and all(map(inner, one, other))
        case functools.partial():
            return inner([one.func, one.args, one.keywords], [other.func, other.args, other.keywords])
        case FunctionType():
            return one.__code__ == other.__code__ and inner(bound(one), bound(other))
        case MethodType():
            return inner(one.__func__, other.__func__)
    if hasattr(one, "__dict__") and (is_dataclass(one) or type(one).__eq__ is IDENTITY):
        return not isinstance(one, type) and inner(vars(one), vars(other))
    return bool(one == other)


def bound(function: FunctionType) -> list[object]:
    """Return the values that a function has from where it was defined."""
    cells = [each.cell_contents for each in function.__closure__ or ()]
    return [function.__defaults__, function.__kwdefaults__, cells]
