"""Where a training first went wrong: loss terms and gradients that are no numbers any more, found on the device."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import DivergedError
from codistill.deploy.run import Run
from codistill.methods import Method
from codistill.runs.saving import Saver

GRADIENT = "gradient of "


class NonFiniteDetector:
    """Remember, for each of some named numbers, the first step at which it was NaN or infinite; no host read.

    Args:
        device: Where the numbers lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.names: tuple[str, ...] = ()
        # Zero while all was well and NaN ever after: zero times NaN or infinity is NaN.
        self._damage = torch.zeros(0, device=device)
        self._good_steps = torch.zeros(0, dtype=torch.int32, device=device)

    def update(self, names: Sequence[str], values: Float[Tensor, " number"]) -> None:
        """Look at the numbers of a step; each step has the same names."""
        if not self.names:
            self.names = tuple(names)
            self._damage = torch.zeros(len(names), device=self._device)
            self._good_steps = torch.zeros(len(names), dtype=torch.int32, device=self._device)
        self._damage.add_(values, alpha=0)
        self._good_steps.add_(self._damage == 0)

    def packed(self) -> Float[Tensor, " number"]:
        """Give one number for each name: how many steps were well before the first bad one, or -1 if all were."""
        return torch.where(self._damage == 0, -1, self._good_steps).double()

    def first_bad(self, packed: Sequence[float]) -> tuple[int, list[str]] | None:
        """Give the first bad step, counted from 1, and the names of what was bad in it; None: all is well.

        Args:
            packed: The numbers of `packed`, on the host.
        """
        first = min((number for number in packed if number >= 0), default=None)
        if first is None:
            return None
        return int(first) + 1, [name for name, number in zip(self.names, packed, strict=True) if number == first]

    def reset(self) -> None:
        """Start anew."""
        self._damage.zero_()
        self._good_steps.zero_()

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint inside an epoch holds."""
        return {"names": list(self.names), "damage": self._damage, "good_steps": self._good_steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.names = tuple(state["names"])
        self._damage = state["damage"].to(self._device)
        self._good_steps = state["good_steps"].to(self._device)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give a scalar for each tensor that is finite if all of its elements are (the sum of their sizes)."""
    return list(torch._foreach_norm(list(tensors), 1)) if tensors else []


def state_damage(state: Mapping[str, Tensor]) -> tuple[list[str], Float[Tensor, " tensor"]]:
    """Look at a whole state, on its device: names of its floating-point tensors, and 0 for each that is finite."""
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return list(floating), torch.stack([each.float() for each in norms(list(floating.values()))]) * 0


def part_of(name: str, shared_stages: int) -> str:
    """Name the part of a method that a parameter belongs to: trunk, student1, or the method's own module."""
    student = re.search(r"cohort\.students\.(\d+)\.(?:stages\.(\d+))?", name)
    if student is None:
        return name.removeprefix("method.").partition(".")[0]
    number, stage = student.groups()
    return "the shared trunk" if stage is not None and int(stage) < shared_stages else f"student{number}"


def culprits(names: Iterable[str], shared_stages: int) -> str:
    """Say who went wrong, from the names of what was bad in one step: predictors first, or else parts by gradients."""
    terms = [name for name in names if not name.startswith(GRADIENT)]
    labelled = [name.removeprefix("ce/") for name in terms if name.startswith("ce/")]
    if terms:
        return f"{', '.join(labelled or terms)} (loss {', '.join(terms)})"
    gradients = [name.removeprefix(GRADIENT) for name in names]
    parts = dict.fromkeys(part_of(name, shared_stages) for name in gradients)
    more = f" and {len(gradients) - 1} more" if len(gradients) > 1 else ""
    return f"{', '.join(parts)} ({GRADIENT}{gradients[0]}{more})"


def parameter_names(method: nn.Module) -> dict[int, str]:
    """Give the name of each parameter by its identity; one that several students share has that of the first."""
    return {id(parameter): name for name, parameter in method.named_parameters()}


class DivergenceGuard:
    """Refuse numbers of a run that are none any more.

    Args:
        run: Its folder.
        method: What is trained.
        finite: The detector of its step.
        saver: What writes.
    """

    def __init__(self, run: Run, method: Method, finite: NonFiniteDetector, saver: Saver) -> None:
        self.run, self.method, self.finite, self.saver = run, method, finite, saver
        self._floating: list[str] = []

    def health(self) -> list[Tensor]:
        """Give vectors that say, once read, whether terms, gradients and the whole state are finite."""
        self._floating, damage = state_damage(self.method.state_dict())
        return [self.finite.packed(), damage]

    def refuse_divergence(self, epoch: int, rate: float, watched: Sequence[float], damage: Sequence[float]) -> None:
        """Stop where a term, a gradient or a tensor of the state is no number; nothing of it is saved.

        Args:
            epoch: Counted from 0.
            rate: Its learning rate.
            watched: The first vector of `health`, read.
            damage: The second one.

        Raises:
            DivergedError: Names the student or module, epoch, step and learning rate.
        """
        found = self.finite.first_bad(watched)
        shared = self.method.cohort.shared_stages
        if found is not None:
            where = f"at step {found[0]} of epoch {epoch + 1}"
            who = culprits(found[1], shared)
        else:
            bad = [name for name, number in zip(self._floating, damage, strict=True) if number != 0]
            if not bad:
                return
            where = f"in epoch {epoch + 1}"
            who = f"{', '.join(dict.fromkeys(part_of(name, shared) for name in bad))} (weights {bad[0]})"
        raise DivergedError(
            f"{who} became NaN or infinite {where} at learning rate {rate:g}: lower --learning-rate; {self.kept}"
        )

    @property
    def kept(self) -> str:
        """Say what a run that diverges leaves."""
        self.saver.flush()
        kept = "keeps the last whole checkpoint" if self.run.checkpoints.entries() else "has no checkpoint yet"
        return f"{self.run.path} {kept}"

    def refuse_bad_scores(self, row: Mapping[str, Any], splits: Iterable[str]) -> None:
        """Stop where finite weights give logits that are no numbers.

        Args:
            row: What came out of an epoch.
            splits: The splits that were scored.

        Raises:
            DivergedError: Names predictors, epoch and learning rate.
        """
        for split in splits:
            bad = [name for name, each in row[split].items() if not math.isfinite(each["nll"])]
            if bad:
                raise DivergedError(
                    f"{', '.join(bad)} ({split} NLL) became NaN or infinite in epoch {row['epoch'] + 1} at learning "
                    f"rate {row['learning_rate']:g}: lower --learning-rate; {self.kept}"
                )
