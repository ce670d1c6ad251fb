"""A search: runs whose settings Optuna chooses by the validation errors of those before; never by test errors."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from codistill.core.console import lasting_console
from codistill.core.errors import CodistillError, UsageError
from codistill.core.extras import refuse_missing
from codistill.core.files import system_error, write_json
from codistill.core.registry import near_matches, with_options
from codistill.evaluation.metrics import AVERAGED, own_student
from codistill.runs.folder import ANOTHER
from codistill.settings.automatic import look_up
from codistill.settings.build import build_method
from codistill.settings.config import PLACES, RunConfig
from codistill.settings.mapping import Where
from codistill.sweeps.engines.engine import ended
from codistill.sweeps.naming import canonical, digest, part
from codistill.sweeps.spec import PlannedRun, findable, flat, planned, read_settings
from codistill.sweeps.table import Row

JOURNAL, RESULT = "search.journal", "search.json"
STARTUP = 10
"""How many trials are chosen before the first that learns from others, as Optuna's TPE has it: all at once."""
BEST = "best"
WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "trials": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "sampler": ("tpe or random", lambda value: value in ("tpe", "random")),
    "seed": ("a whole number, 0 or more", lambda value: type(value) is int and value >= 0),
    "predictor": ("a name, or best", lambda value: isinstance(value, str)),
    "space": (
        "a table of the settings to search: [search.space]",
        lambda value: isinstance(value, dict) and bool(value),
    ),
}


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """What a spec says of a search.

    Attributes:
        space: By key, a list of values or a table of `low`, `high` and perhaps `log`.
        shared: The settings of all runs.
        seeds: Those of the runs of a trial.
        where: The place of a key, for error lines.
        trials: How many there will be.
        sampler: How their settings are chosen.
        seed: That of the sampler.
        predictor: By whose validation error: a name, or `best` for the student that is best by it.
    """

    space: dict[str, Any]
    shared: dict[str, Any]
    seeds: list[int]
    where: Where
    trials: int
    sampler: str = "tpe"
    seed: int = 0
    predictor: str = "student0"

    def runs(self, trial: str, settings: Mapping[str, Any]) -> list[PlannedRun]:
        """Return the runs of a trial: one for each seed."""
        names = [f"{trial}-{part('seed', seed)}" if len(self.seeds) > 1 else trial for seed in self.seeds]
        each = [{**self.shared, **settings, "seed": seed} for seed in self.seeds]
        return [findable(planned(own, name, trial, self.where)) for own, name in zip(each, names, strict=True)]

    def no_predictor(self, known: Iterable[str]) -> UsageError:
        """Return the error of a predictor that a run does not have."""
        where = self.where("predictor")
        return UsageError(f"{where}: there is no predictor {self.predictor!r}: choose from {', '.join(known)}")

    @property
    def first(self) -> dict[str, Any]:
        """The settings with the first value of each list and the low end of each range."""
        return {key: _ends(axis)[0] for key, axis in self.space.items()}

    def draft(self) -> list[PlannedRun]:
        """Return runs in place of those of all trials, with the `first` settings."""
        return [run for number in range(self.trials) for run in self.runs(_name(number), self.first)]


