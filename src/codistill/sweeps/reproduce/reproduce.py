"""Train what a table of the paper lacks, or only collect it, and write the table."""

import base64
import functools
import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.core.console import lasting_console, note, warn
from codistill.core.errors import UsageError, WorkerError
from codistill.core.files import system_error, write_atomically, write_json
from codistill.core.registry import near_matches
from codistill.report.page import render
from codistill.report.tables import Table
from codistill.sweeps.driver import PROGRAM, sweep
from codistill.sweeps.naming import part
from codistill.sweeps.reproduce.cells import Cell, Protocol, contents, protocols, rules
from codistill.sweeps.reproduce.cells import tables as all_tables
from codistill.sweeps.reproduce.collect import gather, runs_below, tables_of
from codistill.sweeps.reproduce.data import located
from codistill.sweeps.reproduce.ledger import Entry, append, read_ledger, teacher_of
from codistill.sweeps.reproduce.picture import draw
from codistill.sweeps.spec import engine_settings
from codistill.sweeps.table import Row

LEDGER, OUT = Path("results/ledger.jsonl"), Path("runs/reproduce")
SEEDS = (0, 1, 2)
STEM = 150
"""Letters of a table's file name, of those that it may have."""
MARKED = re.compile(r"(<!-- ledger: (\w+) (\w+)( differences)? -->\n)(.*?)(?=<!-- /ledger -->)", re.DOTALL)
"""A part of a Markdown page that is made from the ledger: table, protocol, and whether of differences."""


def reproduce(
    table: str,
    *,
    protocol: str | Protocol = "paper",
    cells: Sequence[str] = (),
    seeds: Sequence[int] = (),
    data: str | None = None,
    data_dir: str | None = None,
    out: Path = OUT,
    ledger: Path = LEDGER,
    collect: bool = False,
    record: bool = False,
    dry_run: bool = False,
    executor: str = "local",
    engine: Path | None = None,
    slots: int | None = None,
    program: Sequence[str] = PROGRAM,
    show: bool = True,
) -> tuple[Table, Table]:
    """Train the runs that a table lacks, and write the table beside the paper's numbers.

    Args:
        table: table1 to table5, figure3 or methods.
        protocol: paper, short or small; see docs/reproduce.md.
        cells: Rows, as resnet32/cifar100, or cells, as resnet32/cifar100/mfef-s; none: all.
        seeds: Which seeds. None: 0, 1 and 2 are trained, and all that are there count.
        data: The data set in another form, as packed; rows of other data sets are left out.
        data_dir: Where it is.
        out: The folder of runs, in a sweep for each protocol, and of the tables.
        ledger: The file of finished runs; it may not exist.
        collect: Train nothing.
        record: Add the finished runs of this protocol in `out` to the ledger.
        dry_run: Train and write nothing, only print which runs are missing, with minutes where `data` or `data_dir` is
            there.
        executor: What runs the processes, as for `sweep`.
        engine: A TOML file with the table that sets it up: [slurm] or [ray].
        slots: How many at a time, as for `sweep`.
        program: What is put before `train ..`, as for `sweep`.
        show: Whether to print.

    Returns:
        The table, and that of the differences.

    Raises:
        UsageError: Something cannot be; nothing was started.
        CheckpointError: The ledger is damaged.
        WorkerError: Runs failed; the tables are written without them.
    """
    if isinstance(protocol, str):
        if protocol not in protocols():
            raise UsageError(f"unknown protocol {protocol!r}: {near_matches(protocol, protocols())}")
        protocol = protocols()[protocol]
    if record and dry_run:
        raise UsageError("--record with --dry-run, which writes nothing: leave one of them out")
    if table not in all_tables():
        raise UsageError(f"unknown table {table!r}: {near_matches(table, all_tables())}")
    patterns, folder = tuple(cells), out / protocol.name
    chosen, recorded = contents(table, protocol, patterns).cells, read_ledger(ledger)
    console, failed = lasting_console(show, markup=False), list[str]()
    if not ledger.exists() and not record:
        note(f"{ledger}: no such ledger: only runs in {folder} count")
    if not collect:
        setup = {name: each for name, each in (engine_settings(engine) if engine else {}).items() if each}
        with tempfile.TemporaryDirectory() as scratch:  # where a dry run writes
            beside, place = Path(scratch) if dry_run else out, dict[str, Any]()
            if not dry_run or data or data_dir:  # the minutes of a dry run are measured on the data
                chosen, place = located(chosen, protocol, data, data_dir, beside)
            elif protocol.subset:
                place = {"data": rules()["data"][protocol.subset]["of"]}
            missing = Missing(chosen, seeds or SEEDS, recorded, protocol, folder)
            train = functools.partial(
                sweep, executor=executor, slots=slots, dry_run=dry_run, program=program, show=show
            )
            failed = _train(missing, place, setup, beside, train, console.print)
    own, refused = runs_below(folder, [protocol])
    for line in refused:
        warn(f"{line}: it does not count")
    if record:
        known = gather(recorded)
        new = [entry for entry in own if entry.seed not in known.get(entry.key, {})]
        if new:
            append(ledger, [entry.line for entry in new])
        note(f"{ledger}: {len(new)} runs added, {len(own) - len(new)} were there")
    runs = gather([*recorded, *own])
    tables = tables_of(table, protocol, runs, patterns, seeds)
    if dry_run and not collect:
        return tables
    stem = re.sub(r"[^A-Za-z0-9.+]+", "-", whole := "-".join([table, protocol.name, *patterns])).strip("-")
    if len(stem) > STEM:  # two long lists of cells may begin alike
        stem = f"{stem[:STEM]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    if not dry_run:
        write_tables(out / stem, tables, draw(table, protocol, runs, patterns, seeds))
    console.print(*(each.markdown() for each in tables), sep="\n", soft_wrap=True)
    if failed:
        raise WorkerError(f"{len(failed)} runs failed: {', '.join(failed[:5])}: {folder}/table.md says why")
    return tables


