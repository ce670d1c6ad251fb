"""Differences between groups of runs, paired by seed: against a reference, and of methods against their controls."""

from collections.abc import Mapping, Sequence
from typing import Any

from codistill.evaluation.metrics import AVERAGED
from codistill.evaluation.seeds import Paired, paired
from codistill.report.groups import Group, settings_of
from codistill.report.tables import Table

PAIRED = ("pairs", "difference", "95 % interval", "paired t p", "sign test p")
"""Headings of the cells of a paired difference."""
EQUAL_COMPUTE, MATCHED = "equal-compute", "parameter-matched"
CONTROLS = ("alone", "ema", EQUAL_COMPUTE, MATCHED)
"""The controls of a sweep; the group of a control begins with its kind."""


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
    notes = ["Percentage points; a negative difference is a lower error."]
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
            for kind in CONTROLS:
                found = [each for each in groups if each.runs and control_kind(each, group, network) == kind]
                # A network alone stands before one of several that learn independently.
                for control in sorted(found, key=lambda each: len(each.runs[0].networks))[:1]:
                    others = control.runs[0].networks
                    beside = place if others[place : place + 1] == [network] else others.index(network)
                    predictor = f"student{beside}" + AVERAGED * (kind == "ema")
                    difference = paired(group.by_seed(own), control.by_seed(predictor))
                    if difference is not None:
                        errors = [_mean(group.errors(own)), _mean(control.errors(predictor))]
                        rows.append([group.name, f"{own} ({network})", kind, *errors, *paired_cells(difference)])
    if not rows:
        return None
    return Table(
        "Methods beside their controls: test error of a student after the last epoch, %",
        ["runs", "student", "control", "error", "of the control", *PAIRED],
        rows,
        ["Differences are method - control, percentage points: a negative one is a lower error of the method."],
    )


def control_kind(control: Group, group: Group, network: str) -> str | None:
    """Return which control of a student of a group another group is; None: it is none.

    All settings are those of the group but for the method and its teacher, and what the kind of the control changes.
    """
    own, other = (settings_of(each.runs[0].run) for each in (group, control))
    if network not in control.runs[0].networks:
        return None
    changed = {key for key in own.keys() | other.keys() if _differs(key, own, other)}
    if control.name.startswith(MATCHED):
        return MATCHED if not changed and method_of(control) == method_of(group) else None
    if method_of(control) != "independent":
        return None
    if control.name.startswith(EQUAL_COMPUTE):
        return EQUAL_COMPUTE if changed <= {"epochs", "milestones"} else None
    return "alone" if not changed else "ema" if changed == {"ema_decay"} and other["ema_decay"] else None


def _differs(key: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    aside = key in ("seed", "networks", "weights") or key.startswith(("method.", "teacher"))
    return not aside and own.get(key) != other.get(key)


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