def read_search(path: Path, skip_bad: bool = False) -> SearchSpec | None:
    """Return the search of a spec; None: it has no `[search]`.

    Raises:
        UsageError: A key or value that it cannot have, or no validation images to choose by.
        DataError: No images are held out, and the data set, which may have some of its own, is missing or damaged.
    """
    mapping, where = read_settings(path)
    table, grid, runs = mapping.pop("search", None), mapping.pop("grid", {}), mapping.pop("runs", None)
    if table is None:
        return None
    if not isinstance(table, dict) or not table.keys() >= {"trials", "space"}:
        raise UsageError(
            f"{where('search')}: [search] needs trials, {WANTED['trials'][0]}, and space, {WANTED['space'][0]}"
        )
    for key, value in table.items():
        if key not in WANTED:
            raise UsageError(f"{where(key)}: unknown key {key!r} in [search]: {near_matches(key, WANTED)}")
        if not WANTED[key][1](value):
            raise UsageError(f"{where(key)}: {key} in [search] is {value!r}; it must be {WANTED[key][0]}")
    shared, space = {"method.name": "mfef", **flat(mapping, where)}, dict(table.pop("space"))
    if skip_bad and isinstance(shared.get("data"), str):
        shared["data"] = with_options(shared["data"], skip_bad="true")
    seeds = [shared.pop("seed", 0)] if grid == {} else grid.get("seed") if isinstance(grid, dict) else None
    if runs is not None or not isinstance(seeds, list) or not seeds or grid.keys() - {"seed"}:
        raise UsageError(f"{where('search')}: beside [search], [grid] may have a list of seeds alone, and no [[runs]]")
    if isinstance(space.get("method"), dict):  # written method.temperature = [2, 3], without quotes
        space |= {f"method.{key}": each for key, each in space.pop("method").items()}
    for key, axis in space.items():
        if key in ("seed", "validation") or key in shared.keys() - {"method.name"}:
            raise UsageError(f"{where(key)}: {key} cannot be in [search.space]: it is that of all trials")
        if not _possible(axis):
            form = (
                f"a list of values, or a range: {key} = {{ low = 0.01, high = 0.2, log = true }}, low above 0 for log"
            )
            raise UsageError(f"{where(key)}: {key} in [search.space] must be {form}")
    search = SearchSpec(space=space, shared=shared, seeds=seeds, where=where, **table)
    own_validation = functools.cache(lambda data, place: look_up(data, place).validation)
    for key, axis in space.items():
        for run in (run for value in _ends(axis) for run in search.runs("trial", {**search.first, key: value})):
            if run.config is None:
                raise UsageError(f"{where(key)}: {run.problem}")
            if not run.config.train.validation and not own_validation(run.config.data, run.config.data_dir):
                held_out = "hold out training images with validation = 1000"
                raise UsageError(f"{where('search')}: a search chooses by validation errors: {held_out}")
            if search.predictor not in (known := _predictors(run.config, search.predictor)):
                raise search.no_predictor(known)
    return search


def _predictors(config: RunConfig, wanted: str) -> list[str]:
    """Return the predictors of a run that a search can choose by; `wanted` alone where it cannot be built here."""
    known = [BEST, *(f"student{index}" for index in range(len(config.networks)))]
    if wanted in known:
        return known
    try:  # names depend neither on classes nor on the size of images
        known = [*build_method(config, 2, (32, 32)).predictors()]
    except CodistillError:
        return [wanted]
    return [BEST, *known, *(name + AVERAGED for name in known if config.train.ema_decay)]


def _possible(axis: Any) -> bool:
    """Whether a setting is searched in a list of values, or in a range."""
    if not isinstance(axis, dict):
        return isinstance(axis, list) and bool(axis)
    ends: list[Any] = [axis.get("low"), axis.get("high")]
    numbers = all(type(each) in (int, float) and math.isfinite(each) for each in ends)
    log = axis.get("log", False)
    known = axis.keys() <= {"low", "high", "log"} and type(log) is bool
    return numbers and known and ends[0] < ends[1] and (not log or ends[0] > 0)


def _ends(axis: Any) -> list[Any]:
    return axis if isinstance(axis, list) else [axis["low"], axis["high"]]


