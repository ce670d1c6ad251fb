"""Sweeps: the runs of a spec, which of them are trained again, and the tables."""

import fcntl
import functools
import io
import json
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import codistill as cd
from codistill.cli import main
from codistill.core.console import lasting_console
from codistill.core.errors import UsageError
from codistill.runs.lock import lock_folder
from codistill.settings.build import build_method
from codistill.settings.mapping import run_from_mapping
from codistill.sweeps import driver as sweep_module
from codistill.sweeps import progress
from codistill.sweeps.dealing import assign
from codistill.sweeps.driver import own_program, sweep
from codistill.sweeps.engines import local
from codistill.sweeps.engines.local import Local, measured_slots
from codistill.sweeps.folder import Claims, at_work
from codistill.sweeps.naming import digest
from codistill.sweeps.spec import labelled, read_spec
from codistill.sweeps.table import Row, grouped, write_tables

from .. import tiny
from ..faults.asserting import refused
from .bench import SEEDS, SHARED, Bench, on_waiting, signalled

SPECS = sorted((Path(__file__).parents[2] / "recipes").glob("sweep-*.toml"))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(Local, "seconds", 0.01)
    monkeypatch.setattr("codistill.sweeps.driver.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("codistill.sweeps.folder.PLAN_SECONDS", 0.05)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("codistill.sweeps.engines.local.measured_slots", lambda runs: 1)
    made = Bench(tmp_path)
    monkeypatch.setattr("codistill.cli.commands.own_program", lambda arguments: made.program)
    return made


def table(page: str) -> list[list[str]]:
    """Return the cells of Markdown tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]


def planned(tmp_path, text):
    (tmp_path / "spec.toml").write_text(text)
    return read_spec(tmp_path / "spec.toml")


def test_a_grid_is_a_product(tmp_path):
    runs = planned(
        tmp_path,
        'data = "digits"\nepochs = 4\n[grid]\nnetworks = [["resnet20", "resnet20"], ["resnet32", "wrn-16-2"]]\n'
        'method = ["dml", {name = "mfef", groups = 2}]\n"method.temperature" = [2, 3.5]\nseed = [0, 1]\n',
    )
    assert [run.name for run in runs[:3]] == [
        "dml-resnet20x2-temperature-2-seed0",
        "dml-resnet20x2-temperature-2-seed1",
        "dml-resnet20x2-temperature-3.5-seed0",
    ]
    assert len({run.name for run in runs}) == len(runs) == 16 and len({run.group for run in runs}) == 8
    last = runs[-1]
    assert last.name == "mfef-resnet32+wrn-16-2-groups-2-temperature-3.5-seed1"
    assert last.group == "mfef-resnet32+wrn-16-2-groups-2-temperature-3.5"
    assert last.config.method == cd.MFEF.Settings(groups=2, temperature=3.5)
    assert (last.config.networks, last.config.train.seed) == (("resnet32", "wrn-16-2"), 1)
    assert all(run.config.train.epochs == 4 and run.config.data == "digits" for run in runs)


def test_an_entry_may_have_a_name(tmp_path):
    text = f'{SHARED}[[runs]]\nname = "first.1"\nseed = 4\n[[runs]]\nmethod = "dml"\nseed = 4\n'
    runs = planned(tmp_path, text)
    assert [run.name for run in runs] == ["first.1", "dml"] and "name" not in runs[0].recipe
    assert [run.group for run in runs] == ["first.1", "dml"]
    runs = planned(tmp_path, f'{SHARED}[grid]\nseed = [0, 1]\n[[runs]]\nname = "first"\n')
    assert [run.name for run in runs] == ["first-seed0", "first-seed1"]
    assert [run.group for run in runs] == ["first", "first"]
    for name in ('"a/b"', "3", '".."'):
        with pytest.raises(UsageError, match=r"spec.toml:5: name must be a text of letters, digits and \. \+ -"):
            planned(tmp_path, f"{SHARED}[[runs]]\nname = {name}\n")
    with pytest.raises(UsageError, match=r"spec.toml:5: Logs is a file of the sweep itself: choose another name"):
        planned(tmp_path, f'{SHARED}[[runs]]\nname = "Logs"\n')


@given(st.lists(st.tuples(st.sampled_from("gh"), st.sampled_from(["", "a", "b", "g", "a-g"])), max_size=6))
def test_groups_stay_the_same_under_the_names_of_their_entries(pairs):
    groups, labels = [group for group, _ in pairs], [label for _, label in pairs]
    names = labelled(groups, labels)
    assert len(set(zip(groups, names, strict=True))) == len(set(groups)) == len(set(names))


def test_a_group_has_the_name_of_its_entry(tmp_path):
    grid = "[grid]\nseed = [0, 1]\nlearning_rate = [0.1, 0.2]\n"
    entries = '[[runs]]\nname = "mine"\n[[runs]]\nmethod = "dml"\n'
    groups = [run.group for run in planned(tmp_path, SHARED + grid + entries)]
    rates = [f"learning-rate-{rate}" for rate in (0.1, 0.2)]
    assert list(dict.fromkeys(groups)) == [f"{name}-{rate}" for name in ("mine-mfef", "dml") for rate in rates]
    # Entries that differ in the seed alone are one group, whatever they are called.
    text = "".join(f'[[runs]]\nname = "run{seed}"\nseed = {seed}\n' for seed in (0, 1))
    assert [run.group for run in planned(tmp_path, SHARED + text)] == ["mfef", "mfef"]


def test_every_entry_of_runs_is_taken_at_every_point_of_the_grid(tmp_path):
    runs = planned(
        tmp_path,
        f'{SHARED}method = {{name = "ffl", temperature = 2}}\n[grid]\nseed = [3, 4]\n[[runs]]\n[[runs]]\n'
        'learning_rate = 0.05\nmethod.temperature = 5\n[[runs]]\nmethod = "dml"\n',
    )
    assert [run.name for run in runs[::2]] == [
        "ffl-temperature-2-seed3",
        "ffl-learning-rate-0.05-temperature-5-seed3",
        "dml-temperature-2-seed3",
    ]
    assert [(run.config.method.temperature, run.config.train.learning_rate) for run in runs] == [
        (2, 0.1), (2, 0.1), (5, 0.05), (5, 0.05), (2, 0.1), (2, 0.1)
    ]  # fmt: skip


def test_names_are_unlike_whatever_the_values(tmp_path):
    long = "x" * 200
    values = ["a/b", "a b", "A_B", "..", f"{long}1", f"{long}2"]
    text = f"{SHARED}[grid]\nteacher = {json.dumps(values)}\nmethod.name = ['kd']\n"
    names = [run.name for run in planned(tmp_path, text)]
    assert len({name.lower() for name in names}) == len(values)
    assert all(len(name) < 120 and "/" not in name and not name.startswith((".", "-")) for name in names)
    assert names == [run.name for run in planned(tmp_path, text)]
    assert [run.name for run in planned(tmp_path, f'{SHARED}method = "dml"')] == ["dml"]


WRONG = {
    "epoch = 3": r"spec\.toml:4: unknown key 'epoch': did you mean epochs",
    "[grid]\nlearning_rte = [1]": r"spec\.toml:5: unknown key 'learning_rte': did you mean learning_rate",
    "[[runs]]\n[[runs]]\nmethod.temprature = 1": r"spec\.toml:6: unknown key 'temprature': did you mean temperature",
    '[grid]\n"method.temprature" = [1]': r"spec\.toml:5: unknown key 'temprature': did you mean temperature",
    '[grid]\nmethod = ["dml", "mfe"]': r"spec\.toml:5: unknown method 'mfe': did you mean mfef",
    "[grid]\nseed = 0": r"spec\.toml:5: seed in \[grid\] must be a list of values",
    "[grid]\nseed = []": r"spec\.toml:5: seed in \[grid\] must be a list of values",
    '[grid]\nnetworks = ["resnet20", "resnet20"]': r"spec\.toml:5: networks in \[grid\] must be a list of lists, ",
    "[grid]\nseed = [0]\n[[runs]]\nseed = 1": r"spec\.toml:7: seed is in \[grid\] and in \[\[runs\]\]",
    "[grid]\nseed = [0, 1, 0]": "are the same run",
    "[[runs]]\n[[runs]]\nlearning_rate = 0.1": "mfef and learning-rate-0.1 are the same run",
    "[grid]\nseed = ['a']": r"spec\.toml:5: seed is 'a'; it must be a whole number",
    "runs = 3": r"spec\.toml:4: runs must be tables of settings: \[\[runs\]\]",
    "grid = 3": r"spec\.toml:4: grid must be a table of lists: \[grid\]",
    "method = 3": r"spec\.toml:4: method must be a name, or a table",
    "momentum = 2": r"no run can work: .*momentum is 2",
    '[grid]\nnetworks = [["resnet21", "resnet20"]]': r"no run can work: unknown network 'resnet21'",
    '[grid]\nnetworks = [["resnet20:shortcut=Z"]]': r"no run can work: network resnet20: option shortcut is 'Z'",
    '[[runs]]\ndata = "digit"': r"no run can work: unknown data set 'digit': did you mean digits",
    "[grid": "spec.toml: ",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_spec_is_status_2_and_makes_nothing(bench, capsys, text):
    Path("spec.toml").write_text(SHARED + text)
    line = refused(capsys, ["sweep", "spec.toml", "--out", "new"], 2, unchanged=bench.folder)
    with pytest.raises(UsageError, match=WRONG[text]):
        sweep("spec.toml", "new", show=False)
    assert "sweep spec.toml" in line


def test_wrong_usage(bench, capsys):
    Path("spec.toml").write_text(SEEDS)
    refused(capsys, ["sweep", "none.toml", "--out", "new"], 2, "none.toml", "No such file")
    refused(capsys, ["sweep", "spec.toml", "--out", "new", "--executor", "rai"], 2, "--executor", "local")
    refused(capsys, ["sweep", "spec.toml", "--out", "new", "--slots", "0"], 2, "slots is 0")
    refused(capsys, ["sweep", "spec.toml", "--out", "spec.toml"], 2, "sweep folder spec.toml", "choose another --out")
    refused(capsys, ["sweep", "spec.toml"], 2, "--out")
    with pytest.raises(UsageError, match="unknown executor 'locale': did you mean local"):
        sweep("spec.toml", "new", executor="locale")
    assert not Path("new").exists()


def test_finished_runs_make_tables(bench, capsys):
    rows = bench.sweep()
    out, error = capsys.readouterr()
    assert error == "" and [row.status for row in rows.values()] == ["finished"] * 3
    assert [row.top1_error["student0"] for row in rows.values()] == [10, 14, 12]
    assert "seed1: finished  test error %: student0 14.00  ensemble 9.00" in out
    (group,) = bench.table()["groups"]
    assert group["mean"] == {"student0": 12, "ensemble": 7} and (group["runs"], group["failed"]) == (3, 0)
    assert group["deviation"]["student0"] == statistics.stdev([10, 14, 12])
    page = (bench.out / "table.md").read_text()
    assert page in out and ["mfef", "3", "12.00 ± 2.00", "7.00 ± 2.00", ""] in table(page)
    assert ["seed2", "finished", "12.00", "7.00", ""] in table(page)
    assert len({line.rindex("|", 0, -1) for line in page.splitlines() if " 10.00 " in line or " 14.00 " in line}) == 1
    assert "validation" not in page and page.startswith("# Top-1 errors on the test set after the last epoch")
    assert bench.calls() == ["train seed0", "train seed1", "train seed2"]


@pytest.mark.fault(100)
def test_validation_errors_have_columns_of_their_own(tmp_path):
    test, held_out = {"student0": 10.0, "fused": 8.0}, {"student0": 12.0, "fused": 9.0}
    names = {"status": "finished", "group": "all", "folder": ""}
    rows = [Row(name=str(seed), top1_error=test, validation_top1_error=held_out, **names) for seed in range(2)]
    write_tables(tmp_path, tmp_path / "spec.toml", rows)
    page = (tmp_path / "table.md").read_text()
    assert "on the test set or, where named, on validation images after the last epoch" in page
    columns = ["student0", "fused", "student0 (validation)", "fused (validation)"]
    assert ["runs", "n", *columns, "note"] in table(page)
    assert ["all", "2", "10.00 ± 0.00", "8.00 ± 0.00", "12.00 ± 0.00", "9.00 ± 0.00", ""] in table(page)
    # A run of an older version has none.
    (group,) = grouped([rows[0], Row(name="2", top1_error=test, **names)])
    assert group["mean"] == test


def test_balanced_errors_have_columns_where_they_are_others(tmp_path):
    names = {"status": "finished", "folder": "", "top1_error": {"student0": 10.0, "fused": 8.0}}
    intervals = {"student0": [8.0, 12.5], "fused": [6.0, 10.0]}
    for balanced, columns in ((10.2, []), (30.0, ["student0 (balanced)", "fused (balanced)"])):
        errors = {"balanced_error": {"student0": balanced, "fused": 8.1}, "top1_error_interval": intervals}
        older = Row(name="older", group="older", **names)
        write_tables(tmp_path, tmp_path / "spec.toml", [Row(name="new", group="new", **names, **errors), older])
        page = table((tmp_path / "table.md").read_text())
        assert ["run (folder)", "status", "student0", "fused", *columns, "reason"] in page
        assert ["older", "finished", "10.00", "8.00", *[""] * len(columns), ""] in page
        written = json.loads((tmp_path / "table.json").read_text())
        assert written["runs"][0]["top1_error_interval"] == intervals
        assert written["groups"][0]["mean"]["student0 (balanced)"] == balanced
    assert ["new", "finished", "10.00", "8.00", "30.00", "8.10", ""] in page


def test_latencies_are_in_the_table_where_they_were_measured(bench):
    bench.sweep()
    assert "Milliseconds" not in (bench.out / "table.md").read_text()
    timing = {"predictor": "student0", "runtime": "onnx", "device": "cpu", "batch": 1, "threads": 1}
    found = {"format": 1, "machine": {}, "image_size": [8, 8], "predictors": {}}
    found["timings"] = [{**timing, "milliseconds": 0.5}, {**timing, "threads": 2, "milliseconds": 9}]
    (bench.out / "seed1" / "latency.json").write_text(json.dumps(found))
    (bench.out / "seed2" / "latency.json").write_text("{}")
    rows = bench.sweep()
    assert [row.milliseconds for row in rows.values()] == [{}, {"student0": 0.5}, {}]
    page = (bench.out / "table.md").read_text().partition("Milliseconds of one image")[2]
    assert ["seed1", "0.5"] in table(page) and "seed2" not in page


def test_a_group_with_a_failed_run_has_no_mean(bench, capsys):
    bench.act(**{"ffl-seed1": ["exit 5 student0 diverged | in epoch 3"]})
    rows = bench.sweep(f'{SHARED}[grid]\nmethod = ["ffl", "dml"]\nseed = [0, 1]')
    assert (rows["ffl-seed1"].status, rows["ffl-seed1"].reason) == ("FAILED", "student0 diverged | in epoch 3")
    assert [row.status for row in rows.values()].count("finished") == 3
    ffl, dml = bench.table()["groups"]
    assert (ffl["name"], ffl["runs"], ffl["failed"], ffl["mean"], ffl["deviation"]) == ("ffl", 2, 1, {}, {})
    assert dml["mean"]["student0"] == 12
    page = (bench.out / "table.md").read_text()
    assert "| student0 diverged \\| in epoch 3 |" in page
    assert ["ffl", "2", "", "", "1 of 2 failed: no mean"] in table(page)
    assert "1 of 2 failed: no mean" in capsys.readouterr().out


@pytest.mark.parametrize("status", [1, 5, 6])
def test_errors_of_a_run_are_not_tried_again(bench, status):
    bench.act(seed1=[f"exit {status} what, where and the fix"])
    rows = bench.sweep()
    assert (rows["seed1"].status, rows["seed1"].reason) == ("FAILED", "what, where and the fix")
    assert bench.calls().count("train seed1") == 1 and rows["seed2"].status == "finished"


def test_without_a_line_or_a_summary_the_log_is_named(bench):
    bench.act(seed0=["exit 1"], seed1=["exit 0"])
    rows = bench.sweep()
    assert rows["seed0"].reason == f"ended with status 1: see {bench.out}/logs/seed0.log"
    assert rows["seed1"].reason == f"no summary.json shows how it ended: see {bench.out}/logs/seed1.log"


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (f"kill {signal.SIGKILL.value}", "killed by SIGKILL"),
        ("exit 143 terminated", "killed by SIGTERM"),
        ("exit 7 rank 1 was lost", "rank 1 was lost"),
    ],
)
def test_a_killed_run_is_tried_again_twice(bench, capsys, act, reason):
    # Before the first checkpoint, a run resumes from its first step.
    bench.act(seed0=["kill-early", act], seed1=["kill 9", act, act])
    rows = bench.sweep()
    assert rows["seed0"].status == "finished"
    assert rows["seed1"].reason == f"{reason}, the last of 3 attempts"
    assert bench.calls() == [
        "train seed0", "resume seed0", "resume seed0", "train seed1", "resume seed1", "resume seed1", "train seed2"
    ]  # fmt: skip
    assert "seed0: killed by SIGKILL: trying again, 1 of 2" in capsys.readouterr().out


def test_a_folder_without_a_config_starts_a_run_and_nothing_of_others_is_touched(bench):
    (bench.out / "seed0").mkdir(parents=True)
    (bench.out / "seed0" / "config.json.tmp-77").touch()
    (bench.out / "seed0" / ".lock").touch()
    (bench.out / "seed1").mkdir()
    (bench.out / "seed1" / "thesis.txt").write_text("mine")
    rows = bench.sweep()
    assert rows["seed0"].status == "finished"
    assert rows["seed1"].reason == f"run folder {bench.out}/seed1 is not empty"
    assert [path.name for path in (bench.out / "seed1").iterdir()] == ["thesis.txt"]


def test_a_sweep_resumes(bench):
    bench.act(seed0=["exit 5 diverged"], seed1=["exit 3 no data"], seed2=["kill 9", "kill 9", "kill 9"])
    rows = bench.sweep()
    assert [row.status for row in rows.values()] == ["FAILED"] * 3
    (bench.out / "seed1" / "checkpoints").mkdir()
    (bench.out / "seed1" / "checkpoints" / "epoch-000002.pt").touch()
    bench.act()
    rows = bench.sweep(SEEDS.replace("epochs", 'data_dir = "moved"\nepochs'))
    assert [row.status for row in rows.values()] == ["FAILED", "finished", "finished"]
    assert rows["seed0"].reason == "diverged"
    assert bench.calls() == ["resume seed1", "resume seed2"]
    assert all(line[-2:] == ["--data-dir", "moved"] for line in bench.words())
    again = bench.sweep()
    assert again == rows and bench.calls() == []


def test_runs_are_known_by_their_settings_and_not_by_their_names(bench):
    bench.sweep()
    for age, path in enumerate(sorted(bench.out.rglob("*"))):
        os.utime(path, (age * 1000, age * 1000))
    # The default written out, an axis more, another order, another device.
    text = f'{SHARED}device = "cpu"\nlearning_rate = 0.1\n[grid]\nmethod = ["dml", "mfef"]\nseed = [2, 1, 0]'
    rows = bench.sweep(text)
    assert list(rows) == ["dml-seed2", "dml-seed1", "dml-seed0", "seed2", "seed1", "seed0"]
    assert bench.calls() == ["train dml-seed2", "train dml-seed1", "train dml-seed0"]
    assert [group["name"] for group in bench.table()["groups"]] == ["dml", "mfef"]


@pytest.mark.parametrize("key", ["init", "teacher", "weights"])
def test_a_run_may_name_other_runs_from_where_the_command_is_given(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    first = {"init": "base", "teacher": "base", "weights": ["student0=base"]}[key]
    place = "student0=" * (key == "weights") + str(tmp_path / "base")
    whole, plain = ([place] if key == "weights" else place), {"networks": ["resnet8"], "method": {"name": "kd"}}
    runs = [run_from_mapping({**plain, key: each}, str) for each in (first, whole)]
    assert digest(runs[0]) == digest(runs[1]) != digest(run_from_mapping(plain, str))


def test_a_finished_run_that_is_damaged_has_failed_and_costs_no_other(bench):
    bench.sweep()
    (bench.out / "seed0" / "config.json").write_text("")
    (bench.out / "seed1" / "summary.json").unlink()
    rows = bench.sweep()
    assert [row.status for row in rows.values()] == ["FAILED", "finished", "finished"]
    assert rows["seed0"].reason.startswith(f"{bench.out}/seed0/config.json: ")
    assert bench.calls() == ["resume seed1"]


def test_a_chain_is_no_run_of_a_sweep(bench):
    text = SHARED.replace('["resnet20", "resnet20"]', '["resnet20", "resnet8"]')
    rows = bench.sweep(f'{text}[grid]\nmethod = ["takd", "dml"]\n')
    assert [row.status for row in rows.values()] == ["FAILED", "finished"] and bench.calls() == ["train dml"]
    assert rows["takd"].reason.startswith("takd in a sweep is one link of a chain: one network, and a teacher")


def test_another_run_in_the_folder_is_status_2(bench, capsys):
    bench.sweep()
    Path("spec.toml").write_text(SEEDS.replace("epochs = 4", "epochs = 5\nmethod.name = 'ffl'"))
    line = refused(capsys, ["sweep", "spec.toml", "--out", "sweep"], 2, "epochs 4 -> 5", "method.name mfef -> ffl")
    assert "sweep/seed0 holds a run with other settings" in line


def test_no_folder_is_that_of_two_runs(bench, capsys):
    shared = f'{SHARED}teacher_predictor = "student0"\n'
    bench.sweep(f'{shared}teacher = "big"')
    # The first entry is the run that there is, called mfef; the second one, which cannot be, would be called so.
    Path("spec.toml").write_text(f'{shared}[[runs]]\nteacher = "big"\n[[runs]]\n')
    assert [run.name for run in read_spec(Path("spec.toml"))] == ["teacher-big", "mfef"]
    refused(capsys, ["sweep", "spec.toml", "--out", "sweep"], 2, "sweep/mfef would be the folder of two runs")


@pytest.mark.fault(44)
def test_bad_images_are_left_out_in_all_runs(tmp_path):
    path, grid = (
        tmp_path / "spec.toml",
        'networks = ["resnet20", "resnet20"]\n[grid]\ndata = ["folder:resize=8", "folder"]\n',
    )
    path.write_text(grid)
    assert [run.config.data for run in read_spec(path, skip_bad=True)] == [
        "folder:resize=8,skip_bad=true",
        "folder:skip_bad=true",
    ]


@pytest.mark.fault(44)
def test_the_processes_of_a_sweep_leave_bad_images_out(bench):
    bench.sweep(SEEDS.replace('"digits"', '"folder"'), skip_bad=True)
    configs = [json.loads(each.read_text()) for each in bench.out.glob("*/config.json")]
    assert [each["data"] for each in configs] == ["folder:skip_bad=true"] * 3


def test_a_value_out_of_range_is_a_failed_row(bench):
    rows = bench.sweep(f"{SHARED}[grid]\nmomentum = [0.9, 1.5]")
    assert [row.status for row in rows.values()] == ["finished", "FAILED"]
    assert "momentum is 1.5" in rows["momentum-1.5"].reason
    assert bench.calls() == ["train momentum-0.9"]
    rows = bench.sweep(f'{SHARED}[grid]\nnetworks = [["resnet20"], ["resnet21"]]', skip_bad=False)
    assert "unknown network 'resnet21'" in rows["resnet21"].reason and bench.calls() == ["train resnet20"]


def test_a_folder_that_is_a_run_or_in_use_is_refused(bench, capsys):
    bench.sweep()
    refused(capsys, ["sweep", "spec.toml", "--out", "sweep/seed0"], 2, "sweep/seed0 is a run folder")
    lock = lock_folder(bench.out)
    try:
        refused(capsys, ["sweep", "spec.toml", "--out", "sweep"], 2, f"pid {os.getpid()}")
    finally:
        lock.close()


@pytest.mark.parametrize("ends", [False, True])
def test_a_process_that_outlived_its_sweep_is_waited_for(bench, monkeypatch, ends):
    bench.act(seed1=["kill 9"] * 3)
    bench.sweep()
    bench.act()
    summary = (bench.out / "seed0" / "summary.json").read_text()
    log = open(bench.out / "logs" / "seed1.log", "a")  # noqa: SIM115
    fcntl.flock(log, fcntl.LOCK_EX)

    def end():
        if ends:
            (bench.out / "seed1" / "summary.json").write_text(summary)
        with (bench.folder / "calls.txt").open("a") as calls:
            calls.write("end seed1\n")
        log.close()

    waits = on_waiting(monkeypatch, end)
    rows = bench.sweep(slots=2)
    assert [row.status for row in rows.values()] == ["finished"] * 3
    assert bench.calls() == ["end seed1"] + ["resume seed1"] * (not ends)
    assert len(waits) == 1 and waits[0].startswith("seed1: waits")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_the_runs_save(bench, capsys, number, status):
    Path("spec.toml").write_text(SEEDS)
    bench.act(seed1=["wait"])
    with signalled(bench, number):
        refused(capsys, ["sweep", "spec.toml", "--out", "sweep"], status, "the same command resumes")
    assert [row["status"] for row in bench.table()["runs"]] == ["finished", "unfinished", "unfinished"]
    assert json.loads((bench.out / "seed1" / "summary.json").read_text())["status"] == "interrupted"
    assert "2 of 3 unfinished: no mean" in (bench.out / "table.md").read_text()
    bench.act()
    assert all(row.status == "finished" for row in bench.sweep().values())
    assert bench.calls() == ["resume seed1", "train seed2"]


def test_what_a_sweep_beside_this_one_gave_up_has_failed_here_too(bench, monkeypatch):
    (bench.out / "logs").mkdir(parents=True)
    other = Claims(bench.out / "logs")
    assert other.take("seed0") == (True, {}) and other.take("seed2")[0]
    other.write(["seed0", "seed2"], job="job 7")

    def give_up():
        other.write(["seed0"], failed="no data")
        other.write(["seed2"])
        other.close()

    waits = on_waiting(monkeypatch, give_up)
    rows = bench.sweep()
    assert [row.status for row in rows.values()] == ["FAILED", "finished", "finished"] and len(waits) == 1
    assert waits[0] == "seed0: waits for job 7 that still works on it" and rows["seed0"].reason == "no data"
    assert bench.calls() == ["train seed1", "train seed2"]
    assert [row.status for row in bench.sweep().values()] == ["finished"] * 3  # one that starts later tries again


@pytest.mark.fault(44)
def test_what_a_sweep_at_work_gave_up_before_has_failed_here_too(bench):
    Path("spec.toml").write_text(SEEDS)
    with at_work(bench.out, lambda: read_spec(Path("spec.toml"))):
        other = Claims(bench.out / "logs")
        assert other.take("seed0")[0]
        other.write(["seed0"], failed="no data")
        other.close()
        (bench.out / "logs" / "seed1.claim").write_bytes(b"\xff")
        (bench.out / "logs" / "seed2.claim").write_text("3")
        rows = bench.sweep()
        assert [row.status for row in rows.values()] == ["FAILED", "finished", "finished"]
        assert rows["seed0"].reason == "no data" and bench.calls() == ["train seed1", "train seed2"]
    assert [row.status for row in bench.sweep().values()] == ["finished"] * 3  # alone, it tries again


def test_slots_share_the_threads(bench, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    bench.sweep(slots=3)
    assert [line[3] for line in bench.words()] == ["threads=2"] * 3
    shutil.rmtree(bench.out)
    bench.sweep(slots=1)
    assert [line[3] for line in bench.words()] == ["threads=-"] * 3
    shutil.rmtree(bench.out)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    bench.sweep(slots=3)
    assert [line[3] for line in bench.words()] == ["threads=5"] * 3


def test_slots_share_the_gpus(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    bench.sweep()
    assert sorted({line[2] for line in bench.words()}) == ["gpu=4", "gpu=7"]
    shutil.rmtree(bench.out)
    bench.sweep(SEEDS.replace("epochs", 'device = "cuda:1"\nepochs'))
    assert {line[2] for line in bench.words()} == {"gpu=4,7"}


# Runs side by side in one process.

ALL = "seed0+seed1+seed2"


def test_runs_side_by_side_share_a_process(bench, capsys):
    rows = bench.sweep(side_by_side=True)
    assert bench.calls() == [f"train {ALL}"]
    assert [row.status for row in rows.values()] == ["finished"] * 3
    recipes = [str(bench.out / "recipes" / f"seed{seed}.json") for seed in (0, 1, 2)]
    assert bench.words()[0][4:] == ["--recipes", *recipes, "--out", str(bench.out)]
    assert "seed0, seed1, seed2: start side by side" in capsys.readouterr().out
    logs = [(bench.out / "logs" / f"seed{seed}.log").read_text() for seed in (0, 1, 2)]
    assert logs[1] == logs[2] == f"{logs[0]}{bench.out}/logs/seed0.log has its output\n"
    bench.act(**{f"seed{seed}": ["kill-early"] for seed in (0, 1, 2)})
    assert bench.sweep(side_by_side=True) == rows and bench.calls() == []


def test_runs_that_can_train_side_by_side_are_dealt_out_to_the_slots(tmp_path):
    text = f"{SHARED.replace('epochs = 4', '')}[grid]\nepochs = [4, 5]\nseed = [0, 1, 2, 3]\n"
    parts = assign(planned(tmp_path, text), 3, True)
    assert [[run.name for run in part] for part in parts] == [
        [f"epochs-{epochs}-seed{seed}" for seed in share] for epochs in (4, 5) for share in ((0, 3), (1,), (2,))
    ]


def test_no_process_gets_too_many_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("codistill.sweeps.dealing.LARGEST_SHARE", 2)
    parts = assign(planned(tmp_path, SEEDS), 1, True)
    assert [[run.name for run in part] for part in parts] == [["seed0", "seed2"], ["seed1"]]


@pytest.mark.parametrize(
    ("device", "capturable", "calls"),
    [("auto", True, 1), ("cuda:1", True, 1), ("cpu", True, 3), ("auto", False, 3)],
)
def test_by_default_runs_share_a_process_where_they_share_a_graph(tmp_path, monkeypatch, device, capturable, calls):
    runs = planned(tmp_path, SEEDS.replace("epochs", f'device = "{device}"\nepochs'))
    monkeypatch.setattr(cd.MFEF, "capturable", capturable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(assign(runs, 1, None)) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(assign(runs, 1, None)) == calls and len(assign(runs, 1, False)) == 3


def test_one_that_diverges_does_not_cost_those_beside_it(bench):
    bench.act(seed1=["exit 5 student0 diverged"])
    rows = bench.sweep(side_by_side=True)
    assert [row.status for row in rows.values()] == ["finished", "FAILED", "finished"]
    assert rows["seed1"].reason == "student0 diverged" and bench.calls() == [f"train {ALL}"]


def test_after_a_kill_started_runs_resume_and_the_others_start(bench, capsys):
    bench.act(seed1=["kill 9"])
    spec = SEEDS.replace("epochs", 'data_dir = "here"\nepochs')
    rows = bench.sweep(spec, side_by_side=True)
    assert [row.status for row in rows.values()] == ["finished"] * 3
    assert bench.calls() == [f"train {ALL}", f"resume {ALL}"]
    assert bench.words()[1][-2:] == ["--data-dir", "here"]
    assert "seed2: killed by SIGKILL: trying again, 1 of 2" in capsys.readouterr().out
    for name in ("seed0", "seed2"):
        shutil.rmtree(bench.out / name)
    (bench.out / "seed1" / "summary.json").unlink()
    bench.act()
    assert [row.status for row in bench.sweep(spec, side_by_side=True).values()] == ["finished"] * 3
    assert bench.calls() == ["resume seed1", "train seed0+seed2"]


def test_the_last_attempt_is_alone(bench):
    bench.act(seed1=["kill-early"] * 3)
    rows = bench.sweep(side_by_side=True)
    assert [row.status for row in rows.values()] == ["finished", "FAILED", "finished"]
    assert rows["seed1"].reason == "killed by SIGKILL, the last of 3 attempts"
    assert bench.calls() == [f"train {ALL}", f"resume {ALL}", "resume seed0", "resume seed1", "resume seed2"]


@pytest.mark.parametrize("status", [0, 2])
def test_after_other_errors_runs_are_tried_in_halves(bench, status):
    bench.act(seed3=[f"exit {status} what, where and the fix"] * 4)
    rows = bench.sweep(SEEDS.replace("2]", "2, 3]"), side_by_side=True)
    assert [row.status for row in rows.values()] == ["finished"] * 3 + ["FAILED"]
    assert ("summary.json" if status == 0 else "what, where and the fix") in rows["seed3"].reason
    parts = [f"{ALL}+seed3", "seed0+seed1", "seed2+seed3", "seed2", "seed3"]
    assert bench.calls() == [f"train {part}" for part in parts]


def test_a_stopped_process_leaves_ended_runs_in_the_table_and_the_rest_resumes_together(bench, capsys):
    Path("spec.toml").write_text(SEEDS)
    bench.act(seed0=["done"], seed1=["wait"])
    held = []

    def note_locks():
        for seed in (0, 1, 2):
            with open(bench.out / "logs" / f"seed{seed}.log") as log:
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(seed)

    with signalled(bench, signal.SIGTERM, note_locks):
        line = ["sweep", "spec.toml", "--out", "sweep", "--side-by-side", "True"]
        refused(capsys, line, 143, "the same command resumes")
    assert held == [0, 1, 2]
    assert [row["status"] for row in bench.table()["runs"]] == ["finished", "unfinished", "unfinished"]
    bench.act()
    assert all(row.status == "finished" for row in bench.sweep(side_by_side=True).values())
    assert bench.calls() == ["resume seed1+seed2"]


def test_a_process_that_works_on_one_of_several_costs_the_others_no_time(bench, monkeypatch):
    (bench.out / "logs").mkdir(parents=True)
    log = open(bench.out / "logs" / "seed1.log", "a")  # noqa: SIM115
    fcntl.flock(log, fcntl.LOCK_EX)

    waits = on_waiting(monkeypatch, log.close)
    rows = bench.sweep(side_by_side=True)
    assert [row.status for row in rows.values()] == ["finished"] * 3
    assert bench.calls() == ["train seed0+seed2", "train seed1"]
    assert waits == ["seed1: waits for a process of an earlier sweep that still works on it"]


def test_workers_are_started_as_the_sweep_was(monkeypatch):
    command = ["sweep", "spec.toml", "--out", "x"]
    for start in (["mine.py"], ["-m", "mine"], ["-c", "import mine"]):
        for started in ([*start, *command], [*start, "--debug", *command], [*start, *command, "--debug"]):
            monkeypatch.setattr(sys, "orig_argv", ["python", *started])
            assert own_program(command) == [sys.executable, *start]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest"])
    assert own_program(command) == [sys.executable, "-m", "codistill"]


def test_status_7_names_the_failed_runs(bench, capsys):
    bench.act(seed2=["exit 3 no data"])
    Path("spec.toml").write_text(SEEDS)
    refused(capsys, ["sweep", "spec.toml", "--out", "sweep"], 7, "1 of 3 runs failed: seed2", "sweep/table.md")
    bench.act()
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sweep", "spec.toml", "--out", "sweep"]) == 0
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_specs_of_the_repository_are_sweeps(path):
    runs = read_spec(path)
    assert len(runs) > 1 and path.read_text().startswith("# ")
    for run in {run.config.method_name: run for run in runs}.values():
        build_method(run.config, {"digits": 10, "cifar100": 100}[run.config.data.partition(":")[0]], (32, 32))


def test_on_a_cpu_slots_are_measured(bench, monkeypatch, tmp_path):
    seen = []

    def share(plans, splits):
        seen.append((len(plans), plans[0].config.train.seed))
        return 3, 1

    (tmp_path / "few.toml").write_text(f"{SHARED}train_limit = 20\n[grid]\nseed = [4, 5, 6]\n")
    runs = read_spec(tmp_path / "few.toml")
    monkeypatch.setattr(local, "share_cores", share)
    assert measured_slots(runs) == 3 and seen == [(3, 4)]
    assert measured_slots(runs[:1]) == 1  # alone
    (tmp_path / "none.toml").write_text(
        'networks = ["resnet20"]\ndata = "folder"\ndata_dir = "none"\n[grid]\nseed = [1, 2]\n'
    )
    assert measured_slots(read_spec(tmp_path / "none.toml")) == 1  # its processes say why
    monkeypatch.setattr(local, "measured_slots", lambda runs: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    bench.sweep()
    assert [line[3] for line in bench.words()] == ["threads=2"] * 3


# What is to come, and what is going on.


def test_a_dry_run_shows_order_minutes_and_how_they_were_estimated_and_changes_nothing(bench, capsys, monkeypatch):
    bench.act(seed1=["exit 5 diverged"], seed2=["kill 9"] * 3)
    bench.sweep()
    (bench.out / "seed2" / "metrics.jsonl").write_text('{"seconds": 30.0}\n')
    summary = json.loads((bench.out / "seed0" / "summary.json").read_text())
    (bench.out / "seed0" / "summary.json").write_text(
        json.dumps({**summary, "wall_seconds": 12.0, "train_seconds": 240.0, "epochs": 4})
    )
    monkeypatch.setattr(progress, "measured_epoch", lambda config: 6.0 if config.method_name == "dml" else None)
    Path("spec.toml").write_text(f'{SHARED}[grid]\nmethod = ["ffl", "dml", "mfef"]\nseed = [2, 1, 0, 3]')
    before = tiny.listing(bench.folder)
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    line = ["sweep", "spec.toml", "--out", "sweep", "--dry-run", "--slots", "2"]
    for executor in ("local", "slurm", "ray"):  # none of them is reached
        assert main([*line, "--executor", executor]) == 0
        out = capsys.readouterr().out
        cells = table(out)
        assert ["1", "ffl-seed2", "start", "unknown", "unknown"] in cells
        assert ["5", "dml-seed2", "start", "0.4", "steps measured on this CPU"] in cells
        assert ["9", "seed2", "resume after epoch 1", "1.5", "its own epochs"] in cells
        assert ["10", "mfef-seed3", "start", "4.0", "a finished run"] in cells
        assert ["", "seed0", "none: finished", "", ""] in cells and [
            "",
            "seed1",
            "none: FAILED",
            "",
            "diverged",
        ] in cells
        # 4 x 0.4 + 1.5 + 4 minutes for 6 of 10 runs, the others as long as these, two at a time.
        assert "12 runs, 10 to do: about 5:55, 2 at a time" in out
        assert tiny.listing(bench.folder) == before
    assert main([*line[:3], "new", *line[4:]]) == 0 and not Path("new").exists()
    signal.signal(signal.SIGTERM, handler)


def test_the_minutes_of_a_run_are_measured_by_its_steps(tmp_path):
    text = 'networks = ["resnet20"]\nmethod = "independent"\ndata = "digits"\ntrain_limit = 16\nbatch_size = 8\n'
    (run,) = planned(tmp_path, text)
    seconds = progress.measured_epoch(run.config)
    assert seconds is not None and seconds > 0 and torch.get_num_threads() == 1
    (elsewhere,) = planned(tmp_path, f'{text}device = "cuda"')
    (nowhere,) = planned(tmp_path, text.replace("digits", "folder"))
    assert progress.measured_epoch(elsewhere.config) is None and progress.measured_epoch(nowhere.config) is None


def test_a_terminal_has_a_live_table_of_what_runs(bench, monkeypatch):
    bench.act(seed0=["wait"])
    drawn = io.StringIO()
    console = functools.partial(lasting_console, force_terminal=True, file=drawn, width=100)
    monkeypatch.setattr(sweep_module, "lasting_console", console)
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.0)
    monkeypatch.setattr(progress, "measured_epoch", lambda config: 15.0)

    def go():
        late = time.monotonic() + 60
        while not (bench.out / "seed0" / "waiting").exists() and time.monotonic() < late:
            time.sleep(0.01)
        (bench.out / "seed0" / "metrics.jsonl").write_text('{"seconds": 60.0}\n')
        while not re.search("about 5:00.*1 of 4", drawn.getvalue(), re.DOTALL) and time.monotonic() < late:
            time.sleep(0.01)
        (bench.folder / "go").touch()

    thread = threading.Thread(target=go)
    thread.start()
    bench.sweep()
    thread.join()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.getvalue())
    # Of 4 epochs of 15 seconds each; then 3 of a minute by the run's own, and two runs of a minute.
    assert "0 done, 1 running, 0 failed, 2 waiting; time left: about 3:00" in shown
    assert re.search(r"seed0 +0 of 4 +1:00", shown) and re.search(r"seed0 +1 of 4 +3:00", shown)
    assert "time left: about 5:00" in shown and "seed1: finished  test error %" in shown
