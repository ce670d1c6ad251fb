"""How weights are updated, beside what every paper states: optimiser, schedule, clipping, averages, early stopping."""

import math
from dataclasses import dataclass, field
from typing import Literal

from codistill.core.errors import UsageError

HIGHEST_ADAMW_RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Settings that change nothing by default; docs/training.md has their formulas."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd, or adamw: its first beta is the momentum, its weight decay is decoupled, and it needs a learning rate of
    about 0.001."""
    adam_beta2: float = 0.999
    """Second beta of adamw, from 0 to below 1."""
    decay_norms: bool | None = None
    """Whether weight decay also reaches biases and normalisation layers. None: with sgd, as in the papers' code; not
    with adamw."""
    schedule: Literal["step", "cosine"] = "step"
    """step: the rate falls at the milestones; cosine: along half a cosine, epoch by epoch, to min_learning_rate."""
    min_learning_rate: float = field(default=0.0, metadata={"alias": "--min-lr"})
    """Where the cosine arrives after the last epoch."""
    warm_up: int = 0
    """First epochs in which the rate rises in a straight line, step by step."""
    clip_norm: float | None = None
    """Largest L2 norm of all gradients together; longer ones are scaled down to it. None: no clipping."""
    ema_decay: float = 0.0
    """Decay of a moving average of all weights, which is evaluated and exported as student0-ema, ..; 0: none."""
    patience: int = 0
    """Stop after N evaluations in a row without a lower validation error of the best student; 0: never."""
    init: str | None = field(default=None, metadata={"moves": True, "metavar": "PATH"})
    """A run whose last weights this one starts from, matched by name; where classes are others, heads are drawn."""

    @property
    def decays_norms(self) -> bool:
        """Whether weight decay reaches biases and normalisation layers."""
        return self.optimizer == "sgd" if self.decay_norms is None else self.decay_norms

    def check_updates(self, learning_rate: float, epochs: int) -> None:
        """Raise `UsageError` for values that cannot be, or not with such a learning rate and number of epochs."""
        for name in ("adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise UsageError(f"clip_norm is {self.clip_norm}; it must be a number above 0")
        if not 0 <= self.min_learning_rate <= learning_rate:
            words = f"it must be from 0 to the learning rate, {learning_rate:g}"
            raise UsageError(f"min_learning_rate is {self.min_learning_rate}; {words}")
        if self.min_learning_rate and self.schedule != "cosine":
            raise UsageError(f"min_learning_rate is {self.min_learning_rate}, but schedule {self.schedule} has none")
        if not 0 <= self.warm_up < epochs:
            raise UsageError(f"warm_up is {self.warm_up}; it must be at least 0 and less than the epochs, {epochs}")
        if not 0 <= self.patience < 2**31:
            raise UsageError(f"patience is {self.patience}; it must be at least 0")
        if self.optimizer == "adamw" and learning_rate > HIGHEST_ADAMW_RATE:
            raise UsageError(
                f"learning_rate is {learning_rate:g}, with which adamw diverges: it needs about 0.001 "
                f"(--learning-rate 0.001), and never more than {HIGHEST_ADAMW_RATE}"
            )
