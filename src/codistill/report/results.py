"""What a comparison says in tables: errors over seeds and paired differences, to read, for a paper and as numbers."""

from collections.abc import Sequence

from codistill.evaluation.seeds import summarise
from codistill.report.differences import against, control_table, difference_table, reference_of
from codistill.report.groups import Group
from codistill.report.tables import Table

COLUMNS = (
    *("runs", "predictor", "n", "lost", "mean", "deviation", "low", "high", "best"),
    *("reference", "pairs", "difference", "difference low", "difference high", "paired t p", "sign test p"),
)
"""Of the numbers: errors in percent and differences in percentage points; low and high are the ends of 95 %."""


def tables(groups: Sequence[Group]) -> list[Table]:
    """Return the table of errors and, where test sets are alike, those of paired differences that there are."""
    found = [error_table(groups), *([] if unlike_tests(groups) else [difference_table(groups), control_table(groups)])]
    return [each for each in found if each is not None]


def error_table(groups: Sequence[Group]) -> Table:
    """Return a row for each group: how many runs count, and the errors of its predictors over seeds."""
    predictors = predictors_of(groups)
    rows = [[group.name, count(group), *(" ".join(spread(group, each)) for each in predictors)] for group in groups]
    several = any(len(group.finished) > 1 for group in groups)
    note = "; mean ± sample standard deviation over n seeds, in brackets the best of them" if several else ""
    return Table("Top-1 error on the test set, %", ["runs", "n", *predictors], rows, [f"After the last epoch{note}."])


def numbers(groups: Sequence[Group]) -> Table:
    """Return a row for each predictor of each group, with its errors and their difference from the reference's."""
    reference = reference_of(groups)
    paired = {} if unlike_tests(groups) else {(group, name): each for group, name, each in against(groups, reference)}
    rows = []
    for group in groups:
        for name in group.predictors or [""]:
            values: list[object] = [group.name, name, len(group.finished), len(group.lost)]
            errors, pair = group.errors(name), paired.get((group, name))
            if errors:
                found = summarise(errors)
                values += [found.mean, found.deviation, found.low, found.high, found.best]
            if pair is not None:
                values += [reference.name, pair.count, pair.mean, pair.low, pair.high, pair.t_p, pair.sign_p]
            values += [None] * (len(COLUMNS) - len(values))
            rows.append(["" if each is None else str(each) for each in values])
    return Table("Errors and differences", COLUMNS, rows)


def predictors_of(groups: Sequence[Group]) -> list[str]:
    """Return the names of all predictors, students first."""
    names = dict.fromkeys(name for group in groups for name in group.predictors)
    return sorted(names, key=lambda name: not name.startswith("student"))


def count(group: Group) -> str:
    """Write how many runs count, and of how many where some were lost."""
    finished = len(group.finished)
    return f"{finished} of {finished + len(group.lost)}" if group.lost else str(finished)


def spread(group: Group, predictor: str) -> list[str]:
    """Write the errors of a predictor: mean and deviation, then the best in brackets; nothing where a run was lost."""
    errors = group.errors(predictor)
    if not errors:
        return []
    found = summarise(errors)
    if found.deviation is None:
        return [f"{found.mean:.2f}"]
    return [f"{found.mean:.2f} ± {found.deviation:.2f}", f"({found.best:.2f})"]


def unlike_tests(groups: Sequence[Group]) -> bool:
    """Whether runs were tested on unlike images, as far as their digests tell."""
    facts = [each.run.metadata["dataset"].get("sha256", {}) for group in groups for each in group.runs]
    tests = {repr(sorted((key, value) for key, value in each.items() if key.startswith("test"))) for each in facts}
    return len(tests) > 1
