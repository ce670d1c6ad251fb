"""What a run on files of one's own says and records of them."""

import csv

import numpy as np
import pytest

import codistill as cd
from codistill.cli import main

from ..data.writers import encode, write_folder

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")


def photos(root, counts, size=(8, 8)):
    """Write images below <class>/ into a folder."""
    rng = np.random.default_rng(0)
    return write_folder(
        root,
        {
            f"{name}/{index:02}.png": encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            for name, count in counts.items()
            for index in range(count)
        },
    )


def train(root, out, *more, data="folder"):
    options = ("--epochs", "1", "--batch-size", "8", "--padding", "1", "--device", "cpu", "--threads", "1")
    networks = ("--networks", "tiny", "tiny")
    return main(
        ["train", "independent", *networks, "--data", data, "--data-dir", str(root), "--out", str(out), *options, *more]
    )


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_drawn_split_is_said_and_recorded(tmp_path, capsys):
    root = photos(tmp_path / "photos", {"ant": 25, "bee": 15})
    assert train(root, tmp_path / "run", "--validation", "25%") == 0
    drawn = "8 of 40 images, of each class its share, drawn with seed 0"
    assert f"codistill: {root} has no test images: {drawn}, are the test set; images.csv" in capsys.readouterr().err
    run, listed = cd.Run(tmp_path / "run"), rows(tmp_path / "run" / "images.csv")
    data = run.load_data()
    assert [each["file"] for each in listed if each["split"] == "test"] == list(data.test.files)
    assert all(each["file"].startswith(f"{each['class']}/") for each in listed) and len(listed) == 40
    count = {split: sum(each["split"] == split for each in listed) for split in ("train", "validation", "test")}
    assert count == {"train": 24, "validation": 8, "test": 8}
    facts = run.metadata["dataset"]
    assert facts["drawn"] == drawn and facts["class_counts"] == {"train": [20, 12], "test": [5, 3]}
    assert facts["preprocessing"] | {"library": ""} == {
        "orientation": "EXIF",
        "colour": "RGB, transparent parts on white",
        "resize": "cover",
        "crop": "centre",
        "interpolation": "bilinear",
        "antialias": True,
        "library": "",
    }


@pytest.mark.fault(133)
def test_files_that_came_later_do_not_make_trained_images_test_images(tmp_path, capsys):
    root = photos(tmp_path / "photos", {"ant": 20, "bee": 20})
    assert train(root, tmp_path / "run") == 0
    photos(root, {"ant": 22})
    for command in (["evaluate"], ["export", "--format", "safetensors"]):
        assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 3
        said = capsys.readouterr().err
        assert "other files than in training, of which other ones would be drawn for testing" in said
        assert "testing (not listed: ant/20.png, ant/21.png): restore them" in said
    for number in (20, 21):
        (root / "ant" / f"{number}.png").unlink()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    for number in range(4):
        (root / "bee" / f"{number:02}.png").unlink()
    for place in ([], ["--data-dir", str(root)]):  # which is the data set, and no folder of other images
        assert main(["evaluate", str(tmp_path / "run"), *place]) == 3
        assert "(missing: bee/00.png, bee/01.png, bee/02.png and 1 more): restore" in capsys.readouterr().err


def test_a_run_on_class_folders_is_evaluated_on_test_images_that_were_set_apart_later(tmp_path, capsys):
    assert train(photos(tmp_path / "photos", {"ant": 20, "bee": 20}), tmp_path / "run") == 0
    apart = photos(tmp_path / "apart", {"train/ant": 4, "train/bee": 4, "test/ant": 3, "test/bee": 2})
    assert main(["evaluate", str(tmp_path / "run"), "--data-dir", str(apart)]) == 0
    out, said = capsys.readouterr()
    assert f"5 test images of {apart}" in out and "not comparable with these" in said
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["resume", str(tmp_path / "run"), "--data-dir", str(apart)]) == 3


def test_uneven_classes_are_said(tmp_path, capsys):
    root = photos(tmp_path / "photos", {"train/ant": 24, "train/bee": 12, "test/ant": 3, "test/bee": 3})
    assert train(root, tmp_path / "run") == 0
    said = capsys.readouterr().err
    line = "warning: data set folder: classes are uneven, from 12 of bee to 24 of ant training images"
    assert f"{line}: --class-weights balanced or --sampling balanced counts them alike" in said
    assert train(root, tmp_path / "weighted", "--class-weights", "balanced") == 0
    assert f"{line}\n" in capsys.readouterr().err
    photos(root, {"train/bee": 13})
    assert train(root, tmp_path / "other") == 0
    assert "uneven" not in capsys.readouterr().err


def test_images_of_two_splits_are_said_and_listed_and_no_error(tmp_path, capsys):
    root = photos(tmp_path / "photos", {"train/ant": 12, "train/bee": 12, "test/ant": 3, "test/bee": 3})
    for here, there in (("test/ant/00", "train/bee/07"), ("test/bee/02", "train/bee/08")):
        (root / f"{here}.png").write_bytes((root / f"{there}.png").read_bytes())
    assert train(root, tmp_path / "run") == 0
    said = capsys.readouterr().err
    pairs = "test/ant/00.png = train/bee/07.png, test/bee/02.png = train/bee/08.png"
    assert f"warning: data set folder: 2 test images are in train, too (2 exactly: {pairs})" in said
    first = rows(tmp_path / "run" / "duplicates.csv")[0]
    assert first["kind"] == "exact" and (first["class"], first["other class"]) == ("ant", "bee")
    assert (first["split"], first["file"], first["other file"]) == ("test", "test/ant/00.png", "train/bee/07.png")


@pytest.mark.parametrize(
    ("size", "method", "networks"),
    [
        ("6x9", "mfef", ("tiny", "tiny")),
        pytest.param("512x384", "mfef", ("resnet8", "resnet8"), marks=pytest.mark.slow),
        pytest.param("33x64", "byot", ("resnet8",), marks=pytest.mark.slow),
    ],
)
def test_images_need_be_no_squares(tmp_path, size, method, networks):
    root = photos(tmp_path / "photos", {"ant": 5, "bee": 5}, size=(20, 30))
    out, options = tmp_path / "run", ["--epochs", "1", "--batch-size", "4", "--drop-last", "--threads", "1"]
    data = ["--data", f"folder:resize={size}", "--data-dir", str(root), "--device", "cpu"]
    assert main(["train", method, "--networks", *networks, *data, *options, "--out", str(out)]) == 0
    assert cd.Run(out).metadata["dataset"]["image_size"] == [int(side) for side in size.split("x")]
    assert main(["predict", str(out), str(root / "ant" / "00.png")]) == 0
