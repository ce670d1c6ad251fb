"""Resume interrupted runs, alone or side by side."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.core.console import note
from codistill.core.errors import CheckpointError, DataError, UsageError
from codistill.core.imports import resuming
from codistill.data.dataset import Dataset
from codistill.deploy.run import Run
from codistill.methods import Method
from codistill.runs.folder import Continued, hand_in, runs_in
from codistill.runs.metadata import weights_digest
from codistill.runs.state import TrainingState
from codistill.settings.config import MOVABLE
from codistill.settings.mapping import run_from_mapping
from codistill.training.fleet import mark_diverged, shared, side_by_side, train_in_groups, train_in_processes
from codistill.training.optim import rate_of
from codistill.training.prepare import DeviceSplits, announce, build_taught, check, set_up, teaching_of
from codistill.training.ranks import ALONE, Ranks
from codistill.training.sharing import share_cores
from codistill.training.train import fail
from codistill.training.trainer import OnEpochEnd


def resume(
    path: str | Path,
    data_dir: str | None = None,
    show: bool = True,
    override: Mapping[str, Any] | None = None,
    method: Method | None = None,
    data: Dataset | None = None,
    skip_bad: bool = False,
    epochs: int | None = None,
    on_epoch_end: OnEpochEnd | None = None,
) -> Run:
    """Resume an interrupted run from its last whole checkpoint, also one inside an epoch, or extend a finished run.

    On a CPU, and on CUDA with `deterministic`, its end is bitwise equal to that of a run without the break. A run that
    was stopped before its first checkpoint starts from the beginning.

    Args:
        path: The run folder.
        data_dir: Where the data set is now, if not where it was.
        show: Whether to print progress and the final table.
        override: New values of settings that do not belong to the experiment (data_dir, device, threads), or the
            place of the teacher now.
        method: The method with its networks, made as for the training, where names alone cannot build them: those of
            your own. It is trained in place.
        data: The data set, where it is arrays of your own.
        skip_bad: Whether a folder's images that cannot be read are left out, where the run began without any.
        epochs: Train until so many epochs in all, instead of those that the run was started with. From here on it goes
            as a run of so many: schedule and ramp-up are functions of epoch / epochs. docs/training.md says it exactly.
        on_epoch_end: As in `train`.

    Raises:
        UsageError: The run is finished, or has done so many epochs; another process holds it, or its settings were
            changed.
        CheckpointError: Not a run folder, no whole checkpoint, or networks that only your program can build;
            or a teacher that is not that of the run.
        DataError: The data set is missing, or not that of the run.
    """
    return resume_together([Path(path)], data_dir, show, override, method, data, skip_bad, epochs, on_epoch_end)[0]


def resume_together(
    paths: Sequence[Path],
    data_dir: str | None = None,
    show: bool = True,
    override: Mapping[str, Any] | None = None,
    method: Method | None = None,
    data: Dataset | None = None,
    skip_bad: bool = False,
    epochs: int | None = None,
    on_epoch_end: OnEpochEnd | None = None,
) -> list[Run]:
    """Resume several runs, or folders of them: side by side where they stopped at the same step and share settings.

    One of several that diverges is marked in its summary.json; the others continue.
    """
    overrides = {**(override or {}), **({"data_dir": data_dir} if data_dir else {})}
    with Ranks.from_environment() as ranks:

        def read() -> list[InterruptedRun]:
            found = [run for path in paths for run in unfinished(path, method, data, epochs)]
            runs = list({run.path.resolve(): run for run in found}.values())  # each once
            if len(runs) > 1 and method is not None:
                raise UsageError(f"{len(runs)} runs to resume, but one method was handed in: name one run")
            if ranks.count > 1 and len(runs) > 1:
                raise UsageError(
                    f"{len(runs)} runs to resume, but under torchrun only one is: name it, or omit torchrun"
                )
            return [InterruptedRun(run, overrides, ranks, epochs) for run in runs]

        interrupted = ranks.from_leader(read)
        groups: dict[str, list[InterruptedRun]] = {}
        for each in interrupted:
            # On a CPU each may have a process of its own, at its own step.
            together = ranks.choose_device(each.config.execution).type == "cpu" or each.position
            groups.setdefault(json.dumps([together, shared(each.config)]), []).append(each)
        several = len(interrupted) > 1
        for group in groups.values():
            configs = [each.config for each in group]
            device = ranks.choose_device(configs[0].execution)
            loaded = ranks.in_turn(functools.partial(group[0].load_data, skip_bad))
            splits = DeviceSplits(loaded, device, configs[0].execution.stream)
            with ranks.together():
                for each in group:
                    each.check_data(loaded, splits.digests)
                methods = [each.build(loaded) for each in group]
            checked = functools.partial(check, data=loaded, device=device, alone=len(group) == 1, ranks=ranks)
            plans = [
                checked(method, config=each.config, begins=each.state is None)
                for method, each in zip(methods, group, strict=True)
            ]
            if ranks.leads:
                announce(plans)
            for plan, each in zip(plans, group, strict=True):
                each.check_held_out(plan.held_out)
                each.check_weights(plan.initial)
            names = [each.run.path.name if several else "" for each in group]
            for each in group if ranks.leads else ():
                each.announce()
            opening = functools.partial(set_up, ranks=ranks, splits=splits, on_epoch_end=on_epoch_end)
            openings = [
                functools.partial(opening, plan, each.run.path, show, name, each.continued)
                for plan, each, name in zip(plans, group, names, strict=True)
            ]
            processes, threads = share_cores(plans, splits)
            if processes > 1:
                train_in_processes(openings, [each.run.path for each in group], processes, threads)
                continue
            sizes = side_by_side(plans, splits)
            if device.type == "cpu":
                sizes = [len(list(same)) for _, same in itertools.groupby(group, key=lambda each: each.position)]
            train_in_groups(openings, sizes, mark_diverged if several else fail)
        # What an extension has changed is in config.json.
        return [Run(each.run.path, each.run.own_method, each.run._data) for each in interrupted]


def unfinished(
    path: Path, method: Method | None = None, data: Dataset | None = None, epochs: int | None = None
) -> list[Run]:
    """Find the run in a folder, or those of its folders that neither are finished nor have diverged.

    With a number of epochs, those that are finished, too.
    """
    inner = runs_in(path)
    if not inner:
        return [Run(path, method, data)]
    runs = [Run(each, method, data) for each in inner]
    left = [run for run in runs if run.status != "diverged" and (epochs is not None or not run.finished)]
    if not left:
        raise UsageError(f"all {len(runs)} runs in {path} are finished or diverged: there is nothing to resume")
    return left


class InterruptedRun:
    """A run to resume, with settings that are overridden by name, and its last whole checkpoint."""

    def __init__(self, run: Run, override: Mapping[str, Any], ranks: Ranks = ALONE, epochs: int | None = None) -> None:
        self.run = run
        if run.metadata.get("own_loop"):
            raise UsageError(f"{run.path} was trained by a loop of your own: start a new run from it with --init")
        if run.finished and epochs is None:
            raise UsageError(f"run {run.path} is finished: there is nothing to resume; --epochs N extends it")
        began = run.metadata["environment"].get("ranks", 1)
        if began != ranks.count:
            how = "without torchrun" if began == 1 else f"with torchrun on {began} processes"
            raise UsageError(
                f"{run.path} began on {began} ranks, and batch statistics are those of a rank: resume it {how}"
            )
        config = run.config
        self.continued = Continued.read(run)
        if self.state is not None:
            began, now = self.state.config, config.as_mapping()
            earlier = [each["epochs"] for each in run.extensions]  # the checkpoint may be older than an extension
            changed = [key for key in now if key not in MOVABLE and now[key] != began.get(key, now[key])]
            changed = [key for key in changed if key != "epochs" or began[key] not in earlier]
            if changed:
                listed = "; ".join(f"{key}: {began.get(key)!r} -> {now[key]!r}" for key in changed)
                raise UsageError(
                    f"{run.path}/config.json was changed since the run began: {listed}: put it back, or start a new run"
                )
        for key in override:
            if key not in MOVABLE:
                raise UsageError(
                    f"override of {key}: it belongs to the experiment; only {', '.join(MOVABLE)} can change"
                )
        # Bits depend on the number of threads.
        on_cpu = str(run.metadata["environment"].get("device")).endswith(" CPU")
        recorded = run.metadata["environment"].get("threads")
        if config.execution.threads is None and on_cpu and ranks.count == 1 and type(recorded) is int:
            config = run_from_mapping({"threads": recorded}, lambda key: f"{run.path}/config.json", base=config)
        self.config = run_from_mapping(override, lambda key: "codistill resume --override", base=config)
        if run.finished or epochs not in (None, config.train.epochs):
            self._extend(epochs or 0)

    def _extend(self, epochs: int) -> None:
        """Change the number of epochs."""
        run, before = self.run, self.config.train.epochs
        done, steps = self.position
        if epochs <= done:
            raise UsageError(f"{run.path} has done {done} epochs: --epochs {epochs} is not more: name a larger number")
        self.config = run_from_mapping({"epochs": epochs}, lambda key: "codistill resume --epochs", base=self.config)
        entry = {"epochs": before, "after_epoch": done, "after_step": steps}
        extended = {**run.metadata, "epochs": epochs, "extended": [*run.extensions, entry]}
        self.continued = dataclasses.replace(self.continued, extended=extended)

    def announce(self) -> None:
        """Say what an extension changes."""
        if self.continued.extended is None:
            return
        done, now = self.position[0], self.config.train
        before = self.continued.extended["extended"][-1]["epochs"]
        note(
            f"{self.run.path}: {now.epochs} epochs instead of {before}, of which {done} are done: it goes on as a "
            f"run of {now.epochs}, from {100 * done / now.epochs:.0f} %: learning rate {rate_of(now, done):.3g}"
        )

    @property
    def state(self) -> TrainingState | None:
        """The checkpoint that it goes on from; None: it begins again."""
        return self.continued.state

    @property
    def position(self) -> tuple[int, int]:
        """Completed epochs, and steps done of the one after them."""
        return self.state.position if self.state is not None else (0, 0)

    def load_data(self, skip_bad: bool = False) -> Dataset:
        """Load the data set, or return that which was handed in."""
        return self.run.load_data(self.config.data_dir, skip_bad)

    def check_data(self, data: Dataset, digests: Mapping[str, str]) -> None:
        """Raise `DataError` where data are not those that the run began with; say what differs."""
        self.run.check_classes(data)
        facts, where = self.run.metadata["dataset"], f"but {self.run.path} began with"
        for split in ("train", "validation", "test"):
            found, began = len(data.splits.get(split, ())), facts.get(f"{split}_images", 0)
            if found != began:
                raise DataError(f"data set {self.config.data}: {found} {split} images, {where} {began}")
        differ = [name for name, digest in digests.items() if facts.get("sha256", {}).get(name, digest) != digest]
        if differ:
            words = f"{' and '.join(differ)} have other contents (SHA-256) than those that {self.run.path} began with"
            raise DataError(f"data set {self.config.data}: {words}: restore them, or start a new run")

    def check_held_out(self, found: Mapping[str, str]) -> None:
        """Raise `DataError` where other training images are held out than when the run began, as in older versions."""
        began = self.run.metadata["dataset"].get("sha256", {})
        if any(began.get(name) != digest for name, digest in found.items()):
            words = "holds out other validation images than this version: resume it with its own, or start a new run"
            raise DataError(f"{self.run.path}: {words}")

    def check_weights(self, initial: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` where a run without a checkpoint would start from others than it began with."""
        began = self.run.metadata.get("initial_weights", initial)
        if self.state is None and initial["sha256"] != began["sha256"]:
            fix = "start a new run" if began["from_recipe"] else f"{hand_in('method', self.run.metadata)}, with them"
            raise CheckpointError(
                f"{self.run.path} has no checkpoint yet, and its initial weights are not those that are here "
                f"(SHA-256 {str(began['sha256'])[:12]}.. instead of {initial['sha256'][:12]}..): {fix}"
            )

    def build(self, data: Dataset) -> Method:
        """Build the method, or take that which was handed in, with the teacher that the run began with.

        Raises:
            CheckpointError: Only the user's program can build it, or the teacher is missing or another one.
        """
        run, places, own = self.run, self.config.teaching.teachers, self.run.own_method
        run.refuse_unbuildable()
        began = run.metadata.get("teacher_sha256")
        one = "the one" if len(places) < 2 else "all in the order that"
        name_it = f"name {one} it began with: {resuming(run.path)} --override{' teacher=PATH' * max(1, len(places))}"
        for each in places if own is None or own.taught_by is None else ():
            if not Path(each).exists():
                raise CheckpointError(f"teacher {each}: no such run folder or file; if it has moved, {name_it}")
        if not places and own is None and began is not None:
            words = f"its teacher was attached in Python: {hand_in('method', run.metadata)}"
            raise CheckpointError(f"{run.path}: {words}; or {name_it}")
        if own is not None and own.taught_by is not None:
            now, wanted = teaching_of(own), self.config.teaching
            for name in ("teacher_weight", "teacher_temperature", "teacher_kl", "teacher_kl_weights"):
                has, began_with = getattr(now, name), getattr(wanted, name)
                if has != began_with:
                    what = f"the teacher that was handed in has {name} {has!r}"
                    raise UsageError(f"{run.path}: {what}, but the run began with {began_with!r}: attach it as then")
        method = build_taught(self.config, data, own, fresh=self.state is None)
        digest = weights_digest(method.taught_by.network) if method.taught_by else None
        if began is not None and digest != began:
            what = f"teacher {', '.join(places) or 'handed in'}: its weights are not those that {run.path} began with"
            raise CheckpointError(f"{what} (SHA-256 {str(digest)[:12]}.. instead of {str(began)[:12]}..): {name_it}")
        return method