class Search:
    """The trials of a search in a folder that this process holds, as Optuna's journal there has them."""

    def __init__(self, spec: SearchSpec, folder: Path, show: bool) -> None:
        refuse_missing(spec.where("search"), "optuna")
        self.spec, self.folder, self.console = spec, folder, lasting_console(show)
        self.names: dict[int, list[str]] = {}  # of the runs of each trial
        self.first: dict[str, int] = {}  # trial with such runs, by their digest
        self.held = contextlib.ExitStack()

    def begin(self) -> list[PlannedRun]:
        """Hold the journal; return the runs of all trials so far, the first ones among them, which learn from no other.

        Raises:
            UsageError: Another process searches there, or the folder is that of a search with other settings.
        """
        import optuna
        from optuna.storages.journal import JournalFileBackend

        journal, self.states = self.folder / JOURNAL, optuna.trial.TrialState
        if not journal.exists() and any(self.folder.glob("*/config.json")):
            raise UsageError(f"sweep folder {self.folder} holds runs that are no trials of a search: {ANOTHER}")
        self.held.enter_context(_locked(journal))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
            self.study = optuna.create_study(storage=storage, study_name="search", load_if_exists=True)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{journal}: damaged ({' '.join(str(error).split())}): {ANOTHER}") from None
        self._refuse_another(journal)
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.params.keys() == self.spec.space.keys():
                reason = self.study.user_attrs.get(_name(trial.number), "")
                for run in self._runs(trial):  # what a failed trial lacks is not tried again
                    lost = "" if ended(self.folder / run.name) else reason
                    found.append(dataclasses.replace(run, problem=lost or run.problem))
            elif trial.state == self.states.RUNNING:  # the process was killed while it chose
                self.study.tell(trial.number, state=self.states.FAIL)
        if len(self.names) > self.spec.trials:
            self.say(f"{len(self.names)} trials are there already, more than trials = {self.spec.trials}")
        while len(self.names) < min(STARTUP, self.spec.trials):
            found += self._ask()
        return found

    def close(self) -> None:
        """Leave the folder to another process."""
        self.held.close()

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, soft_wrap=True)

    def more(self, rows: Mapping[str, Row]) -> list[PlannedRun]:
        """Tell Optuna how trials have ended, and return the runs of a new one; none where no other is wanted."""
        self._tell(rows)
        while len(self.names) < self.spec.trials:
            if runs := self._ask():
                return runs
            self._tell(rows)  # it is as an earlier one, which may have ended
        return []

    def result(self, rows: Mapping[str, Row]) -> str:
        """Write `search.json`, and return in words which trial is the best."""
        trials: list[dict[str, Any]] = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number in self.names:
                runs, finished = [rows[name] for name in self.names[trial.number]], trial.value is not None
                test = statistics.fmean(row.top1_error[self._predictor(row)] for row in runs) if finished else None
                own: dict[str, Any] = {"trial": _name(trial.number), "status": trial.state.name.lower()}
                own |= {"runs": self.names[trial.number], "settings": self._settings(trial)}
                trials.append({**own, "validation_error": trial.value, "test_error": test})
        ended = [each for each in trials if each["validation_error"] is not None]
        best = min(ended, key=lambda each: each["validation_error"], default=None)
        name = best["trial"] if best else None
        write_json(self.folder / RESULT, {"predictor": self.spec.predictor, "best": name, "trials": trials})
        if best is None:
            return f"none of {len(trials)} trials has finished"
        seeds = f" (mean of {len(self.spec.seeds)} seeds)" if len(self.spec.seeds) > 1 else ""
        return (
            f"best of {len(ended)} trials that finished, of {len(trials)}: {name}: {_words(best['settings'])}\n"
            f"validation error of {self.spec.predictor} {best['validation_error']:.2f} %{seeds}; its test error, by "
            f"which nothing was chosen: {best['test_error']:.2f} %"
        )

    def _refuse_another(self, journal: Path) -> None:
        """Raise `UsageError` where the journal is of a search with another space or other settings."""
        own = {key: value for key, value in vars(self.spec).items() if key not in ("shared", "where", "trials")}
        shared = {key: value for key, value in self.spec.shared.items() if key not in PLACES}
        asked = {key: canonical({"": value}) for key, value in {**shared, **own}.items()}
        began = self.study.user_attrs.get("asked", asked)
        if changed := [key for key in sorted({*asked, *began}) if asked.get(key) != began.get(key)]:
            raise UsageError(f"{journal} is of a search with other settings ({', '.join(changed)}): {ANOTHER}")
        self.study.set_user_attr("asked", asked)

    def _ask(self) -> list[PlannedRun]:
        """Have the settings of a new trial chosen, and return its runs; none where they are those of an earlier one."""
        from optuna import samplers

        # They follow from the seed and the trials before alone, so that a search that resumes goes the same way.
        numbers = np.random.SeedSequence([self.spec.seed, len(self.study.get_trials(deepcopy=False))])
        seed = int(numbers.generate_state(1)[0])
        if self.spec.sampler == "tpe":
            self.study.sampler = samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=True)
        else:
            self.study.sampler = samplers.RandomSampler(seed=seed)
        trial = self.study.ask({key: _distribution(axis) for key, axis in self.spec.space.items()})
        runs = self._runs(trial)
        known = "" if runs else f": as {self.names[trial.number][0]}"
        self.say(f"{_name(trial.number)}: {_words(self._settings(trial))}{known}")
        return runs

    def _runs(self, trial: Any) -> list[PlannedRun]:
        runs = self.spec.runs(_name(trial.number), self._settings(trial))
        key = digest(runs[0].config) if runs[0].config else _name(trial.number)
        first = self.first.setdefault(key, trial.number)
        self.names[trial.number] = self.names.get(first, [run.name for run in runs])
        return runs if first == trial.number else []

    def _settings(self, trial: Any) -> dict[str, Any]:
        space, params = self.spec.space, trial.params
        return {key: json.loads(params[key]) if isinstance(space[key], list) else params[key] for key in space}

    def _tell(self, rows: Mapping[str, Row]) -> None:
        for trial in self.study.get_trials(deepcopy=False, states=[self.states.RUNNING]):
            runs, name = [rows[each] for each in self.names[trial.number]], _name(trial.number)
            reasons = [row.reason for row in runs if row.status == "FAILED"]
            if any(row.status == "unfinished" for row in runs):
                continue
            if reasons:
                self.study.set_user_attr(name, reasons[0])
                self.study.tell(trial.number, state=self.states.FAIL)
                self.say(f"{name}: failed: {reasons[0]}")
            else:
                error = statistics.fmean(row.validation_top1_error[self._predictor(row)] for row in runs)
                self.study.tell(trial.number, error)
                self.say(f"{name}: validation error of {self.spec.predictor} {error:.2f} %")

    def _predictor(self, row: Row) -> str:
        """Return whose errors count of a run."""
        errors, name = row.validation_top1_error, self.spec.predictor
        if name == BEST:
            return min(filter(own_student, errors), key=lambda each: errors[each])
        if name not in errors:
            raise self.spec.no_predictor([BEST, *errors])
        return name


def _locked(journal: Path) -> IO[bytes]:
    """Return a journal, locked for this process, without what a process that was killed has left half done."""
    try:
        file = open(journal, "a+b")  # noqa: SIM115
    except OSError as error:
        raise system_error(error, journal, fix=ANOTHER) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(f"another process searches in {journal.parent}: wait for it, or {ANOTHER}") from None
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)  # Optuna's own
    return file


def _distribution(axis: Any) -> Any:
    from optuna import distributions

    if isinstance(axis, list):
        return distributions.CategoricalDistribution([json.dumps(each) for each in axis])
    low, high, log = axis["low"], axis["high"], axis.get("log", False)
    whole = isinstance(low, int) and isinstance(high, int)
    return (distributions.IntDistribution if whole else distributions.FloatDistribution)(low, high, log)


def _name(number: int) -> str:
    return f"trial-{number:04d}"


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {each:.4g}" if isinstance(each, float) else f"{key} {each}" for key, each in settings.items()
    )
