"""Runs that differ in the seed only as one group, and the settings in which groups differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.core.errors import CodistillError
from codistill.evaluation.predictions import students_among
from codistill.runs.choice import ERRORS, evaluated, lowest_student
from codistill.runs.folder import RunFolder
from codistill.runs.metadata import HELD_OUT
from codistill.settings.config import MOVABLE, PLACES
from codistill.settings.mapping import RECORDED_KEYS

DATA = "data_dir"
FACTS = tuple(key for key in RECORDED_KEYS if key not in ("extended", "own_loop"))
"""Keys of config.json that do not tell runs apart: a run that was extended, or trained by another loop, is another."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What the folder of a run tells.

    Attributes:
        run: The folder.
        summary: summary.json; empty where there is none.
        rows: metrics.jsonl, a line an epoch; none where no epoch has been finished.
    """

    run: RunFolder
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.get("status") == "finished"

    @property
    def ending(self) -> str:
        """How a run ended that is not finished, with its reason if it left one."""
        ended = str(self.summary.get("status", "not finished"))
        return ": ".join(filter(None, (ended, str(self.summary.get("error", "")))))

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.run.metadata.get("seed", 0))

    @property
    def scored(self) -> list[Mapping[str, Any]]:
        """The lines of epochs that ended with an evaluation."""
        return evaluated(self.rows)

    @property
    def last(self) -> Mapping[str, Any] | None:
        """The last of these lines; None: nothing has been evaluated yet."""
        return self.scored[-1] if self.scored else None

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The line of the best epoch."""
        epoch = self.summary.get("best_epoch")  # which leaves out an initialisation
        found = [row for row in self.scored if row["epoch"] + 1 == epoch]
        return found[0] if found else min(self.scored, key=lambda row: lowest_student(row)[1], default=None)

    @property
    def splits(self) -> list[str]:
        """The splits that are evaluated: validation (if images were held out) and test."""
        return [split for split in ERRORS if self.last is not None and split in self.last]

    @property
    def predictors(self) -> list[str]:
        """Names of the predictors, students first."""
        return list(self.last["test"]) if self.last else []

    @property
    def students(self) -> list[str]:
        """Names of the students, see `students_among`."""
        return students_among(self.predictors)

    @property
    def networks(self) -> list[str]:
        """The students' networks."""
        return list(self.summary.get("networks") or self.run.metadata["networks"])

    def images(self, split: str) -> int:
        """Return the number of images of a split; 0: it is not known."""
        facts = self.run.metadata["dataset"]
        return int(self.summary.get(f"{split}_images") or facts.get(f"{split}_images") or 0)


@dataclass(frozen=True)
class Lost:
    """A run that has not come to its end: the name of its folder, and why; empty: it has not begun."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with the same settings but for the seed.

    Attributes:
        name: What tells them from other groups.
        colour: CSS class of their lines.
        runs: Those that have begun.
        lost: Those that have not come to their end; they may be among `runs`.
        dash: Pattern of their lines, as that of `Line`.
    """

    name: str
    colour: str
    runs: Sequence[Seen]
    lost: Sequence[Lost] = ()
    dash: str = ""

    @property
    def finished(self) -> list[Seen]:
        """The runs that came to their end."""
        return [each for each in self.runs if each.finished]

    @property
    def drawn(self) -> Sequence[Seen]:
        """The runs of which curves are drawn: those that came to their end; where there are none, all."""
        return self.finished or self.runs

    @property
    def predictors(self) -> list[str]:
        """Names of the predictors of its finished runs."""
        return list(dict.fromkeys(name for each in self.finished for name in each.predictors))

    def errors(self, predictor: str) -> list[float]:
        """Return the test errors of a predictor after the last epoch, percent, of each run that has it.

        None where a run of the group has not come to its end: those that have are no fair sample of all.
        """
        if self.lost:
            return []
        lasts = [each.last["test"] for each in self.finished if each.last]
        return [float(last[predictor]["top1_error"]) for last in lasts if predictor in last]

    def by_seed(self, predictor: str) -> dict[int, float]:
        """Return these errors by seed; none where two runs have one seed, or a run lacks the predictor."""
        seeds, errors = [each.seed for each in self.finished], self.errors(predictor)
        return dict(zip(seeds, errors, strict=True)) if len(set(seeds)) == len(errors) == len(seeds) else {}


