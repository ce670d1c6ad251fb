"""Differences between groups of runs, paired by seed: against a reference, and of methods against their controls."""

import json
from collections.abc import Sequence
from typing import Any

from codistill.core.errors import CheckpointError
from codistill.core.files import read_json
from codistill.evaluation.metrics import AVERAGED
from codistill.evaluation.seeds import Paired, paired
from codistill.report.groups import Group, contents_of, settings_of
from codistill.report.tables import Table

PAIRED = ("pairs", "difference", "95 % interval", "paired t p", "sign test p")
"""Headings of the cells of a paired difference."""
CONTROLS = ALONE, EMA, EQUAL_COMPUTE, MATCHED = "alone", "ema", "equal-compute", "parameter-matched"
"""The controls of a sweep; the name of a control that it has added begins with its kind."""
FACTORS = "controls.json"
"""In the folder of a sweep with controls: by settings of a run and network, how long a step takes beside one alone."""


def reference_of(groups: Sequence[Group]) -> Group:
    """Return the group against which others are compared: `independent` with its usual settings, else the first."""
    plain = [each for each in groups if each.runs and method_of(each) == "independent"]
    usual = [each for each in plain if not each.name.startswith(EQUAL_COMPUTE) and not _averages(each)]
    return (usual or plain or groups)[0]


def method_of(group: Group) -> str:
    """Return the name of a group's method."""
    return str(group.runs[0].run.metadata["method"]["name"])


def against(groups: Sequence[Group], reference: Group) -> list[tuple[Group, str, Paired]]:
    """Return the paired difference to a reference of each predictor that a group and the reference have in common."""
    found = []
    for group in groups:
        for name in reference.predictors if group is not reference else ():
            if (difference := paired(group.by_seed(name), reference.by_seed(name))) is not None:
                found.append((group, name, difference))
    return found


def difference_table(groups: Sequence[Group]) -> Table | None:
    """Return the table of differences to the reference; None: there are none."""
    reference = reference_of(groups)
    found = against(groups, reference)
    if not found:
        return None
    compared = {group for group, _, _ in found}
    left = [each.name for each in groups if each not in compared and each is not reference and not each.lost]
    notes = ["Percentage points; a negative difference is a lower error. Neither test is corrected for many."]
    notes += [f"Not compared, for want of common predictors or seeds: {', '.join(left)}."] if left else []
    return Table(
        f"Differences in test error from {reference.name}, paired by seed",
        ["runs", "predictor", *PAIRED],
        [[group.name, name, *paired_cells(difference)] for group, name, difference in found],
        notes,
    )


def control_table(groups: Sequence[Group]) -> Table | None:
    """Return the table of methods beside their controls; None: no method has one.

    Of each network, it has the first student that is one.
    """
    rows = []
    for group in groups:
        if not group.runs or group.name.startswith(MATCHED) or method_of(group) == "independent":
            continue
        networks = group.runs[0].networks
        for network in dict.fromkeys(networks):
            place = networks.index(network)
            own = f"student{place}"
            learner = own if len(set(networks)) == 1 else f"{own} ({network})"
            for kind in CONTROLS:
                found = [each for each in groups if each.runs and is_control(kind, each, group, network)]
                # A network alone stands before one of several that learn independently.
                for control in sorted(found, key=lambda each: len(each.runs[0].networks))[:1]:
                    others = control.runs[0].networks
                    beside = place if others[place : place + 1] == [network] else others.index(network)
                    predictor = f"student{beside}" + AVERAGED * (kind == EMA)
                    errors = group.by_seed(own), control.by_seed(predictor)
                    difference = paired(*errors)
                    if difference is not None:
                        seeds = sorted(errors[0].keys() & errors[1].keys())
                        means = [_mean([each[seed] for seed in seeds]) for each in errors]
                        rows.append([group.name, learner, kind, *means, *paired_cells(difference)])
    if not rows:
        return None
    return Table(
        "Methods beside their controls: test error of a student after the last epoch, %",
        ["runs", "student", "control", "error", "its error", *PAIRED],
        rows,
        [
            "Differences are method - control, percentage points: a negative one is a lower error of the method.",
            "All numbers are those of the seeds that both have.",
        ],
    )


def is_control(kind: str, control: Group, group: Group, network: str) -> bool:
    """Whether a group is a control of the students of another one that are one network.

    All its settings are those of that group but for the method and its teacher, and what the kind changes.
    """
    first, method = control.runs[0], method_of(control)
    own, other = settings_of(group.runs[0].run), settings_of(first.run)
    changed = {key for key in own.keys() | other.keys() if not _aside(key) and own.get(key) != other.get(key)}
    if contents_of(group.runs[0].run) != contents_of(first.run):
        return False
    if network not in first.networks or method != (method_of(group) if kind == MATCHED else "independent"):
        return False
    if kind == EQUAL_COMPUTE:
        factor = _factor(group, network)
        return (
            factor is not None
            and changed <= {"epochs", "milestones"}
            and other["epochs"] == max(1, round(factor * own["epochs"]))
        )
    if kind == EMA:
        return changed == {"ema_decay"} and bool(other["ema_decay"])
    return not changed and (kind != MATCHED or (control.name.startswith(MATCHED) and _size(control) == _size(group)))


def _factor(group: Group, network: str) -> float | None:
    """Return how many times as long a step of the runs took as one of the network alone, as the sweep measured it."""
    run = group.runs[0].run
    own = settings_of(run) | run.metadata.get("asked", {})
    try:
        measured = {key: (json.loads(key), factor) for key, factor in read_json(run.path.parent / FACTORS).items()}
    except (CheckpointError, ValueError, AttributeError):  # of no sweep, or damaged
        return None
    for settings, factor in measured.values():
        known = settings.keys() & own.keys() - {"seed", "teacher", "weights"}
        if settings.get("control of") == network and all(settings[key] == own[key] for key in known):
            return float(factor)
    return None


def _aside(key: str) -> bool:
    """Whether a setting tells a method from its controls, or does not tell runs apart."""
    return key in ("seed", "networks", "weights") or key.startswith(("method.", "teacher"))


def _size(group: Group) -> Any:
    return group.runs[0].summary.get("parameters", {}).get("student0")


def _averages(group: Group) -> bool:
    return bool(group.runs[0].run.metadata.get("ema_decay"))


def paired_cells(found: Paired) -> list[str]:
    """Write a paired difference as the cells that `PAIRED` heads."""
    interval = "" if found.low is None or found.high is None else f"{signed(found.low)} to {signed(found.high)}"
    return [str(found.count), signed(found.mean), interval, p_value(found.t_p), p_value(found.sign_p)]


def signed(value: float) -> str:
    """Write a difference with its sign, to two places."""
    text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return "0.00" if text[1:] == "0.00" else text


def p_value(value: float | None) -> str:
    """Write a p to two figures."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.2g}"


def _mean(errors: Sequence[float]) -> str:
    return f"{sum(errors) / len(errors):.2f}"
