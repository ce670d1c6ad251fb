"""Which student is the best, by which errors, and who says so."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.data.augment import DeviceImages
from codistill.data.splitting import divided
from codistill.deploy.classifier import load_classifier
from codistill.evaluation.evaluation import evaluate
from codistill.runs.choice import lowest_student
from codistill.training import trainer

from .. import tiny

HELD_OUT = 24


@pytest.fixture(scope="module")
def folder(tiny_registered, tmp_path_factory):
    """Two runs of students that learn unlike well, with test labels that are wrong: validation and test disagree."""
    place = tmp_path_factory.mktemp("choice")
    data = tiny.data(train=96, test=30)
    data = dataclasses.replace(data, test=cd.Split(data.test.images, (data.test.labels + 1) % 3))
    tiny.write_npz(place / "colours.npz", data)
    flags = ["--data", "packed", "--data-dir", str(place / "colours.npz"), "--networks", "tiny:width=1", "tiny"]
    more = ["--epochs", "3", "-b", "8", "--learning-rate", "0.05", "--threads", "1"]
    for name, held_out in (("held_out", HELD_OUT), ("plain", 0)):
        out = ["--out", str(place / name), "--validation", str(held_out)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "write_report", lambda run, summary: None)  # it takes longer than the training
            assert main(["train", "independent", *flags, *more, *out]) == 0
    return place


def test_these_runs_disagree(folder):
    summary = cd.Run(folder / "held_out").summary
    errors = [summary[key] for key in ("validation_top1_error", "top1_error")]
    lowest = [min(("student0", "student1"), key=each.__getitem__) for each in errors]
    assert lowest == ["student1", "student0"] and summary["best_epoch_chosen_on"] == "validation"


@pytest.mark.fault(99)
@pytest.mark.parametrize(
    ("name", "by", "best"), [("held_out", "validation", "student1"), ("plain", "test", "student0")]
)
def test_the_student_is_chosen_by_validation_where_there_is_one(folder, capsys, tmp_path, name, by, best):
    run = cd.Run(folder / name)
    assert (run.summary["chosen_by"], run.summary["best_student"], run.best_student()) == (by, best, best)
    assert load_classifier(run.path).card["predictor"] == best
    assert main(["export", str(run.path), "--out", str(tmp_path / "model.safetensors")]) == 0
    exported = capsys.readouterr().out
    assert f"model.safetensors: {best}, " in exported and f"best student: {best}, chosen by {by} error" in exported
    assert main(["evaluate", str(run.path), "--checkpoint", "best"]) == 0
    chosen = f"best student: {run.best_student('best')}, chosen with its epoch by {by} error"
    assert chosen in capsys.readouterr().out and run.summary["best_epoch_best_student"] == run.best_student("best")
    rows = run.metrics()
    for which, row in (("last", rows[-1]), ("best", rows[run.summary["best_epoch"] - 1])):
        assert run.best_student(which) == lowest_student(row)[0]


@pytest.mark.fault(99)
def test_runs_of_older_versions_are_chosen_by_their_metrics(folder, tmp_path):
    shutil.copytree(folder / "held_out", tmp_path / "old")
    summary = cd.Run(tmp_path / "old").summary
    for key in [key for key in summary if "validation" in key or "best_student" in key or key == "chosen_by"]:
        del summary[key]
    (tmp_path / "old" / "summary.json").write_text(json.dumps(summary))
    assert cd.Run(tmp_path / "old").best_student() == "student1"
    assert main(["evaluate", str(tmp_path / "old")]) == 0


@pytest.mark.fault(99)
def test_validation_scores_are_of_the_images_as_they_are_and_not_trained_on(folder):
    run = cd.Run(folder / "held_out")
    data = run.load_data()
    places = divided(data.train.labels, HELD_OUT, 0)[1]
    held_out = cd.Split(data.train.images[places], data.train.labels[places])
    images = DeviceImages(held_out, data.statistics, torch.device("cpu"))
    for name, scores in evaluate(run.load_method(), images).items():
        assert scores.top1_error == run.summary["validation_top1_error"][name]
        assert dataclasses.asdict(scores) == pytest.approx(run.summary["validation"][name])
    assert (run.summary["validation_images"], run.summary["test_images"]) == (HELD_OUT, 30)


@pytest.mark.fault(99)
@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ({"student0": 9, "student1": 8, "fused": 1}, "student1"),
        ({"student0": 8, "student1": 8, "ensemble": 1}, "student0"),
        ({"student10": 8, "student2": 8, "student3": 9}, "student2"),
        ({"student0": math.nan, "student1": 100}, "student1"),
        ({"student0": math.nan, "student1": math.nan}, "student0"),
    ],
)
def test_of_equal_errors_the_first_student_counts(errors, best):
    scores = {name: {"top1_error": error} for name, error in errors.items()}
    contrary = {name: {"top1_error": -error} for name, error in errors.items()}
    assert lowest_student({"test": scores})[0] == lowest_student({"test": contrary, "validation": scores})[0] == best