def seen_in(run: RunFolder, summary: Mapping[str, Any] | None = None) -> Seen:
    """Return what a folder tells, without rows where no epoch has been finished.

    Args:
        run: The run.
        summary: That of a run whose file is not written yet.
    """
    if summary is None:
        summary = run.summary if run.status is not None else {}
    return Seen(run, summary, run.metrics() if (run.path / "metrics.jsonl").exists() else [])


def settings_of(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run by dotted key, flat: those that may affect its results, and the seed."""
    found: dict[str, Any] = {}
    for key, value in run.metadata.items():
        if key in FACTS or key in PLACES:
            continue
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            found[key] = value
    return found


def contents_of(run: RunFolder) -> dict[str, str]:
    """Return the SHA-256 of a run's images and labels, whatever the place of its data; those of older runs are none."""
    digests = run.metadata["dataset"].get("sha256", {})
    return {key: each for key, each in digests.items() if key != HELD_OUT}  # which are drawn by the seed


def compared(run: RunFolder, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Return `settings_of` a run without its seed; in place of data, a teacher or weights of another run what is there.

    So runs that differ in the seed alone are alike where each has a teacher of its own seed, too, and runs on other
    images are not. `above` are the folders that have led to this one: a run that was moved to the place of its teacher
    is not its own.
    """
    above = (*above, run.path.resolve())

    def origin(place: Any) -> Any:
        if isinstance(place, (list, tuple)):
            return [origin(each) for each in place]
        folder = Path(str(place).split("=", 1)[-1])
        if not place or folder.resolve() in above:
            return place
        try:
            return compared(RunFolder(folder), above)
        except CodistillError:  # a file, or a run that is gone
            return place

    found = {key: origin(value) if key in MOVABLE else value for key, value in settings_of(run).items()}
    return {key: value for key, value in found.items() if key != "seed"} | {DATA: contents_of(run)}


def placed(run: RunFolder) -> dict[str, Any]:
    """Return `settings_of` a run and, for a person, the last part of the place of its data."""
    place = run.metadata.get("data_dir")
    return settings_of(run) | {DATA: Path(place).name if place else str(run.metadata["dataset"]["name"])}


def text_of(value: Any) -> str:
    """Write the value of a setting as a person would."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text_of, value)) or "none"
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def differing(runs: Sequence[RunFolder]) -> list[str]:
    """Return the keys of settings, see `compared`, of which the runs have more than one value; absent is a value."""
    settings = [compared(run) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]


def told(keys: Sequence[str]) -> list[str]:
    """Return the keys by which a person tells runs apart: the place of data says nothing beside the name."""
    return [key for key in keys if key != DATA or "data" not in keys]


def grouped(seen: Sequence[Seen]) -> list[Group]:
    """Return the groups of runs in order of their first run, named by what tells them apart."""
    keys = differing([each.run for each in seen])
    # Two methods differ in settings that only one of them has; their names say it.
    telling = [key for key in told(keys) if not key.startswith("method.") or key == "method.name"] or keys
    members: dict[str, list[Seen]] = {}
    for each in seen:
        values = compared(each.run)
        members.setdefault(repr([values.get(key) for key in keys]), []).append(each)

    def name(each: Seen, chosen: Sequence[str]) -> str:
        values = placed(each.run)
        plain = ("method.name", "networks", "data")
        words = [text_of(values.get(key)) if key in plain else f"{key} {text_of(values.get(key))}" for key in chosen]
        return " · ".join(words) or str(each.run.metadata["method"]["name"])

    names = [name(runs[0], telling) for runs in members.values()]
    if len(set(names)) < len(names):
        names = [name(runs[0], keys) for runs in members.values()]
    return coloured(
        [
            (name, runs, [Lost(each.run.path.name, each.ending) for each in runs if not each.finished])
            for name, runs in zip(names, members.values(), strict=True)
        ]
    )


def coloured(members: Sequence[tuple[str, Sequence[Seen], Sequence[Lost]]]) -> list[Group]:
    """Return groups of a name, runs and lost runs each; their lines differ in colour, from the seventh on in dash."""
    dashes = ("", "dashed", "dotted")
    return [
        Group(name, f"c{index % 6}", runs, lost, dashes[index // 6 % 3])
        for index, (name, runs, lost) in enumerate(members)
    ]