def _train(
    missing: "Missing",
    place: Mapping[str, Any],
    setup: Mapping[str, Any],
    beside: Path,
    train: Callable[[Path, Path], Sequence[Row]],
    show: Callable[[str], None],
) -> list[str]:
    """Train teachers, then students, and return those that failed; students need all teachers.

    Args:
        missing: The runs, and the folder of their sweep.
        place: Settings of them all, of the data.
        setup: Tables of the spec that set up an engine.
        beside: Where the specs are written.
        train: The sweep of a spec in a folder.
        show: Prints a line.
    """
    failed: list[str] = []
    for stage in ("teachers", "students"):
        entries, names = missing.entries(stage, place)
        show(f"{len(names)} runs of {stage} to train")
        if not names:
            continue
        spec = beside / f"{missing.protocol.name}-{stage}.json"
        try:
            beside.mkdir(parents=True, exist_ok=True)
            write_json(spec, {**setup, "runs": entries})
        except OSError as error:
            raise system_error(error, missing.folder.parent, fix="choose another --out") from None
        rows = train(spec, missing.folder)
        failed += [f"{row.name} ({row.reason})" for row in rows if row.status == "FAILED"]
        if failed:
            break
    return failed


@dataclass(frozen=True)
class Missing:
    """The runs of cells that are neither in the ledger nor finished in a folder."""

    cells: Sequence[Cell]
    seeds: Sequence[int]
    recorded: Sequence[Entry]
    protocol: Protocol
    folder: Path

    def entries(self, stage: str, place: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the entries of a spec, of the students or of the teachers that they need, and the names of those left.

        The spec has the runs that are finished, too, so that it is the same for each machine that joins the sweep.
        """
        own = gather(runs_below(self.folder, [self.protocol])[0])
        recorded = gather(self.recorded)
        wanted = {(cell.key, seed): cell for seed in self.seeds for cell in self.cells}
        wanted = {(key, seed): cell for (key, seed), cell in wanted.items() if seed not in recorded.get(key, {})}
        if stage == "teachers":  # whose weights are needed, so that a line of the ledger does not do
            taught = [(teacher_of(cell), seed) for (_, seed), cell in wanted.items() if cell.teacher]
            wanted = {(cell.key, seed): cell for cell, seed in taught}
        entries, left = [], []
        for (key, seed), cell in wanted.items():
            entry = {**cell.settings, **place, "seed": seed, "name": name_of(cell, seed)}
            if cell.teacher:
                teacher = teacher_of(cell)
                found = own.get(teacher.key, {}).get(seed)
                folder = Path(found.place) if found else self.folder / name_of(teacher, seed)
                entry["teacher"] = str(folder.absolute())
            entries.append(entry)
            left += [] if seed in own.get(key, {}) else [entry["name"]]
        return entries, left


def name_of(cell: Cell, seed: int) -> str:
    """Return the folder's name of a run, which is the same in every table."""
    return f"{cell.settings['method.name']}-{part('networks', cell.settings['networks'])}-{cell.key[:8]}-seed{seed}"


def write_tables(stem: Path, tables: Sequence[Table], picture: bytes | None) -> None:
    """Write tables as Markdown, CSV, LaTeX and HTML, in files that begin alike, and the picture if there is one."""
    title = tables[0].title.partition(":")[0]
    page = render("table.html", title=title, tables=tables, picture=base64.b64encode(picture or b"").decode())
    files = {".md": "\n".join(each.markdown() for each in tables), ".html": page}
    files |= {".tex": "\n".join(each.latex() for each in tables), ".csv": tables[0].csv()}
    files |= {"-differences.csv": tables[1].csv()} | ({".svg": picture.decode()} if picture else {})
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for ending, text in files.items():
            write_atomically(Path(f"{stem}{ending}"), text.encode())
    except OSError as error:
        raise system_error(error, stem.parent, fix="choose another --out") from None


def rewritten(page: str, entries: Sequence[Entry]) -> str:
    """Return a Markdown page with its parts between `<!-- ledger: TABLE PROTOCOL -->` and `<!-- /ledger -->` as now."""
    runs = gather(entries)

    def made(found: re.Match[str]) -> str:
        tables = tables_of(found[2], protocols()[found[3]], runs)
        return f"{found[1]}{tables[bool(found[4])].markdown()}"

    return MARKED.sub(made, page)
