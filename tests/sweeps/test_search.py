"""`[search]` in a spec: trials that Optuna chooses by validation errors, and that no restart repeats."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.core.signals import Terminated
from codistill.sweeps import search as search_module
from codistill.sweeps.driver import sweep
from codistill.sweeps.engines.local import Local
from codistill.sweeps.reproduce.cells import protocols
from codistill.sweeps.search import Search, read_search

from ..data.writers import encode, write_folder
from .bench import Bench

pytestmark = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="no optuna here")
SHARED = 'networks = ["resnet20", "resnet20"]\ndata = "digits"\nepochs = 4\nvalidation = 100\n'
SPACE = "[search.space]\nlearning_rate = { low = 0.01, high = 0.2, log = true }\n"
SEARCH = f"{SHARED}[search]\ntrials = 6\n{SPACE}"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("codistill.sweeps.engines.engine.Engine.seconds", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = Bench(tmp_path)
    monkeypatch.setattr("codistill.cli.commands.own_program", lambda arguments: made.program)
    return made


def result(bench):
    return json.loads((bench.out / "search.json").read_text())


def rates(bench):
    return [each["settings"]["learning_rate"] for each in result(bench)["trials"]]


def test_the_best_is_chosen_on_validation_images(bench, capsys):
    rows = bench.sweep(SEARCH, slots=2)
    found = result(bench)
    assert [row.status for row in rows.values()] == ["finished"] * 6 and list(rows) == [
        f"trial-{n:04d}" for n in range(6)
    ]
    near = min(found["trials"], key=lambda each: abs(each["settings"]["learning_rate"] - 0.05))
    assert found["best"] == near["trial"] and found["predictor"] == "student0"
    miss = 100 * abs(near["settings"]["learning_rate"] - 0.05)
    assert near["validation_error"] == pytest.approx(miss) and near["test_error"] == pytest.approx(50 - miss)
    assert near["test_error"] == max(
        each["test_error"] for each in found["trials"]
    )  # the test set would choose another
    assert all(0.01 <= rate <= 0.2 for rate in rates(bench)) and len(set(rates(bench))) == 6
    words = " ".join(capsys.readouterr().out.split())
    said = f"validation error of student0 {miss:.2f} %; its test error, by which nothing was chosen: {50 - miss:.2f} %"
    assert f"best of 6 trials that finished, of 6: {near['trial']}" in words and said in words


def test_a_trial_is_the_mean_of_its_seeds(bench):
    rows = bench.sweep(SEARCH.replace("trials = 6", "trials = 2\n") + "[grid]\nseed = [0, 1, 3]\n", slots=1)
    assert list(rows)[:3] == ["trial-0000-seed0", "trial-0000-seed1", "trial-0000-seed3"] and len(rows) == 6
    for each in result(bench)["trials"]:  # the worker adds the seed
        miss = 100 * abs(each["settings"]["learning_rate"] - 0.05)
        assert each["validation_error"] == pytest.approx(miss + (0 + 1 + 3) / 3)


def test_the_best_student_may_be_another_one_in_each_run(bench):
    bench.sweep(SEARCH.replace("trials = 6", 'trials = 2\npredictor = "best"'), slots=1)
    for each in result(bench)["trials"]:
        miss = 100 * abs(each["settings"]["learning_rate"] - 0.05)
        assert each["validation_error"] == pytest.approx(miss / 2)  # student1
        assert each["test_error"] == 10


@pytest.mark.fault(170)
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "STARTUP", 2)
    text = SEARCH.replace("trials = 6", "trials = 5")
    (tmp_path / "whole").mkdir()
    whole = Bench(tmp_path / "whole")
    whole.sweep(text, slots=1)
    bench.act(**{"trial-0003": ["kill-early"]})
    ask = Search._ask

    def stop(state):
        runs = ask(state)
        if runs[0].name == "trial-0003" and not (bench.folder / "stopped").exists():
            (bench.folder / "stopped").touch()
            raise Terminated
        return runs

    monkeypatch.setattr(Search, "_ask", stop)
    with pytest.raises(Terminated, match="the same command resumes"):
        bench.sweep(text, slots=1)
    assert bench.calls() == [f"train trial-000{n}" for n in range(3)]
    bench.sweep(text, slots=1)
    assert [call.split()[1] for call in bench.calls()] == ["trial-0003", "trial-0003", "trial-0004"]  # chosen before
    assert result(bench) == result(whole)
    bench.sweep(text.replace("trials = 5", "trials = 6"), slots=1)  # more of them may be wanted
    assert bench.calls() == ["train trial-0005"] and rates(bench)[:5] == rates(whole)


@pytest.mark.fault(170)
def test_what_a_killed_process_left_half_done_costs_nothing(bench):
    bench.sweep(SEARCH.replace("trials = 6", "trials = 2"), slots=1)
    journal = bench.out / "search.journal"
    before = journal.read_bytes()
    asked = b'{"op_code":4,"worker_id":"x-1","study_id":0,"datetime_start":"2026-11-29T19:08:00+00:00"}\n'
    journal.write_bytes(before + asked + b'{"op_code":5,"worker_id":"x-1","tri')
    (bench.out / "search.journal.lock").symlink_to(journal)
    rows = bench.sweep(SEARCH.replace("trials = 6", "trials = 3"), slots=1)
    assert list(rows) == ["trial-0000", "trial-0001", "trial-0003"] and bench.calls() == ["train trial-0003"]
    assert journal.read_bytes().startswith(before + asked)


def test_failed_trials_are_told_and_not_tried_again(bench, capsys):
    bench.act(**{"trial-0001": ["exit 5 diverged"], "trial-0002": ["exit 3 gone"]})
    (bench.folder / "spec.toml").write_text(SEARCH)
    command = ["sweep", str(bench.folder / "spec.toml"), "--out", str(bench.out), "--slots", "1"]
    assert main(command) == 0
    assert "trial-0002: failed: gone" in capsys.readouterr().out
    for _ in range(2):
        status = [each["status"] for each in result(bench)["trials"]]
        assert status == ["complete", "fail", "fail", "complete", "complete", "complete"]
        (bench.folder / "calls.txt").unlink(missing_ok=True)
        assert main(command) == 0 and bench.calls() == []
    reasons = {row["name"]: row["reason"] for row in bench.table()["runs"] if row["status"] == "FAILED"}
    assert reasons == {"trial-0001": "diverged", "trial-0002": "gone"}
    assert result(bench)["trials"][1]["validation_error"] is None


def test_a_search_of_which_all_fails_says_so(bench, capsys):
    bench.act(**{f"trial-000{n}": ["exit 5 diverged"] for n in range(6)})
    (bench.folder / "spec.toml").write_text(SEARCH)
    assert main(["sweep", str(bench.folder / "spec.toml"), "--out", str(bench.out), "--slots", "1"]) == 7
    said = capsys.readouterr()
    assert "none of 6 trials has finished" in said.out and "6 of 6 runs failed" in said.err
    assert result(bench)["best"] is None


@pytest.mark.parametrize(("failing", "status"), [((0, 1), 7), ((0,), 0)])
def test_a_trial_counts_if_all_its_runs_have_finished(bench, failing, status):
    bench.act(**{f"trial-000{n}-seed1": ["exit 3 gone"] for n in failing})
    text = SEARCH.replace("trials = 6", "trials = 2\n") + "[grid]\nseed = [0, 1]\n"
    (bench.folder / "spec.toml").write_text(text)
    command = ["sweep", str(bench.folder / "spec.toml"), "--out", str(bench.out), "--slots", "1"]
    ends = {
        f"trial-000{n}-seed{seed}": "FAILED" if n in failing and seed else "finished" for n in (0, 1) for seed in (0, 1)
    }
    for _ in range(2):  # what has finished stays so
        assert main(command) == status
        assert {row["name"]: row["status"] for row in bench.table()["runs"]} == ends


def test_a_spec_may_go_while_its_runs_are_trained(bench, monkeypatch):
    (bench.folder / "spec.toml").write_text(SEARCH)
    start = Local.start

    def gone(engine, works, logs):
        (bench.folder / "spec.toml").unlink(missing_ok=True)
        return start(engine, works, logs)

    monkeypatch.setattr(Local, "start", gone)
    bench.act(**{"trial-0001": ["exit 3 gone"]})
    assert main(["sweep", str(bench.folder / "spec.toml"), "--out", str(bench.out), "--slots", "1"]) == 0


def test_equal_trials_are_one_run(bench):
    values = 'learning_rate = [0.05, 0.1]\nnetworks = [["resnet20", "resnet20"]]\n"method.temperature" = [2]\n'
    text = SEARCH.replace('networks = ["resnet20", "resnet20"]\n', "").replace(SPACE, f"[search.space]\n{values}")
    rows = bench.sweep(text, slots=1)
    found = result(bench)["trials"]
    assert len(rows) == len(bench.calls()) == 2 and len(found) == 6
    assert {each["settings"]["learning_rate"]: each["validation_error"] for each in found} == {0.05: 0, 0.1: 5}
    assert all(each["settings"]["networks"] == ["resnet20", "resnet20"] for each in found)


@pytest.mark.fault(170)
def test_another_search_in_its_folder_is_refused(bench):
    bench.sweep(SEARCH, slots=1)
    (bench.folder / "spec.toml").write_text(SEARCH.replace("0.01", "0.02").replace("epochs = 4", "epochs = 5"))
    with pytest.raises(
        UsageError, match=r"journal is of a search with other settings \(epochs, space\): choose another"
    ):
        sweep(bench.folder / "spec.toml", bench.out, program=bench.program, show=False)
    moved = SEARCH.replace("epochs", 'data_dir = "."\nepochs')  # another place is no other search
    assert len(bench.sweep(moved, slots=1)) == 6 and bench.calls() == []


@pytest.mark.fault(170)
def test_two_commands_do_not_search_in_one_folder(bench):
    (bench.folder / "spec.toml").write_text(SEARCH)
    bench.out.mkdir()
    searching = Search(read_search(bench.folder / "spec.toml"), bench.out, False)
    searching.begin()
    with pytest.raises(UsageError, match=r"another process searches in .*sweep: wait for it, or choose another --out"):
        sweep(bench.folder / "spec.toml", bench.out, program=bench.program, show=False)
    searching.close()
    assert len(bench.sweep(SEARCH, slots=1)) == 6


def test_the_folder_of_a_plain_sweep_is_refused(bench):
    bench.sweep(f"{SHARED}method = 'dml'\n", slots=1)
    (bench.folder / "spec.toml").write_text(SEARCH)
    with pytest.raises(UsageError, match="holds runs that are no trials of a search: choose another --out"):
        sweep(bench.folder / "spec.toml", bench.out, program=bench.program, show=False)


@pytest.mark.fault(170)
@pytest.mark.parametrize("content", ["{}\n", "[\n"])
def test_a_damaged_journal_is_one_line(bench, content):
    (bench.folder / "spec.toml").write_text(SEARCH)
    bench.out.mkdir()
    (bench.out / "search.journal").write_text(content)
    with pytest.raises(UsageError, match=r"search\.journal: damaged \(.*\): choose another --out"):
        sweep(bench.folder / "spec.toml", bench.out, program=bench.program, show=False)


def test_a_dry_run_shows_the_trials_that_are_left_and_changes_nothing(bench, capsys, monkeypatch):
    monkeypatch.setattr("codistill.sweeps.progress.measured_epoch", lambda config: 60.0)
    bench.sweep(SEARCH.replace("trials = 6", "trials = 2"), slots=1)
    (bench.folder / "spec.toml").write_text(SEARCH)
    before = {each: each.read_bytes() for each in bench.out.rglob("*") if each.is_file()}
    capsys.readouterr()
    assert main(["sweep", "spec.toml", "--out", "sweep", "--dry-run", "--slots", "2"]) == 0
    said = capsys.readouterr().out
    assert "6 runs, 4 to do: about" in said and "trial-0005" in said and "none: finished" in said
    assert {each: each.read_bytes() for each in bench.out.rglob("*") if each.is_file()} == before


SET = f"{SHARED}[search]\ntrials = 6\n"
WRONG = {
    SEARCH.replace("validation = 100\n", ""): "toml:6: a search chooses by validation errors: hold out training images",
    SEARCH.replace("trials = 6\n", ""): r"toml:6: \[search\] needs trials, a whole number above 0, and space",
    SET: r"\[search\] needs trials, a whole number above 0, and space, a table",
    SEARCH.replace("trials = 6", "trials = 0"): r"toml:6: trials in \[search\] is 0; it must be a whole number above 0",
    SEARCH.replace(
        "trials", 'sampler = "grid"\ntrials'
    ): r"toml:6: sampler in \[search\] is 'grid'; it must be tpe or random",
    SEARCH.replace(
        "trials", 'predictor = "studnt0"\ntrials'
    ): r"toml:6: there is no predictor 'studnt0': choose from best, student0, student1, ensemble, fused$",
    SEARCH.replace("trials", "trails = 2\ntrials"): r"toml:6: unknown key 'trails' in \[search\]: did you mean trials",
    f"{SEARCH}[[runs]]\n": r"beside \[search\], \[grid\] may have a list of seeds alone",
    f"{SEARCH}[grid]\nepochs = [1]\n": r"beside \[search\], \[grid\] may have a list of seeds alone",
    f"{SEARCH}[grid]\nseed = []\n": r"beside \[search\], \[grid\] may have a list of seeds alone",
    f"{SEARCH}epochs = [1, 2]\n": r"toml:9: epochs cannot be in \[search\.space\]: it is that of all trials",
    f"{SEARCH}validation = [1, 2]\n": r"toml:9: validation cannot be in \[search\.space\]",
    f"{SEARCH}momentum = 0.9\n": r"toml:9: momentum in \[search\.space\] must be a list of values, or a range: ",
    f"{SEARCH}momentum = {{ low = 0, high = 0.9, log = true }}\n": r"toml:9: momentum in .* low above 0 for log",
    f"{SEARCH}momentum = {{ low = 0.9, high = 0.5 }}\n": r"toml:9: momentum in \[search\.space\] must be",
    f"{SEARCH}momentum = {{ low = 0.1, high = 1.5 }}\n": r"toml:9: momentum is 1\.5; it must be from 0 to below 1",
    f"{SEARCH}momentun = [0.5, 0.9]\n": r"toml:9: unknown key 'momentun': did you mean momentum",
    f"{SEARCH}method.temprature = [2, 3]\n": r"toml:9: unknown key 'temprature': did you mean temperature",
}


@pytest.mark.parametrize(("text", "line"), WRONG.items())
def test_a_wrong_spec_is_one_line(tmp_path, text, line):
    (tmp_path / "spec.toml").write_text(text)
    with pytest.raises(UsageError, match=line):
        read_search(tmp_path / "spec.toml")


def test_images_of_the_data_set_may_choose(tmp_path):
    image = encode(np.zeros((8, 8, 3), np.uint8))
    names = [f"{part}/{name}/{index}.png" for part in ("train", "val", "test") for name in "ab" for index in (0, 1)]
    root = write_folder(tmp_path / "photos", dict.fromkeys(names, image))
    spec = SEARCH.replace("validation = 100\n", "").replace('"digits"', f'"folder"\ndata_dir = "{root}"')
    (tmp_path / "spec.toml").write_text(spec)
    assert read_search(tmp_path / "spec.toml").trials == 6
    (root / "val").rename(tmp_path / "val")
    with pytest.raises(UsageError, match="a search chooses by validation errors: hold out training images"):
        read_search(tmp_path / "spec.toml")


def test_a_predictor_that_is_not_there_is_one_line(bench):
    (bench.folder / "spec.toml").write_text(SEARCH.replace("trials", 'predictor = "fused"\ntrials'))
    with pytest.raises(UsageError, match="toml:6: there is no predictor 'fused': choose from best, student0, student1"):
        sweep(bench.folder / "spec.toml", bench.out, program=bench.program, slots=1, show=False)


def test_without_optuna_it_is_one_line(bench, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    (bench.folder / "spec.toml").write_text(SEARCH)
    assert main(["sweep", str(bench.folder / "spec.toml"), "--out", str(bench.out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "spec.toml:7: the package optuna is not installed here: " in line
        and "pip install" in line
        and not bench.out.exists()
    )


def test_a_search_has_no_controls(bench):
    (bench.folder / "spec.toml").write_text(SEARCH)
    with pytest.raises(UsageError, match="--controls: a search has none"):
        sweep(bench.folder / "spec.toml", bench.out, controls=True)


@pytest.mark.slow
def test_trials_are_trainings(tmp_path):
    text = 'data = "digits"\nmethod = "dml"\nnetworks = ["resnet8", "resnet8"]\nepochs = 1\ntrain_limit = 64\n'
    text += f"batch_size = 16\nthreads = 1\nmilestones = []\nvalidation = 32\n[search]\ntrials = 2\n{SPACE}"
    (tmp_path / "spec.toml").write_text(text)
    assert main(["sweep", str(tmp_path / "spec.toml"), "--out", str(tmp_path / "out"), "--slots", "1"]) == 0
    trials = json.loads((tmp_path / "out" / "search.json").read_text())["trials"]
    for each in trials:
        run = cd.Run(tmp_path / "out" / each["trial"])
        assert run.config.train.learning_rate == each["settings"]["learning_rate"]
        assert run.summary["validation_top1_error"]["student0"] == each["validation_error"]
        assert run.summary["top1_error"]["student0"] == each["test_error"]


def test_the_search_of_the_repository_has_the_settings_of_protocol_small():
    found = read_search(Path(__file__).parents[2] / "recipes" / "search-plus-small.toml")
    assert found is not None
    settings = protocols()["small"].settings
    assert {key: found.shared[key] for key in ("epochs", "precision")} == {
        key: settings[key] for key in ("epochs", "precision")
    }
    assert not settings.keys() & found.shared.keys() - {"epochs", "precision", "evaluate_every"}
