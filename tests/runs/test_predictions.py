"""predictions.npz of a run, and what `codistill evaluate` makes of it."""

import csv
import dataclasses
import json
import math
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import codistill as cd
from codistill.cli.main import main
from codistill.core.errors import CheckpointError
from codistill.evaluation.analysis import analyse, wilson_interval
from codistill.runs.predictions import NAME, read_predictions, write_predictions

from .. import tiny

NAMES = ["student0", "student1", "ensemble", "fused"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_registered):
    """A run with validation images, on files in folders."""
    root = tmp_path_factory.mktemp("photos")
    data = tiny.data(train=40, test=21)
    for part, split in (("train", data.train), ("test", data.test)):
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            place = root / "data" / part / tiny.CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
        flags = ["--networks", "tiny", "tiny", "--data", "folder", "--data-dir", str(root / "data"), "--epochs", "2"]
        flags += ["-b", "8", "--lr", "0.05", "--threads", "1", "--validation", "10", "--out", str(root / "run")]
        assert main(["train", *flags]) == 0
    return root


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run that a test may spoil."""
    return cd.Run(shutil.copytree(folder / "run", tmp_path / "run"))


def as_arrays(predictions):
    return {f"{split}/{key}": each for split, part in predictions.items() for key, each in part.as_arrays().items()}


def test_a_finished_run_holds_the_predictions_that_its_scores_are_of(run):
    found, data = run.predictions(), run.load_data()
    assert list(found) == ["validation", "test"]
    assert [len(each) for each in found.values()] == [10, 21]
    assert found["test"].files == data.test.files and found["test"].place(0).startswith("test/blue/")
    assert found["validation"].files == tuple(data.train.files[place] for place in found["validation"].positions)
    assert (found["validation"].labels == data.train.labels[found["validation"].positions]).all()
    assert (found["test"].positions == np.arange(21)).all() and found["test"].students == ("student0", "student1")
    for split, predictions in found.items():
        assert list(predictions.predictors) == NAMES
        for name, ranked in predictions.predictors.items():
            row, seen = run.summary[split][name], analyse(predictions, name, 3)
            assert seen.top1_error == pytest.approx(row["top1_error"])
            assert seen.balanced_error == pytest.approx(row["balanced_error"])
            assert seen.reliability.ece == pytest.approx(row["ece"], abs=1e-4)
            assert -ranked.label_log_probability.mean() == pytest.approx(row["nll"], rel=1e-5)
            assert np.exp(ranked.log_probabilities).sum(axis=1) == pytest.approx(np.ones(len(predictions)), abs=1e-5)


def test_the_summary_has_intervals_and_balanced_errors(run):
    summary = run.summary
    for split, prefix in (("test", ""), ("validation", "validation_")):
        for name in NAMES:
            wrong = round(summary[f"{prefix}top1_error"][name] / 100 * summary[f"{split}_images"])
            interval = wilson_interval(wrong, summary[f"{split}_images"])
            assert summary[f"{prefix}top1_error_interval"][name] == pytest.approx(interval)
            assert summary[f"{prefix}balanced_error"][name] == summary[split][name]["balanced_error"]


def test_what_is_written_is_read(run, tmp_path):
    found = run.predictions()
    odd = os.fsdecode(b"a \xff,\n.png")
    test = found["test"]
    named = type(test)(test.labels, test.positions, (odd,) * len(test), test.predictors)
    write_predictions(run.path, {"test": named})
    again = read_predictions(run)
    assert again["test"].files == named.files
    for key, array in as_arrays(again).items():
        assert array.dtype == as_arrays({"test": named})[key].dtype and (array == as_arrays({"test": named})[key]).all()


def spoil(path, **changes):
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{key: each for key, each in arrays.items() if each is not None})


DAMAGE = {
    "absent": (lambda path: path.unlink(), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "damaged"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "directory"),
    "another byte": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"blue/02", b"blue/92", 1)),
        "damaged",
    ),
    "objects": (lambda path: spoil(path, **{"test/labels": np.array([{}] * 21)}), "must be an array of numbers"),
    "no test": (
        lambda path: spoil(path, **{key: None for key in np.load(path).files if key.startswith("test")}),
        "no test images",
    ),
    "an array less": (lambda path: spoil(path, **{"test/student0/classes": None}), "no array student0/classes"),
    "other labels": (lambda path: spoil(path, **{"test/labels": np.full(21, 3)}), "labels has values outside 0 to 2"),
    "other type": (lambda path: spoil(path, **{"test/labels": np.zeros(21)}), "labels is float64"),
    "fewer": (lambda path: spoil(path, **{"test/positions": np.arange(20)}), "positions is int64 [20]"),
    "NaN": (
        lambda path: spoil(path, **{"test/fused/label_log_probability": np.full(21, np.nan, np.float32)}),
        "outside",
    ),
    "fewer names": (lambda path: spoil(path, **{"test/files": np.frombuffer(b"a\0b\0", np.uint8)}), "2 file names"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line(run, kind):
    act, words = DAMAGE[kind]
    act(run.path / NAME)
    with pytest.raises(CheckpointError) as error:
        run.predictions()
    line = str(error.value)
    assert "\n" not in line and words in line and str(run.path / NAME) in line, line


@pytest.mark.parametrize("kind", ["absent", "cut"])
def test_evaluate_makes_it_again(run, capsys, kind):
    before = as_arrays(run.predictions())
    DAMAGE[kind][0](run.path / NAME)
    assert main(["evaluate", str(run.path), "--json"]) == 0
    assert f"{run.path / NAME} was absent or damaged, and is written again" in capsys.readouterr().err
    after = as_arrays(run.predictions())
    assert after.keys() == before.keys()
    for key, array in after.items():
        np.testing.assert_allclose(array, before[key], rtol=1e-4, atol=1e-5)
    # Nor does it touch a file that is whole.
    stamp = (run.path / NAME).stat().st_mtime_ns
    assert main(["evaluate", str(run.path)]) == 0 and capsys.readouterr().err == ""
    assert (run.path / NAME).stat().st_mtime_ns == stamp


def test_logits_that_are_no_numbers_are_one_line(run, capsys):
    state = run.checkpoints.load()
    name = "cohort.students.1.head.linear.weight"
    run.checkpoints.save(dataclasses.replace(state, method={**state.method, name: state.method[name] + math.inf}))
    for more in ([], ["--json"]):
        assert main(["evaluate", str(run.path), *more]) == 4
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1
        assert "the last checkpoint is of no use: logits of student1, ensemble" in error


def test_predictions_of_another_checkpoint_or_of_other_images_are_not_those_of_the_run(run, tmp_path, capsys):
    (run.path / NAME).unlink()
    assert main(["evaluate", str(run.path), "--checkpoint", "best"]) == 0
    assert not (run.path / NAME).exists()


def test_a_run_that_was_interrupted_after_its_last_epoch_has_them_too(run, capsys, no_pages):
    before = as_arrays(run.predictions())
    for name in ("summary.json", NAME):
        (run.path / name).unlink()
    assert main(["resume", str(run.path)]) == 0
    for key, array in as_arrays(run.predictions()).items():
        np.testing.assert_allclose(array, before[key], rtol=1e-4, atol=1e-5)


def test_a_disk_that_is_full_costs_no_run(tmp_path, monkeypatch, capsys, no_pages):
    def full(folder, predictions):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("codistill.training.trainer.write_predictions", full)
    torch.manual_seed(0)
    run = cd.train(tiny.method(), tiny.data(), settings=tiny.settings(epochs=1), out=tmp_path / "run", show=False)
    assert run.finished and not (run.path / NAME).exists()
    assert "predictions.npz is not written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_row_for_each_image(folder, tmp_path, capsys, split):
    run, place = cd.Run(folder / "run"), tmp_path / "rows.csv"
    command = ["evaluate", str(run.path), "--split", split, "--predictions", str(place), "--json"]
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out)
    with open(place, newline="") as file:
        rows = list(csv.DictReader(file))
    images = {"test": 21, "validation": 10}[split]
    assert len(rows) == images and all((folder / "data" / row["image"]).exists() for row in rows)
    assert all(row["image"].split("/")[1] == row["label"] for row in rows)
    for name, each in scores.items():
        wrong = sum(row[f"{name}_class"] != row["label"] for row in rows)
        assert each["top1_error"] == pytest.approx(100 * wrong / images) and each["images"] == images
        assert {key: each[key] for key in run.summary[split][name]} == pytest.approx(run.summary[split][name], rel=1e-4)
        assert all(1 / 3 <= float(row[f"{name}_confidence"]) <= 1 for row in rows)
        assert sum(map(sum, each["confusion_matrix"])) == sum(each["images"] for each in each["classes"]) == images
        assert sum(each["images"] for each in each["calibration"]) == images
        for mistake in each["mistakes"]:
            row = next(row for row in rows if row["image"] == mistake["image"])
            assert (row["label"], row[f"{name}_class"]) == (mistake["label"], mistake["named"])
    assert list(scores["student0"]["disagreement"]) == ["student1"] and scores["fused"]["disagreement"] == {}
    one, other = (scores[f"student{index}"]["disagreement"][f"student{1 - index}"] for index in (0, 1))
    assert one["only_this_right"] == other["only_peer_right"] and one["confident"] == other["confident"]
    assert one["images"] == sum(row["student0_class"] != row["student1_class"] for row in rows) == sum(one["by_class"])


def test_the_terminal_shows_where_a_predictor_is_wrong(folder, capsys):
    assert main(["evaluate", str(folder / "run"), "--predictor", "student1"]) == 0
    text = capsys.readouterr().out
    for heading in ("most frequent confusions", "classes", "calibration", "most confident mistakes"):
        assert f"student1: {heading}" in text
    assert "students that name different classes" in text and "21 test images" in text
    lines = text.replace(str(folder), "photos").splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("best student"))


def test_bad_requests_are_one_line(run, tmp_path, capsys):
    here, without = str(run.path), shutil.copytree(run.path, tmp_path / "without")
    settings = json.loads((without / "config.json").read_text()) | {"validation": 0}
    (without / "config.json").write_text(json.dumps(settings))
    for arguments, status, words in (
        ([here, "--predictor", "student7"], 2, "has no predictor 'student7': choose from student0, student1"),
        ([here, "--predictions", str(tmp_path / "no" / "x.csv")], 2, f"there is no folder {tmp_path / 'no'}: make it"),
        ([here, "--predictions", str(tmp_path)], 2, "is a folder: name a file in it"),
        ([here, "--split", "train"], 2, "'train'"),
        ([str(without), "--split", "validation"], 2, "no validation images, for it was trained without --validation"),
    ):
        assert main(["evaluate", *arguments]) == status
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1 and words in error, error


def test_a_file_that_unpacks_to_more_than_it_can_hold_is_refused(run, monkeypatch):
    monkeypatch.setattr("codistill.data.packed.SMALL", 1 << 20)
    with zipfile.ZipFile(run.path / NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test/labels.npy", bytes(2 << 20))
    with pytest.raises(CheckpointError, match="unpacks to"):
        run.predictions()


@pytest.fixture
def others(folder, tmp_path):
    """A folder of class folders alone: the test images of two classes, larger, and under other names."""
    root = tmp_path / "others"
    for label in ("red", "blue"):
        (root / label).mkdir(parents=True)
        for path in (folder / "data" / "test" / label).iterdir():
            Image.open(path).resize((16, 16), Image.Resampling.NEAREST).save(root / label / f"other{path.stem}.png")
    return root


def test_another_labelled_folder_is_scored_as_a_whole(folder, others, tmp_path, capsys):
    place = tmp_path / "rows.csv"
    command = ["evaluate", str(folder / "run"), "--data-dir", str(others)]
    assert main([*command, "--predictions", str(place), "--json"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    found, rows = json.loads(out), list(csv.DictReader(place.read_text().splitlines()))
    assert found["student0"]["images"] == len(rows) == 14
    assert [each["images"] for each in found["student0"]["classes"]] == [7, 0, 7]  # blue, green, red
    assert all(row["image"].split("/")[0] == row["label"] for row in rows)
    # Enlarged by whole pixels and scaled back, an image is itself.
    known = cd.Run(folder / "run").predictions()["test"]
    names = {name.split("/")[-1]: each for name, each in zip(known.files, known.predictors["fused"].named, strict=True)}
    for row in rows:
        named = ("blue", "green", "red")[names[row["image"].split("/")[-1].removeprefix("other")]]
        assert row["fused_class"] == named
    assert main(command) == 0
    assert f"14 test images of {others}" in capsys.readouterr().out


def test_a_folder_of_classes_that_is_the_training_s_is_not_scored_as_a_whole(tmp_path, capsys, others, no_pages):
    flags = ["--networks", "tiny", "--data", "folder:test=4", "--data-dir", str(others), "--epochs", "1", "-b", "5"]
    assert main(["train", "independent", *flags, "--out", str(tmp_path / "run")]) == 0
    moved = others.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data-dir", str(moved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["student0"]["images"] == 4


def test_a_folder_of_training_images_is_said_to_be_one(folder, capsys):
    command = ["evaluate", str(folder / "run"), "--data-dir", str(folder / "data" / "train"), "--json"]
    assert main(command) == 0
    out, error = capsys.readouterr()
    images = json.loads(out)["student0"]["images"]
    assert f"{images} of {images} images of {folder / 'data' / 'train'} are named as training images" in error
    command[3] = str(folder / "data" / "test")
    assert main(command) == 0 and capsys.readouterr().err == ""


def test_folders_that_do_not_fit_are_one_line(folder, others, capsys):
    def refused(words, *more):
        assert main(["evaluate", str(folder / "run"), "--data-dir", str(others), *more]) == (2 if more else 3)
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1 and words in error, error

    refused("no validation images", "--split", "validation")
    (others / "red" / "bad.png").write_bytes(b"no picture")
    refused("bad.png")
    assert main(["evaluate", str(folder / "run"), "--data-dir", str(others), "--skip-bad", "--json"]) == 0
    assert "1 bad files are left out" in capsys.readouterr().err
    (others / "zebra").mkdir()
    refused("folder 'zebra' is none of the 3 classes: 'blue', 'green', 'red'")
