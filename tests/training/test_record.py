"""A training by a loop of one's own as a run folder; the loop is that of docs/training.md."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core.errors import DivergedError, UsageError
from codistill.methods import METHODS, Method
from codistill.training import record as module

from .. import tiny

pytestmark = pytest.mark.usefixtures("tiny_registered")
PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture
def no_page(monkeypatch):
    monkeypatch.setattr(module, "write_report", lambda run, summary: (run.path / "report.html").write_text("page"))
    monkeypatch.setattr(module, "keep_pictures", lambda *arguments: None)


def named_method():
    torch.manual_seed(0)
    return cd.MFEF([cd.network("tiny", 3), cd.network("tiny", 3)], 3, image_size=(8, 8))


@pytest.mark.parametrize("page", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loop_of_the_page_makes_a_run_like_any(tmp_path, monkeypatch, request, no_pages, page):
    if not page:
        request.getfixturevalue("no_page")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"<!-- run by .*?-->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code.count("\n") == 14
    data = cd.dataset("packed", tiny.write_npz(tmp_path / "colours.npz", tiny.data()))
    method = named_method()
    exec(code, scope := {"cd": cd, "data": data, "method": method, "epochs": 2})
    run = cd.Run("runs/mine")
    assert run.finished and run.path == scope["run"].path
    assert (run.path / "report.html").exists() and not list(run.path.glob("*.tmp*"))
    scores = run.evaluate(device="cpu")
    assert {name: each.top1_error for name, each in scores.items()} == run.summary["top1_error"]
    run.export("student0", tmp_path / "student.safetensors")
    assert cd.load_classifier(tmp_path / "student.safetensors").class_names == ["red", "green", "blue"]
    loaded = run.load_method().state_dict()
    assert all(torch.equal(loaded[name], each) for name, each in method.state_dict().items())
    with pytest.raises(UsageError, match="was trained by a loop of your own: start a new run from it with --init"):
        cd.resume(run.path, epochs=3)
    more = cd.train(named_method(), data, init=run, out="runs/more", settings=tiny.settings(epochs=1), show=False)
    assert more.metadata["init"] == str(run.path.absolute())


def test_a_history_and_its_refusals(tmp_path, no_page):
    data, method = tiny.data(), tiny.method()
    history = [{"loss": 2.0, "learning_rate": 0.1}, {"loss": 1.0, "learning_rate": 0.01}]
    run = cd.record(method, data, tmp_path / "run", history=history, seconds=4.0)
    rows = run.metrics()
    assert [(row["train"], row["learning_rate"]) for row in rows] == [({"loss": 2.0}, 0.1), ({"loss": 1.0}, 0.01)]
    assert run.summary["epochs"] == 2 and run.summary["images_per_second"] == 12.0
    assert run.load_method().cohort[0].spec == ""  # of one's own, handed in
    settings = cd.TrainSettings(epochs=9, milestones=(1, 5), learning_rate=0.5)
    asked = cd.record(method, data, tmp_path / "asked", history=history, settings=settings)
    assert asked.summary["epochs"] == 2 and "stopped_early" not in asked.summary
    assert (asked.config.train.milestones, asked.config.train.learning_rate) == ((1,), 0.5)
    before = tiny.listing(tmp_path)
    with pytest.raises(UsageError, match="is not empty"):
        cd.record(method, data, tmp_path / "run")
    with pytest.raises(UsageError, match=r"history of epoch 1 is \{'loss': 'low'\}; it must be finite numbers by name"):
        cd.record(method, data, tmp_path / "other", history=[{"loss": "low"}])
    with pytest.raises(UsageError, match=r"history of epoch 1 is \{'loss': nan\}; it must be finite numbers by name"):
        cd.record(method, data, tmp_path / "other", history=[{"loss": math.nan}])
    broken = tiny.method()
    broken.cohort[1].head.linear.weight.data.fill_(math.nan)
    with pytest.raises(DivergedError, match="student1"):
        cd.record(broken, data, tmp_path / "other")
    assert tiny.listing(tmp_path) == before
    assert json.loads((tmp_path / "run/config.json").read_text())["own_loop"] is True


def test_what_the_loop_did_not_keep_is_not_made_up(tmp_path, no_page):
    settings = tiny.settings(ema_decay=0.9, validation=6, patience=2)
    run = cd.record(tiny.method(), tiny.data(), tmp_path / "run", settings=settings)
    assert list(run.evaluate()) == list(run.summary["top1_error"]) == list(run.predictors())
    with pytest.raises(UsageError, match="no validation images"):
        run.evaluate(split="validation")


def test_pages_have_what_the_history_has(empty_folder, capsys):
    data, method = tiny.data(), tiny.method()
    histories = [(), [{"ce/student0": 1.5}, {"ce/student0": 1.0}], [{"loss": 2.0}, {"loss": 1.0}]]
    runs = [cd.record(method, data, f"run{n}", history=each) for n, each in enumerate(histories)]
    none, terms, sums = ((run.path / "report.html").read_text(encoding="utf-8") for run in runs)
    assert "Training loss and its terms" not in none and "Training loss and its terms" in terms
    assert "sum from 2 to 1" in sums and "sum from" not in terms and "ce/student0 from 1.5 to 1" in terms
    assert main(["report", *(str(run.path) for run in runs), "--out", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "Training loss, nats" in page
    seen = capsys.readouterr()
    assert "lacks a part" not in seen.out + seen.err + none + terms + sums + page


def overrides(kind, hook):
    """Whether a method of a kind does something there, with its default settings."""
    if hook == "views":
        return kind.Settings().views_per_student
    if hook == "initial_epochs":
        return getattr(kind.Settings(), "initial_share", 0) > 0
    return getattr(kind, hook) is not getattr(Method, hook)


def test_the_page_names_the_methods_that_want_more_than_two_lines():
    text = PAGE.read_text(encoding="utf-8").partition("### What some methods want beside it")[2]
    rows = re.findall(r"^\| (.*) \| (`[`a-z -]+) \|$", text, re.MULTILINE)
    hooks = [re.findall(r"method\.(?!initialising)(\w+)", what)[0] for what, _ in rows]
    assert {"parameter_groups", "alternating_updates", "after_step", "after_epoch", "between_epochs"} <= {*hooks}
    for hook, (_, names) in zip(hooks, rows, strict=True):
        assert names.replace("`", "").split() == [name for name in METHODS if overrides(METHODS[name], hook)], hook
