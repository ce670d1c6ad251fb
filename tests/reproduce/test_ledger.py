"""The ledger and whole commands, with runs of a second on a few digits; a protocol of the tests' own."""

import json
import shutil

import pytest

from codistill.cli import main
from codistill.core.errors import CheckpointError, UsageError
from codistill.runs.folder import RunFolder
from codistill.sweeps.reproduce import reproduce as program
from codistill.sweeps.reproduce.cells import contents, digest_of, protocols
from codistill.sweeps.reproduce.ledger import append, entry_of, known_cells, line_digest, read_ledger
from codistill.sweeps.reproduce.reproduce import reproduce

from .. import tiny
from .conftest import tables_with, trained_here

pytestmark = pytest.mark.usefixtures("small_tables")


@pytest.fixture(scope="module")
def trained(small_tables, tmp_path_factory):
    """A folder in which table1 has its runs for seed 0; to be read only."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "sweep", trained_here)
        reproduce("table1", seeds=[0], out=out, ledger=out / "ledger.jsonl", show=False)
    return out


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that folder whose runs a test may damage; teachers are found beside the runs."""
    shutil.copytree(trained / "paper", tmp_path / "paper")
    for config in (tmp_path / "paper").glob("kd-*/config.json"):
        settings = json.loads(config.read_text())
        settings["teacher"] = settings["teacher"].replace(str(trained), "/gone")
        config.write_text(json.dumps(settings))
    return tmp_path / "paper"


def known():
    return known_cells(list(protocols().values()))


def run_of(folder, method):
    return RunFolder(next(folder.glob(f"{method}-*")))


def change(run, name="config.json", **values):
    file = run.path / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return RunFolder(run.path)


def test_a_table_trains_what_is_missing_once(trained, monkeypatch, capsys):
    names = sorted(each.name.partition("-")[0] for each in (trained / "paper").glob("*-seed0"))
    assert names == ["independent", "kd", "mfef"]  # the baseline is the teacher, and mfef has two cells
    kd = run_of(trained / "paper", "kd")
    assert kd.config.teaching.teacher == str(run_of(trained / "paper", "independent").path)

    def no_sweep(*arguments, **settings):
        raise AssertionError(arguments)

    monkeypatch.setattr(program, "sweep", no_sweep)
    main, _ = reproduce("table1", seeds=[0], out=trained, ledger=trained / "ledger.jsonl")
    assert [row[-1] for row in main.rows] == ["one seed", "one seed", "one seed", "lost in the source"]
    assert "0 runs of students to train" in capsys.readouterr().out
    methods, differences = reproduce("methods", out=trained, ledger=trained / "ledger.jsonl", collect=True, show=False)
    assert [row[-1] for row in methods.rows] == ["1", "1", "0"]  # the same runs
    assert differences.rows[0][1] == "mfef - independent"
    assert (trained / "methods-paper.svg").exists() and (trained / "table1-paper.tex").exists()


def test_a_line_has_what_the_run_has(copied, tmp_path):
    run = run_of(copied, "mfef")
    entry = entry_of(run, known())
    cell = contents("table1", protocols()["paper"]).cells[2]
    assert entry.key == cell.key == entry.line["settings_sha256"] == digest_of(entry.line["settings"])
    assert entry.errors == run.summary["top1_error"] and (entry.seed, entry.line["protocol"]) == (0, "paper")
    assert entry.line["settings"]["data"] == "digits" and "data_dir" not in entry.line["settings"]
    assert len(entry.line["environment"]["source_sha256"]) == 64
    taught = entry_of(run_of(copied, "kd"), known())
    assert taught.line["settings"]["teacher"] == entry_of(run_of(copied, "independent"), known()).line["settings"]
    append(tmp_path / "l" / "ledger.jsonl", [entry.line])
    append(tmp_path / "l" / "ledger.jsonl", [taught.line])
    with open(tmp_path / "l" / "ledger.jsonl", "a") as file:
        file.write("\n")  # as an editor may leave it
    assert [each.line for each in read_ledger(tmp_path / "l" / "ledger.jsonl")] == [entry.line, taught.line]
    assert read_ledger(tmp_path / "none.jsonl") == []


