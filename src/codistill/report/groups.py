"""Runs that differ in the seed only as one group, and the settings in which groups differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codistill.runs.choice import ERRORS, evaluated, lowest_student
from codistill.runs.folder import RunFolder
from codistill.settings.config import PLACES

FACTS = ("dataset", "environment", "initial_weights", "asked", "imports", "own_method", "teacher_sha256")
"""Keys of config.json that are no settings."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What the folder of a run tells.

    Attributes:
        run: The folder.
        summary: summary.json; empty where there is none.
        rows: metrics.jsonl, a line an epoch; at least one.
    """

    run: RunFolder
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.get("status") == "finished"

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
        return min(self.scored, key=lambda row: lowest_student(row)[1], default=None)

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
        """Names of the students."""
        return [name for name in self.predictors if name.startswith("student")]

    @property
    def networks(self) -> list[str]:
        """The students' networks."""
        return list(self.summary.get("networks") or self.run.metadata["networks"])

    def images(self, split: str) -> int:
        """Return the number of images of a split; 0: it is not known."""
        facts = self.run.metadata["dataset"]
        return int(self.summary.get(f"{split}_images") or facts.get(f"{split}_images") or 0)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with the same settings but for the seed."""

    name: str
    colour: str
    runs: Sequence[Seen]

    @property
    def seeds(self) -> str:
        """The seeds, as text."""
        return ", ".join(str(each.run.metadata.get("seed")) for each in self.runs)


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


def text_of(value: Any) -> str:
    """Write the value of a setting as a person would."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text_of, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def differing(runs: Sequence[RunFolder]) -> list[str]:
    """Return the keys of settings, the seed aside, of which the runs have more than one value; absent is a value."""
    settings = [settings_of(run) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each if key != "seed")
    return [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]


def grouped(seen: Sequence[Seen]) -> list[Group]:
    """Return the groups of runs in order of their first run, named by what tells them apart."""
    keys = differing([each.run for each in seen])
    # Two methods differ in settings that only one of them has; their names say it.
    telling = [key for key in keys if not key.startswith("method.") or key == "method.name"] or keys
    members: dict[str, list[Seen]] = {}
    for each in seen:
        values = settings_of(each.run)
        members.setdefault(repr([values.get(key) for key in keys]), []).append(each)

    def name(each: Seen, chosen: Sequence[str]) -> str:
        values = settings_of(each.run)
        plain = ("method.name", "networks", "data")
        words = [text_of(values.get(key)) if key in plain else f"{key} {text_of(values.get(key))}" for key in chosen]
        return " · ".join(words) or str(each.run.metadata["method"]["name"])

    names = [name(runs[0], telling) for runs in members.values()]
    if len(set(names)) < len(names):
        names = [name(runs[0], keys) for runs in members.values()]
    return [
        Group(name, f"c{index % 6}", runs)
        for index, (name, runs) in enumerate(zip(names, members.values(), strict=True))
    ]
