"""The schema of a checkpoint, its checks, and how weights get out of a module and back into it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from codistill.core.errors import CheckpointError

FORMAT = 2
KINDS = {"config": dict, "method": dict, "momentum": list, "rows": list, "epoch": int, "step": int, "best": bool}
KINDS |= {"sums": dict, "finite": dict}


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to resume, between two steps."""

    config: Mapping[str, Any]
    method: Mapping[str, Tensor]  # parameters and buffers by name, see `tensors_once`
    momentum: Sequence[Tensor]  # what the optimiser keeps, by parameter and name; empty for SGD without momentum
    rows: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl, one for each completed epoch
    step: int = 0  # steps done of the epoch after the completed ones
    best: bool = False  # whether the last completed epoch is the best so far; False within an epoch
    sums: Mapping[str, Any] = field(default_factory=dict)  # of the loss terms over these steps
    finite: Mapping[str, Any] = field(default_factory=dict)  # whether a number of these steps was NaN or infinite
    ema: Mapping[str, Tensor] = field(default_factory=dict)  # moving averages by name, of runs that have them

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return len(self.rows)

    @property
    def position(self) -> tuple[int, int]:
        """Completed epochs, and steps done of the one after them."""
        return self.epoch, self.step

    def as_mapping(self) -> dict[str, Any]:
        """Return tensors and plain types only, as they are written; rows as text, which is parsed faster."""
        rows = [json.dumps(row, allow_nan=False) for row in self.rows]
        return {**vars(self), "momentum": list(self.momentum), "rows": rows, "epoch": self.epoch, "format": FORMAT}

    @classmethod
    def from_mapping(cls, mapping: Any, where: str) -> "TrainingState":
        """Check the contents of a checkpoint, whatever they are; raise `CheckpointError`, with `where` it is."""
        if not isinstance(mapping, dict) or not isinstance(mapping.get("format"), int):
            raise CheckpointError(f"{where}: not a checkpoint of codistill")
        if mapping["format"] != FORMAT:
            raise CheckpointError(f"{where}: {other_format(mapping['format'])}")
        for name, kind in KINDS.items():
            if not isinstance(mapping.get(name), kind):
                raise CheckpointError(f"{where}: damaged: {name} is missing, or of another type")
        ema = mapping.get("ema", {})  # which older versions do not write
        averages = ema.values() if isinstance(ema, dict) else [None]
        tensors = [*mapping["method"].values(), *mapping["momentum"], *averages]
        if mapping["step"] < 0 or not all(isinstance(each, Tensor) for each in tensors):
            raise CheckpointError(f"{where}: damaged: a step below 0, or something else in place of a tensor")
        try:
            rows = [json.loads(line) for line in mapping["rows"]]
        except (ValueError, TypeError, RecursionError):
            rows = []
        if len(rows) != mapping["epoch"] or not all(isinstance(row, dict) for row in rows):
            raise CheckpointError(f"{where}: damaged: it holds no metrics of {mapping['epoch']} epochs")
        return cls(**{name: mapping[name] for name in KINDS if name != "epoch"} | {"rows": rows, "ema": ema})


def tensors_once(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module, with a tensor that several names share (a trunk) under its first name alone."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor.detach()))
    return dict(first.values())


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Load what `tensors_once` returned into a module, or raise `CheckpointError` where it does not fit exactly.

    The error line begins with `what`, and names the first tensor that does not fit with both shapes.
    """
    own = tensors_once(module)
    missing = [name for name in own if name not in weights]
    strange = [name for name in weights if name not in own]
    unlike = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong := [*unlike, *missing, *strange]:
        there, here = (
            list(tensors[wrong[0]].shape) if wrong[0] in tensors else "nothing" for tensors in (weights, own)
        )
        raise CheckpointError(
            f"{what} does not fit the networks: {wrong[0]} is {there} there and {here} here; of {len(own)} tensors, "
            f"{len(unlike)} have another shape, {len(missing)} are missing, {len(strange)} unexpected"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def other_format(number: int) -> str:
    """Return the words for a file of another format than this version writes."""
    sign, version = (">", "a newer") if number > FORMAT else ("<", "an older")
    return f"format {number} {sign} {FORMAT}: made by {version} version of codistill: use that one"
