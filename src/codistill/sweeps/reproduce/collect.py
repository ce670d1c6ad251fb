"""What the runs of a table's cells show: the paper's value beside ours, and differences that are paired by seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from codistill.core.errors import CheckpointError, UsageError
from codistill.evaluation.seeds import Summary, paired, summarise
from codistill.report.differences import PAIRED, paired_cells, signed
from codistill.report.tables import Table
from codistill.runs.folder import RunFolder
from codistill.sweeps.reproduce.cells import LOST, Cell, Contents, Protocol, contents, paper
from codistill.sweeps.reproduce.ledger import Entry, entry_of, known_cells

Runs = Mapping[str, Mapping[int, Entry]]
"""Finished runs by `Cell.key` and seed."""
MARKS = {
    "reproduced": "the paper's value lies in the 95 % interval of our mean",
    "better": "our interval lies below it",
    "worse": "our interval lies above it",
    "one seed": "no interval, so no verdict",
    "other protocol": "trained otherwise than in the paper, so no verdict",
    "not run": "no finished run",
    "lost in the source": "the paper prints it, but its text was lost in extraction",
}
BEST = "Best: the lowest error over the runs and, where students are alike, over the students, as the paper reports it."
STUDENT = "Ours: mean ± sample standard deviation of the last epoch, of one predictor, chosen beforehand."


def gather(entries: Sequence[Entry]) -> dict[str, dict[int, Entry]]:
    """Return runs by the SHA-256 of their settings and by seed; of the same run twice the first one counts."""
    found: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        found.setdefault(entry.key, {}).setdefault(entry.seed, entry)
    return found


def runs_below(folder: Path, protocols: Sequence[Protocol]) -> tuple[list[Entry], list[str]]:
    """Return the finished runs in a folder that are of a protocol, and for each other one a line that says why not."""
    known = known_cells(protocols)
    entries, refused = [], []
    for path in sorted(each.parent for each in folder.rglob("config.json")):
        try:
            entries.append(entry_of(RunFolder(path), known))
        except (UsageError, CheckpointError) as error:
            refused.append(str(error))
    return entries, refused


def values_of(cell: Cell, runs: Runs, seeds: Sequence[int] = ()) -> dict[int, float]:
    """Return the value of a cell by seed, percent; of all seeds unless some are named."""
    found = runs.get(cell.key, {})
    return {seed: found[seed].errors[cell.predictor] for seed in sorted(found) if not seeds or seed in seeds}


def mark(printed: float | str | None, ours: Summary | None, own: bool) -> str:
    """Return what a cell says of the paper's value; empty where the paper prints none and there are runs.

    Args:
        printed: The paper's value, percent, or `lost`.
        ours: Of our runs; None: there are none.
        own: Whether they are by the paper's own protocol.
    """
    if printed == LOST:
        return "lost in the source"
    if ours is None:
        return "not run"
    if not isinstance(printed, float):
        return ""
    if not own:
        return "other protocol"
    if ours.low is None or ours.high is None:
        return "one seed"
    return "reproduced" if ours.low <= printed <= ours.high else "better" if ours.mean < printed else "worse"


def spread(summary: Summary) -> str:
    """Write mean and deviation."""
    return f"{summary.mean:.2f}" + (f" ± {summary.deviation:.2f}" if summary.deviation is not None else "")


def interval(low: float | None, high: float | None) -> str:
    """Write an interval; empty where one run has none."""
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def tables_of(
    table: str, protocol: Protocol, runs: Runs, patterns: tuple[str, ...] = (), seeds: Sequence[int] = ()
) -> tuple[Table, Table]:
    """Return a table of cells, and one of the differences between them.

    Args:
        table: One of `tables()`.
        protocol: By which the runs were trained.
        runs: The finished runs.
        patterns: Which cells; none: all.
        seeds: Which seeds count; none: all.
    """
    found = contents(table, protocol, patterns)
    caption = f"{paper()[table]['caption']}; top-1 error on the test set, % (protocol {protocol.about})"
    main = _methods(found, runs, seeds) if table == "methods" else _cells(found, protocol, runs, seeds)
    notes = [*main.notes, *found.notes, *_provenance(found, runs, seeds)]
    return Table(caption, main.headings, main.rows, notes), _differences(found, protocol, runs, seeds)


def _provenance(found: Contents, runs: Runs, seeds: Sequence[int]) -> list[str]:
    keys = dict.fromkeys(cell.key for cell in found.cells)
    entries = [entry for key in keys for seed, entry in runs.get(key, {}).items() if not seeds or seed in seeds]
    notes = []
    for heading, key in (("Precision", "precision"), ("Commit", "commit")):
        used = [str(entry.line[key])[:8] or "unknown" for entry in entries]
        counts = [f"{each} {used.count(each)}" for each in sorted(set(used))]
        notes += [f"{heading}, by the number of runs: {', '.join(counts)}."] if counts else []
    return notes


def _cells(found: Contents, protocol: Protocol, runs: Runs, seeds: Sequence[int]) -> Table:
    headings = ["row", "cell", "paper", "ours", "95 % interval", "best of n", "ours - paper", "n", "protocol", "mark"]
    rows, marks = [], []
    for cell in found.cells:
        values = values_of(cell, runs, seeds)
        ours = summarise(list(values.values())) if values else None
        printed = cell.paper
        verdict = mark(printed, ours, protocol.name == "paper")
        marks.append(verdict)
        shown = f"{printed:.2f}" if isinstance(printed, float) else "" if printed is None else "lost in the source"
        cells = [spread(ours), interval(ours.low, ours.high), _best(cell, runs, values)] if ours else [""] * 3
        difference = signed(ours.mean - printed) if ours and isinstance(printed, float) else ""
        rows.append([cell.row, cell.column, shown, *cells, difference, str(len(values)), protocol.about, verdict])
    source = f"Paper: {paper()['source']}; it prints the best of three runs."
    told = [f"{each}: {words}" for each, words in MARKS.items() if each in marks]
    return Table("", headings, rows, [f"{STUDENT} {BEST}", source, *(["; ".join(told) + "."] if told else [])])


def _best(cell: Cell, runs: Runs, seeds: Mapping[int, float]) -> str:
    return f"{min(cell.best(runs[cell.key][seed].errors) for seed in seeds):.2f}"


def _methods(found: Contents, runs: Runs, seeds: Sequence[int]) -> Table:
    headings = ["method", "student", "95 % interval", "best of n", "ensemble", "fused", "epochs", "n"]
    by_place = {(cell.row, cell.column): cell for cell in found.cells}
    rows = []
    for row in dict.fromkeys(cell.row for cell in found.cells):
        cells = [by_place.get((row, column)) for column in paper()["methods"]["columns"]]
        values = [values_of(cell, runs, seeds) if cell else {} for cell in cells]
        student, *others = [summarise(list(each.values())) if each else None for each in values]
        assert cells[0] is not None
        shown = ["not run", "", ""]
        if student:
            shown = [spread(student), interval(student.low, student.high), _best(cells[0], runs, values[0])]
        epochs = str(cells[0].settings["epochs"])
        rows.append([row, *shown, *(spread(each) if each else "" for each in others), epochs, str(len(values[0]))])
    return Table("", headings, rows, [f"{STUDENT} {BEST}"])


def _differences(found: Contents, protocol: Protocol, runs: Runs, seeds: Sequence[int]) -> Table:
    """Return the differences of cells that are compared, paired by the seeds that both have; none has no row."""
    printed = any(isinstance(cell.paper, float) for cell in found.cells)
    rows = []
    for first, second in found.pairs:
        ours = paired(values_of(first, runs, seeds), values_of(second, runs, seeds))
        if ours is None:
            continue
        names = (first.row, second.row) if first.row != second.row else (first.column, second.column)
        theirs = ""
        if isinstance(first.paper, float) and isinstance(second.paper, float):
            theirs = signed(first.paper - second.paper)
        where = first.column if first.row != second.row else first.row
        rows.append([where, " - ".join(names), *paired_cells(ours), *([theirs, protocol.about] if printed else [])])
    headings = ["of", "first - second", *PAIRED]
    notes = ["Below 0: the first has the lower error. Both tests are two-sided, and not corrected for many."]
    title = f"Differences paired by seed, percentage points (protocol {protocol.about})"
    none = ["No two cells that are compared have a seed in common yet."]
    return Table(title, [*headings, *(["paper", "protocol"] if printed else [])], rows, notes if rows else none)
