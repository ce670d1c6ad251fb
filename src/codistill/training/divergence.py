"""Whether a run has diverged: what is looked at, and the error that says who went wrong, where, and what is kept."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from codistill.core.errors import DivergedError
from codistill.runs.run import Run
from codistill.runs.saving import Saver
from codistill.training.finite import culprits, part_of, state_damage
from codistill.training.step import PlainStep


class DivergenceGuard:
    """Refuse numbers of a run that are none any more.

    Args:
        run: Its folder.
        step: The training step, which holds the method and watches terms and gradients.
        saver: What writes.
    """

    def __init__(self, run: Run, step: PlainStep, saver: Saver) -> None:
        self.run, self.step, self.saver = run, step, saver
        self._floating: list[str] = []

    def health(self) -> list[Tensor]:
        """Give vectors that say, once read, whether terms, gradients and the whole state are finite."""
        self._floating, damage = state_damage(self.step.method.state_dict())
        return [self.step.watch.packed(), damage]

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
        found = self.step.watch.first_bad(watched)
        shared = self.step.method.cohort.shared_stages
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
        self.saver.settle()
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