def test_a_recorded_run_needs_no_folder(copied, tmp_path, capsys):
    settings = {"out": tmp_path, "ledger": tmp_path / "ledger.jsonl", "collect": True, "show": False}
    reproduce("table1", record=True, **settings)
    reproduce("table1", record=True, **settings)
    assert "3 runs added, 0 were there" in (said := capsys.readouterr().err) and "0 runs added, 3 were there" in said
    shutil.rmtree(copied)
    main, _ = reproduce("table1", **settings)
    assert [row[7] for row in main.rows] == ["1", "1", "1", "1"]
    # An editor may take the end of the last line.
    ledger = tmp_path / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join(lines))
    append(ledger, [json.loads(lines[0])])
    assert ledger.read_text().splitlines() == [*lines, lines[0]]
    ledger.write_text("".join(f"{line}\n" for line in lines))
    # A part of a table leaves the whole one as it is, and a dry run all.
    whole = (tmp_path / "table1-paper.md").read_text()
    reproduce("table1", cells=["*/kd"], **settings)
    assert (tmp_path / "table1-paper.md").read_text() == whole
    assert "| mfef" in whole and "| mfef" not in (tmp_path / "table1-paper-kd.md").read_text()
    before = tiny.listing(tmp_path)
    # A run that was recorded is not trained again, but whoever needs its teacher's weights trains those.
    reproduce("table1", seeds=[0], dry_run=True, **(settings | {"collect": False, "show": True}))
    assert capsys.readouterr().out.startswith("0 runs of teachers to train\n0 runs of students")
    reproduce("table1", cells=["*/kd"], seeds=[1], dry_run=True, **(settings | {"collect": False, "show": True}))
    said = capsys.readouterr().out
    assert said.startswith("1 runs of teachers to train\n") and "independent-tiny-" in said and "Table 1" not in said
    reproduce("table1", dry_run=True, **(settings | {"show": True}))
    assert "Table 1" in capsys.readouterr().out  # one that collects prints the table
    with pytest.raises(UsageError, match="--record with --dry-run, which writes nothing"):
        reproduce("table1", dry_run=True, record=True, **settings)
    # Lists of cells that begin alike have files of their own.
    for last in ("mfef-s", "mfef"):
        reproduce("table1", cells=[*(["*/baseline", "*/kd"] * 20), f"*/{last}"], **settings)
    assert sum(path.endswith(".md") for path in tiny.listing(tmp_path).keys() - before.keys()) == 2
    before = tiny.listing(tmp_path)
    reproduce("table1", dry_run=True, **settings)
    assert tiny.listing(tmp_path) == before


def test_a_ledger_that_is_not_there_is_said(tmp_path, capsys):
    for record in (False, True):  # there are no runs: a ledger of none is not made either
        reproduce("table1", out=tmp_path, ledger=tmp_path / "nothere.jsonl", collect=True, record=record, show=False)
        assert not (tmp_path / "nothere.jsonl").exists()
    assert f"{tmp_path}/nothere.jsonl: no such ledger: only runs in {tmp_path}/paper count" in capsys.readouterr().err


EDITS = {'"seed": 0': '"seed": 1', '"student0": ': '"student0": 1', '"protocol": "paper"': '"protocol": ""'}


