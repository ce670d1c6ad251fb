"""A folder to hand on: int8 and float ONNX, load.py that answers without torch, model card, picture, recipe."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import codistill as cd
from codistill.cli import commands
from codistill.cli.main import main
from codistill.core.errors import UsageError
from codistill.deploy import card, export
from codistill.deploy.card import export_folder, is_folder
from codistill.deploy.classifier import load_classifier
from codistill.deploy.export import export_predictor

from .. import tiny
from .test_latency import latency


@pytest.fixture(scope="module")
def run(tiny_registered, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    path = tiny.write_npz(folder / "colours.npz", tiny.data(train=96, test=30))
    torch.manual_seed(0)
    method = cd.Independent([cd.network("tiny", 3)], 3, image_size=(8, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
        settings = tiny.settings(epochs=2, milestones=())
        return cd.train(method, cd.dataset("packed", path), out=folder / "run", settings=settings, show=False)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("hand-on") / "model"
    line = ["export", str(run.path), "--predictor", "student0", "--format", "onnx-int8", "--license", "apache-2.0"]
    assert main([*line, "--out", f"{out}/"]) == 0
    return out


@pytest.fixture(scope="module")
def photos(run, tmp_path_factory):
    """Images of other sizes, turned, grey, transparent, with a palette."""
    folder, found = tmp_path_factory.mktemp("photos"), []
    for number, pixels in enumerate(run.load_data().test.images[:7]):
        picture = Image.fromarray(pixels).resize((23 + number, 17), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 1 else 1
        picture = picture.convert(("RGB", "RGB", "L", "RGBA", "P", "LA", "1")[number])
        if number == 3:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        found.append(folder / f"photo{number}.png")
        picture.save(found[-1], exif=exif)
    return found


def test_the_folder_is_no_run_but_names_its_files(folder, photos, capsys):
    assert main(["predict", str(folder), str(photos[0])]) == 2
    said = f"is a folder that export wrote: name the file in it, {folder}/model.int8.onnx or {folder}/model.onnx"
    assert said in capsys.readouterr().err


def test_the_folder_holds_all_that_others_need(folder):
    names = ["README.md", "confusion.png", "load.py", "model.int8.onnx", "model.onnx", "recipe.json"]
    assert sorted(each.name for each in folder.iterdir()) == names
    assert not list(folder.parent.glob("*.tmp-*"))
    with Image.open(folder / "confusion.png") as picture:
        assert picture.width > 300
    assert len((folder / "load.py").read_text().splitlines()) == 15
    assert str(folder.parent) not in (folder / "recipe.json").read_text()  # where the data were is nobody's business


def test_the_card_says_what_is_needed_to_use_it(folder, run):
    page = (folder / "README.md").read_text()
    assert page.startswith("---\nlicense: apache-2.0\npipeline_tag: image-classification\n")
    assert "    0 red\n    1 green\n    2 blue\n" in page  # classes in order
    assert "bilinear interpolation with antialiasing" in page and "8x8 pixels" in page
    assert "inside** the model" in page
    assert "No images were held out" in page and "![Confusion matrix" in page
    error = run.summary["top1_error"]["student0"]
    assert f"| test images, by model.onnx | 30 | {error:.2f} |" in page
    assert re.search(r"error on all 30 test images: [\d.]+ % before, [\d.]+ % after", page)
    assert "None" not in page and "{{" not in page and "\n\n\n\n" not in page


def test_int8_is_quantised_by_channel_on_real_images(folder, run):
    model = onnx.load(folder / "model.int8.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") > 10 and kinds.count("QuantizeLinear") > 3
    assert kinds[-1] == "Gemm"  # logits keep all their bits
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = {node.output[0]: node for node in model.graph.node}
    for conv in (node for node in model.graph.node if node.op_type == "Conv"):
        weights = nodes[conv.input[1]]
        assert constants[weights.input[0]].dtype == np.int8
        assert constants[weights.input[1]].size == constants[weights.input[0]].shape[0]  # a scale for each channel
    facts = json.loads({each.key: each.value for each in model.metadata_props}["codistill"])
    assert facts["int8"] == {"calibration_images": 96} and facts["class_names"] == ["red", "green", "blue"]
    images = run.load_data().test.images
    for batch in (1, 2, 7, 30):
        logits = load_classifier(folder / "model.int8.onnx").logits(images[:batch])
        plain = load_classifier(folder / "model.onnx").logits(images[:batch])
        assert 0 < (logits - plain).abs().max() < 0.1 * plain.abs().max()


def answers_of(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model", ["model.onnx", "model.int8.onnx"])
def test_load_answers_as_predict_does(folder, photos, model, capsys, monkeypatch):
    names = [str(each) for each in photos]
    expected = answers_of(capsys, "predict", str(folder / model), *names)
    assert len(set(re.findall(r": (\w+)", expected))) > 1
    chosen = [str(folder / model)] if model != "model.onnx" else []
    monkeypatch.setattr(sys, "argv", ["load.py", *chosen, *names])
    runpy.run_path(str(folder / "load.py"))
    assert capsys.readouterr().out == expected


@pytest.mark.slow
def test_load_needs_no_torch_and_no_codistill(folder, photos, capsys, tmp_path):
    # Nothing of this environment but these three, and what they are made of.
    site = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "onnxruntime", "PIL", "pillow.libs"):
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    alone = [sys.executable, "-S"]
    for missing in ("torch", "codistill", "onnx"):
        asked = subprocess.run([*alone, "-c", f"import {missing}"], env=own, capture_output=True, text=True)
        assert "ModuleNotFoundError" in asked.stderr
    names = [str(each) for each in photos]
    for model in ("model.onnx", "model.int8.onnx"):
        expected = answers_of(capsys, "predict", str(folder / model), *names)
        command = [*alone, str(folder / "load.py"), str(folder / model), *names]
        done = subprocess.run(command, env=own, capture_output=True, text=True, cwd="/")
        assert (done.stdout, done.returncode) == (expected, 0), done.stderr


def test_int8_that_costs_too_much_is_refused(run, folder, tmp_path, monkeypatch):
    whole = (folder / "model.onnx").read_bytes()
    monkeypatch.setitem(export.WRITERS, "onnx", lambda module, card, path: path.write_bytes(whole))

    def spoilt(float_file, card, images, path):
        model = onnx.load(float_file)
        for each in model.graph.initializer:
            if each.name.endswith("head.linear.bias") or "bias" in each.name:
                shifted = onnx.numpy_helper.to_array(each) + np.arange(each.dims[0], dtype=np.float32) * 100
                each.CopyFrom(onnx.numpy_helper.from_array(shifted, each.name))
        path.write_bytes(model.SerializeToString())

    monkeypatch.setattr(export, "quantise", spoilt)
    monkeypatch.setattr(export, "onnx_pace", lambda files, card: [1.0, 2.0])
    with pytest.raises(UsageError, match=r"x.int8.onnx: not written: in int8 the error is .* points of accuracy lost"):
        export_predictor(run, "student0", tmp_path / "x.int8.onnx")
    assert list(tmp_path.iterdir()) == []
    done = export_predictor(run, "student0", tmp_path / "x.int8.onnx", max_accuracy_loss=100)
    assert done.quantised is not None and done.quantised.loss > 1 and "% before" in done.line


@pytest.mark.parametrize("points", ["-1", "101", "nan"])
def test_points_of_accuracy_are_bounded(run, points, capsys):
    assert main(["export", str(run.path), "--format", "onnx-int8", "--max-accuracy-loss", points]) == 2
    assert "--max-accuracy-loss is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "folder"),
    [("model/", True), ("v1.2/", True), ("model", True), ("x.onnx", False), ("x.txt", False), (".", True)],
)
def test_a_place_is_a_folder_by_its_name(out, folder):
    assert is_folder(out) == folder


def test_a_folder_in_use_is_refused_before_anything_is_measured(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("precious")
    for out in (f"{tmp_path}/", str(tmp_path)):
        assert main(["export", str(run.path), "--out", out, "--max-latency-ms", "5"]) == 2
        assert f"{tmp_path} is not an empty folder: choose another --out" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_refused_costs_no_measurement(run, tmp_path, capsys):
    line = ["export", str(run.path), "--max-latency-ms", "5", "--format", "onnx-int8", "--out", str(tmp_path / "x")]
    for words, *more in (
        ("--license 'a b': name an identifier", "--license", "a b"),
        ("--max-accuracy-loss is 500", "--max-accuracy-loss", "500"),
        ("nowhere", "--data-dir", str(tmp_path / "nowhere")),
    ):
        assert main([*line, *more]) in (2, 3)
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1 and words in error
    assert not (run.path / "latency.json").exists() and list(tmp_path.iterdir()) == []


def test_the_folder_that_one_is_in_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out in (".", "./", str(tmp_path)):
        assert main(["export", str(run.path), "--predictor", "student0", "--format", "safetensors", "--out", out]) == 2
        assert capsys.readouterr().err.endswith("is the folder that you are in: name a new one, such as --out model/\n")


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "on 96 training images"), ({"train_limit": 40}, "on 40 "), ({"validation": 16}, "on 80 ")],
)
def test_the_card_counts_the_images_that_were_trained_on(run, monkeypatch, settings, words):
    trained = dataclasses.replace(run.config.train, **settings)
    monkeypatch.setitem(run.__dict__, "config", dataclasses.replace(run.config, train=trained))
    assert f"One network trained with independent {words}" in card.training_words(run)


def test_a_licence_is_an_identifier(run, tmp_path):
    with pytest.raises(UsageError, match="--license 'a: b': name an identifier"):
        export_folder(run, tmp_path / "out", licence="a: b")


def test_a_folder_that_fails_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "draw_confusion", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    monkeypatch.setitem(export.WRITERS, "onnx", lambda module, card, path: path.write_bytes(b""))
    with pytest.raises(cd.CodistillError):
        export_folder(run, tmp_path / "out", "student0")
    assert tiny.listing(tmp_path) == {}


def test_names_of_classes_are_no_markup(tmp_path):
    names = ("$x$", "a|b", "`c`")
    card.draw_confusion(np.diag([3, 2, 1]), names, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    many = tuple(str(each) for each in range(100))
    card.draw_confusion(np.eye(100, dtype=np.int64), many, tmp_path / "many.png")
    # A Python warning would be an error here: letters that the font lacks,
    card.draw_confusion(np.diag([3, 2, 1]), ("\N{CAT}", "\u732b", "dog"), tmp_path / "letters.png")
    # and two long names leave room for the matrix.
    card.draw_confusion(np.diag([3, 2]), ("x" * 200, "n02085620-Chihuahua-of-the-world"), tmp_path / "long.png")


def test_a_run_exports_to_a_folder_from_python(run, folder, tmp_path, monkeypatch):
    whole = (folder / "model.onnx").read_bytes()
    monkeypatch.setitem(export.WRITERS, "onnx", lambda module, card, path: path.write_bytes(whole))
    out = run.export("student0", tmp_path / "model")
    assert sorted(each.name for each in out.iterdir()) == sorted(
        ["README.md", "confusion.png", "load.py", "model.onnx", "recipe.json"]
    )
    page = (out / "README.md").read_text()
    assert "license: unknown" in page and "not chosen yet" in page and "## int8" not in page


def test_a_report_measures_latency_on_request(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(commands, "measure_latency", lambda run: latency(student0=1.5))
    monkeypatch.setattr(commands, "write_page", lambda run, out: tmp_path / "page.html")
    monkeypatch.setattr(commands, "complete_pictures", lambda *_: None)
    assert main(["report", str(run.path), "--latency"]) == 0
    printed = capsys.readouterr().out
    assert "batch 1" in printed and "student0" in printed and "…" not in printed and "1.5" in printed
