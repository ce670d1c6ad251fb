"""A run that was interrupted: where it stopped, whether it is still the same run, and how it is taken up again."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from codistill.core.errors import CheckpointError, DataError, UsageError
from codistill.data.dataset import Dataset
from codistill.methods import Method
from codistill.runs.checkpoint import position
from codistill.runs.run import Run
from codistill.settings.config import PLACES, RunConfig
from codistill.settings.mapping import run_from_mapping
from codistill.training.prepare import Resident, prepared
from codistill.training.ranks import ALONE, Ranks
from codistill.training.trainer import Loop


class InterruptedRun:
    """A run that can go on: its settings, and what its last whole checkpoint holds.

    Args:
        run: The run.
        override: New values of settings by name.

    Raises:
        UsageError: The run is finished, its settings are not those that it was started with, or an override of one
            that belongs to the experiment.
        CheckpointError: No whole checkpoint among those that are there.
    """

    def __init__(self, run: Run, override: Mapping[str, Any]) -> None:
        self.run = run
        if run.finished:
            raise UsageError(f"run {run.path} is finished: there is nothing to resume")
        config = run.config
        self.state = run.checkpoints.load() if run.checkpoints.entries() else None
        if self.state is not None:
            began, now = self.state.get("config"), config.as_mapping()
            if not isinstance(began, dict):
                raise CheckpointError(f"{run.path}: the last checkpoint does not say what run it is of: damaged")
            changed = [key for key in now if key not in PLACES and now[key] != began.get(key)]
            if changed:
                listed = "; ".join(f"{key}: {began.get(key)!r} -> {now[key]!r}" for key in changed)
                raise UsageError(
                    f"{run.path}/config.json was changed since the run began: {listed}: put it back, or train anew"
                )
        self.config = overridden(config, override)

    @property
    def position(self) -> tuple[int, int]:
        """Completed epochs, and steps done of the one after them."""
        return position(self.state) if self.state is not None else (0, 0)

    def load_data(self) -> Dataset:
        """Load the run's data set.

        Raises:
            DataError: It is missing, or not that of the run.
        """
        data = self.run.load_data(self.config.data_dir)
        for split, found in (("train", len(data.train)), ("test", len(data.test))):
            began = self.run.record["dataset"].get(f"{split}_images")
            if found != began:
                raise DataError(
                    f"data set {self.config.data}: {found} {split} images, but {self.run.path} began with {began}"
                )
        return data

    @contextlib.contextmanager
    def taken_up(
        self,
        method: Method,
        data: Dataset,
        device: torch.device,
        show: bool,
        label: bool = False,
        ranks: Ranks = ALONE,
        resident: Resident | None = None,
        runs: int = 1,
    ) -> Iterator[Loop]:
        """Put the run on its device as its checkpoint left it; see `prepared`."""
        out, name = self.run.path, self.run.path.name if label else ""
        with prepared(method, data, self.config, out, device, show, name, self.run, ranks, resident, runs) as loop:
            if self.state is not None:
                loop.restore(self.state)
            yield loop


def overridden(config: RunConfig, override: Mapping[str, Any]) -> RunConfig:
    """Change settings that do not belong to the experiment.

    Raises:
        UsageError: One that does, or a value that it does not take.
    """
    for key in override:
        if key not in PLACES:
            raise UsageError(f"override of {key}: a run goes on as it began; only {', '.join(PLACES)} can change")
    return run_from_mapping(override, lambda key: "codistill resume --override", base=config)