@pytest.mark.fault(180)
@pytest.mark.parametrize(("old", "new"), EDITS.items())
def test_an_edited_line_is_one_line(copied, tmp_path, capsys, old, new):
    ledger = tmp_path / "ledger.jsonl"
    append(ledger, [entry_of(run_of(copied, "mfef"), known()).line] * 2)
    first, second = ledger.read_text().splitlines()
    assert old in second
    ledger.write_text(f"{first}\n{second.replace(old, new, 1)}\n")
    status = main(["reproduce", "table1", "--collect", "--ledger", str(ledger), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status == 4 and said.count("\n") == 1
    assert f"{ledger}:2: edited after it was written, for its sha256 is another: restore the line" in said


@pytest.mark.fault(180)
def test_a_line_that_is_none_is_refused(copied, tmp_path):
    line = dict(entry_of(run_of(copied, "mfef"), known()).line)
    for changes, words in (
        ({"protocol": "mine"}, "protocol is not that of a ledger"),
        ({"commit": None}, "commit is not that"),
        ({"settings": {}}, "settings_sha256 is not that"),
    ):
        other = line | changes
        (tmp_path / "l").write_text(json.dumps(other | {"sha256": line_digest(other)}))
        with pytest.raises(CheckpointError, match=f"l:1: {words}"):
            read_ledger(tmp_path / "l")
    (tmp_path / "l").write_text(json.dumps(line)[:-9])
    with pytest.raises(CheckpointError, match="l:1: no line of JSON"):
        read_ledger(tmp_path / "l")


def test_lines_of_other_versions(copied, tmp_path):
    line = dict(entry_of(run_of(copied, "kd"), known()).line)

    def read_with(settings):
        other = line | {"settings": settings, "settings_sha256": digest_of(settings)}
        (tmp_path / "l").write_text(json.dumps(other | {"sha256": line_digest(other)}))
        return read_ledger(tmp_path / "l")[0]

    older = {key: each for key, each in line["settings"].items() if key not in ("label_smoothing", "method.kl")}
    older["teacher"] = {key: each for key, each in older["teacher"].items() if key != "mixup"}
    assert read_with(older).key == line["settings_sha256"]  # what came later had its default
    with pytest.raises(CheckpointError, match=r"l:1: of another version of codistill: .* unknown key 'later'"):
        _ = read_with({**line["settings"], "later": 1}).key


@pytest.mark.fault(180)
def test_what_is_no_run_of_a_protocol_cannot_enter(copied):
    run = run_of(copied, "mfef")
    metrics, summary = (run.path / "metrics.jsonl").read_text(), run.summary
    whole = run.metadata
    cases = [
        (
            {"learning_rate": 0.1},
            r"of no protocol: beside protocol paper \(mfef\) learning_rate 0.1, not 0.05",
        ),
        ({"epochs": 3}, r"cut short: 2 of 3 epochs"),
        ({"own_method": "Mine"}, "trained by a method of one's own"),
        ({"own_loop": True}, "trained by a loop of one's own"),
        ({"extended": [{"epochs": 1, "after_epoch": 1, "after_step": 0}]}, "extended from 1 epochs"),
        ({"initial_weights": {"sha256": "", "from_recipe": False}}, "began with weights of its own"),
        ({"data": "digits:check=false"}, "data digits:check=false, not digits"),
    ]
    for changes, words in cases:
        with pytest.raises(UsageError, match=words):
            entry_of(change(run, **changes), known())
        (run.path / "config.json").write_text(json.dumps(whole))
    (run.path / "metrics.jsonl").write_text(metrics.splitlines()[0] + "\n")
    with pytest.raises(UsageError, match="cut short: 1 of 2 epochs"):
        entry_of(RunFolder(run.path), known())
    (run.path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(UsageError, match="not finished"):
        entry_of(change(run, "summary.json", status="interrupted"), known())
    assert entry_of(change(run, "summary.json", **summary), known()).errors == summary["top1_error"]


def test_a_run_in_either_precision_enters(copied):
    run = run_of(copied, "mfef")
    lines = [entry_of(run, known()).line, entry_of(change(run, precision="bf16"), known()).line]
    assert [line["precision"] for line in lines] == ["float32", "bf16"]
    assert lines[0]["settings_sha256"] == lines[1]["settings_sha256"]


@pytest.mark.fault(180)
def test_a_teacher_must_be_there_and_of_the_same_seed(copied):
    taught, teacher = run_of(copied, "kd"), run_of(copied, "independent")
    assert entry_of(taught, known()).seed == 0
    change(teacher, seed=3)
    with pytest.raises(UsageError, match=r"seed 0, but its teacher .* has 3"):
        entry_of(taught, known())
    change(teacher, seed=0, learning_rate=0.1)
    with pytest.raises(UsageError, match=r"independent-.*: of no protocol"):
        entry_of(taught, known())
    shutil.rmtree(teacher.path)
    with pytest.raises(UsageError, match="its teacher must be one run folder that is still there, not /gone/"):
        entry_of(taught, known())


@pytest.mark.fault(180)
def test_what_does_not_count_is_said(copied, tmp_path, capsys):
    change(run_of(copied, "mfef"), learning_rate=0.1)
    main, _ = reproduce("table1", out=tmp_path, ledger=tmp_path / "l", collect=True, record=True, show=False)
    assert [row[-1] for row in main.rows][2] == "not run"
    said = capsys.readouterr().err
    assert "learning_rate 0.1, not 0.05: it does not count" in said and "2 runs added" in said


def test_names_that_do_not_exist(tmp_path):
    for table, settings, words in (
        ("table7", {}, "unknown table 'table7': did you mean table1"),
        ("table1", {"protocol": "papers"}, "unknown protocol 'papers': did you mean paper"),
        ("table1", {"data": "packed", "data_dir": "none.npz"}, "none.npz"),
    ):
        with pytest.raises(Exception, match=words):
            reproduce(table, out=tmp_path, ledger=tmp_path / "l", **settings)


def test_the_engine_is_set_up_by_a_file_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "cluster.toml").write_text('[slurm]\npartition = "gpu"\n')
    asked = []
    monkeypatch.setattr(program, "sweep", lambda spec, out, **settings: asked.append((spec, settings)) or [])
    out = {"out": tmp_path / "new", "ledger": tmp_path / "l", "engine": tmp_path / "cluster.toml", "show": False}
    reproduce("table1", cells=["*/mfef"], seeds=[0, 4], executor="slurm", slots=3, **out)
    (spec, settings) = asked.pop()
    assert (settings["executor"], settings["slots"], not asked) == ("slurm", 3, True)
    written = json.loads(spec.read_text())
    assert written.keys() == {"slurm", "runs"} and written["slurm"] == {"partition": "gpu"}
    assert [run["seed"] for run in written["runs"]] == [0, 4]
    (tmp_path / "cluster.toml").write_text("[slurm]\nparition = 1\n")
    with pytest.raises(
        UsageError, match=r"cluster.toml:2: unknown key 'parition' in \[slurm\]: did you mean partition"
    ):
        reproduce("table1", **out)


@pytest.mark.slow  # each run is a process
def test_a_sweep_trains_the_runs(tmp_path, capsys):
    (tmp_path / "tables").mkdir()
    with tables_with("resnet8", tmp_path / "tables"):
        out = {"out": tmp_path, "ledger": tmp_path / "ledger.jsonl", "seeds": [0]}
        main, _ = reproduce("table1", slots=2, record=True, **out)
        assert [row[7] for row in main.rows] == ["1", "1", "1", "1"]
        assert len(read_ledger(tmp_path / "ledger.jsonl")) == 3
        capsys.readouterr()
        reproduce("table1", **out)
    assert "0 runs of students to train" in capsys.readouterr().out
