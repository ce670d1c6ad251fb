"""Find the first step with a non-finite loss term or gradient without a host read, and name who diverged."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from codistill.methods import Method

GRADIENT = "gradient of "


class NonFiniteDetector:
    """Remember, for each of some named numbers, the first step at which it was NaN or infinite; no host read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.names: tuple[str, ...] = ()
        # Zero as long as all steps were finite and NaN ever after: zero times NaN or infinity is NaN.
        self._damage, self._good_steps = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int32, device=device)

    def update(self, numbers: Mapping[str, Float[Tensor, ""]]) -> None:
        """Look at the numbers of a step; each step has the same names."""
        if not self.names:
            self.names = tuple(numbers)
            self._damage = torch.zeros(len(numbers), device=self._device)
            self._good_steps = torch.zeros(len(numbers), dtype=torch.int32, device=self._device)
        self._damage.add_(torch.stack([each.detach().float() for each in numbers.values()]), alpha=0)
        self._good_steps.add_(self._damage == 0)

    def tensors(self) -> dict[str, Float[Tensor, ""]]:
        """Return, by name, how many steps were finite before the first that was not, or -1 if all were."""
        return dict(zip(self.names, torch.where(self._damage == 0, -1, self._good_steps).unbind(), strict=True))

    @staticmethod
    def first_bad(numbers: Mapping[str, float]) -> tuple[int, list[str]] | None:
        """Return the first bad step, from 1, and the names of what was bad in it, from `tensors` on the host."""
        first = min((number for number in numbers.values() if number >= 0), default=None)
        if first is None:
            return None
        return int(first) + 1, [name for name, number in numbers.items() if number == first]

    def reset(self) -> None:
        """Forget all steps."""
        self._damage.zero_()
        self._good_steps.zero_()

    def rename(self) -> None:
        """Begin with numbers of other names."""
        self.names = ()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint inside an epoch holds."""
        return {"names": list(self.names), "damage": self._damage, "good_steps": self._good_steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.names = tuple(state["names"])
        self._damage = state["damage"].to(self._device)
        self._good_steps = state["good_steps"].to(self._device)


def norms(tensors: Mapping[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
    """Return the L1 norm of each tensor, which is finite if all of its elements are and they do not overflow."""
    return dict(zip(tensors, torch._foreach_norm(list(tensors.values()), 1), strict=True)) if tensors else {}


def part_of(name: str, shared_stages: int) -> str:
    """Return the part of a method that a parameter belongs to: trunk, student1, or the method's own module."""
    student = re.search(r"cohort\.students\.(\d+)\.(?:stages\.(\d+))?", name)
    if student is None:
        return name.removeprefix("method.").partition(".")[0]
    number, stage = student.groups()
    return "the shared trunk" if stage is not None and int(stage) < shared_stages else f"student{number}"


def culprits(names: Iterable[str], shared_stages: int) -> str:
    """Name who diverged, from the names of what was bad in one step: predictors first, or else parts by gradients."""
    terms = [name for name in names if not name.startswith(GRADIENT)]
    labelled = [name.removeprefix("ce/") for name in terms if name.startswith("ce/")]
    if terms:
        return f"{', '.join(labelled or terms)} (loss {', '.join(terms)})"
    gradients = [name.removeprefix(GRADIENT) for name in names]
    parts = dict.fromkeys(part_of(name, shared_stages) for name in gradients)
    more = f" and {len(gradients) - 1} more" if len(gradients) > 1 else ""
    return f"{', '.join(parts)} ({GRADIENT}{gradients[0]}{more})"


def infinite(method: Method) -> set[str]:
    """Return the names of buffers that hold infinity, as masks of attention do; reads values: not for a step."""
    buffers = method.named_buffers(remove_duplicate=False)
    return {name for name, each in buffers if each.is_floating_point() and bool(each.isinf().any())}


def health(
    method: Method, finite: NonFiniteDetector, masks: Collection[str] = ()
) -> dict[str, dict[str, Float[Tensor, ""]]]:
    """Return scalars that tell, once read, whether terms, gradients and state of a method, but masks, are finite."""
    floats = {name: each for name, each in method.state_dict().items() if each.is_floating_point()}
    state = {name: each for name, each in floats.items() if name not in masks}
    return {"steps": finite.tensors(), "state": norms(state)}


def divergence(numbers: Mapping[str, Mapping[str, float]], shared_stages: int, epoch: int) -> str | None:
    """Return who became NaN or infinite and where, from numbers of `health` on the host; None: all is finite."""
    found = NonFiniteDetector.first_bad(numbers["steps"])
    if found is not None:
        return f"{culprits(found[1], shared_stages)} became NaN or infinite at step {found[0]} of epoch {epoch + 1}"
    bad = [name for name, number in numbers["state"].items() if not math.isfinite(number)]
    parts = ", ".join(dict.fromkeys(part_of(name, shared_stages) for name in bad))
    return f"{parts} (weights {bad[0]}) became NaN or infinite in epoch {epoch + 1}" if bad else None


def bad_scores(row: Mapping[str, Any], split: str) -> str | None:
    """Return which predictors' scores became NaN or infinite, as `divergence` does, from a line of metrics.jsonl."""
    bad = ", ".join(name for name, each in row[split].items() if not math.isfinite(each["nll"]))
    return f"{bad} ({split} NLL) became NaN or infinite in epoch {row['epoch'] + 1}" if bad else None
