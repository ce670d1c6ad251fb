"""The best predictor under a budget: which one, why, and what is said where there is none."""

import json

import pytest

import codistill as cd
from codistill.cli import commands
from codistill.cli.main import main
from codistill.core.errors import UsageError
from codistill.deploy import budget
from codistill.deploy.budget import choose_predictor
from codistill.deploy.export import Exported

from .. import tiny
from .test_latency import latency

TIMES = {"student0": 1.0, "student1": 2.0, "ensemble": 3.0, "fused": 4.0}
ERRORS = {"student0": 30.0, "student1": 20.0, "ensemble": 10.0, "fused": 15.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
        folder = tmp_path_factory.mktemp("budget")
        data = cd.dataset("packed", tiny.write_npz(folder / "colours.npz", tiny.data()))
        settings = tiny.settings(epochs=1)
        return cd.train(tiny.method(), data, out=folder / "run", settings=settings, show=False).path


@pytest.fixture
def run(trained, monkeypatch):
    """A run with these errors, and these latencies as measured."""
    summary = json.loads((trained / "summary.json").read_text())
    found = cd.Run(trained)
    found._finished = {**summary, "top1_error": ERRORS, "best_epoch_top1_error": ERRORS | {"fused": 1.0}}
    monkeypatch.setattr(budget, "known_latency", lambda run, runtime: latency(**TIMES) if runtime == "onnx" else None)
    return found


@pytest.mark.parametrize(
    ("milliseconds", "best"),
    [(None, "ensemble"), (5, "ensemble"), (3, "ensemble"), (2.9, "student1"), (1.5, "student0")],
)
def test_the_lowest_error_within_the_budget_is_the_best(run, milliseconds, best):
    name, why = choose_predictor(run, max_latency_ms=milliseconds)
    assert name == best
    assert why.startswith(f"best: {best}") and f"{ERRORS[best]:.2f} %" in why
    assert "too optimistic" in why  # chosen on test images


def test_the_reason_names_the_budget_and_what_is_better_and_slower(run):
    assert choose_predictor(run, max_latency_ms=2.5) == (
        "student1",
        "best: student1 in 2 ms, with the lowest test error of 2 of 4 predictors within 2.5 ms (one image, ONNX "
        "Runtime, one thread of this CPU): 20.00 %, which is too optimistic: --validation N chooses on held-out "
        "training images; ensemble has 10.00 %, and takes 3 ms",
    )


def test_validation_errors_decide_where_there_are_any(run):
    held = {"student0": 1.0, "student1": 2.0, "ensemble": 3.0, "fused": float("nan")}
    run._finished |= {"validation_top1_error": held, "validation_images": 50}
    name, why = choose_predictor(run)
    assert name == "student0"
    assert why == (
        "best: student0, with the lowest validation error of 4 predictors: 1.00 % of 50 images; its test error: 30.00 %"
    )


def test_the_best_epoch_has_errors_of_its_own(run):
    assert choose_predictor(run, which="best")[0] == "fused"


def test_a_named_predictor_must_keep_to_the_budget(run):
    assert choose_predictor(run, "student1", max_latency_ms=2)[0] == "student1"
    with pytest.raises(UsageError, match=r"within 1 ms .* nearest, with their test errors: student1 2 ms \(20.00 %\)"):
        choose_predictor(run, "student1", max_latency_ms=1)


def test_a_budget_that_none_meets_names_the_nearest(run):
    nearest = r"student0 1 ms \(30.00 %\), student1 2 ms \(20.00 %\), ensemble 3 ms \(10.00 %\): allow more"
    with pytest.raises(UsageError, match=rf"no predictor answers within 0.5 ms .*{nearest}"):
        choose_predictor(run, max_latency_ms=0.5)


@pytest.mark.parametrize("milliseconds", [0, -1, float("inf"), float("nan")])
def test_a_budget_is_a_number_above_zero(run, milliseconds):
    with pytest.raises(UsageError, match=r"--max-latency-ms is .*; it must be a number of milliseconds above 0"):
        choose_predictor(run, max_latency_ms=milliseconds)


def test_what_was_not_measured_here_is_measured_now(run, monkeypatch):
    asked = []

    def measure(run, runtimes, which, images):
        asked.append((tuple(runtimes), which, images))
        return latency(**TIMES)

    monkeypatch.setattr(budget, "measure_latency", measure)
    monkeypatch.setattr(budget, "known_latency", lambda *_: None)
    assert choose_predictor(run, max_latency_ms=2.5)[0] == "student1"
    with pytest.raises(UsageError, match="none could be measured"):
        choose_predictor(run, max_latency_ms=5, runtime="onnx-int8", training_images=lambda: "images")
    assert asked == [(("torch", "onnx"), "last", None), (("torch", "onnx", "onnx-int8"), "last", "images")]


def test_other_predictors_and_unfinished_runs_are_refused(run):
    with pytest.raises(UsageError, match=r"no predictor 'student9': choose from student0, .*, or best"):
        choose_predictor(run, "student9")
    run._finished = {"status": "interrupted"}
    with pytest.raises(UsageError, match="only of a finished run"):
        choose_predictor(run)


def test_a_command_without_a_format_exports_onnx_or_ends_with_the_line(trained, monkeypatch, capsys):
    monkeypatch.setattr(budget, "known_latency", lambda *_: latency(**TIMES))
    taken = []
    monkeypatch.setattr(commands, "export_predictor", lambda *given: taken.append(given) or Exported)
    monkeypatch.setattr(Exported, "line", "ok", raising=False)
    assert main(["export", str(trained), "--predictor", "best", "--max-latency-ms", "1.5"]) == 0
    assert taken[0][1:4] == ("student0", None, "onnx")
    assert capsys.readouterr().out.startswith("best: student0 in 1 ms")
    assert main(["export", str(trained), "--max-latency-ms", "0.5"]) == 2
    assert "no predictor answers within 0.5 ms" in capsys.readouterr().err and len(taken) == 1
