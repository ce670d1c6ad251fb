"""`codistill bench` measures what it says; how fast is not a test's business."""

import json

import torch

from codistill.bench import PlainImages, images
from codistill.cli import main

ARGUMENTS = ["bench", "mfef", "--networks", "tiny", "tiny", "-b", "64", "--seconds", "0.5", "--device", "cpu"]


def test_json(tiny_registered, capsys):
    assert main([*ARGUMENTS, "--compare", "--json", "--runs", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "mfef" and result["networks"] == ["tiny", "tiny"] and result["runs"] == 2
    # Two runs side by side: a step of both takes twice ms_per_step.
    assert abs(result["images_per_second"] * 2 * result["ms_per_step"] / 1000 - 64) < 1e-6
    assert abs(result["plain_images_per_second"] * result["plain_ms_per_step"] / 1000 - 64) < 1e-6
    assert result["ratio_to_plain"] > 0
    assert result["environment"]["torch"] == torch.__version__


def test_text(tiny_registered, capsys):
    assert main(ARGUMENTS) == 0
    text = capsys.readouterr().out
    assert "ms per step" in text and "images/s" in text and "plain" not in text


def test_refusals(tiny_registered, capsys):
    assert main([*ARGUMENTS, "--runs", "0"]) == 2
    assert main([*ARGUMENTS, "--comparee"]) == 2
    assert "--compare" in capsys.readouterr().err
    assert main([*ARGUMENTS[:-1], "cuda"]) == (0 if torch.cuda.is_available() else 2)


def test_the_plain_loop_crops_flips_and_normalises():
    split = images()
    torch.manual_seed(0)
    seen = {tuple(PlainImages(split)[0][0][:, 16, 16].tolist()) for _ in range(60)}
    assert len(seen) > 10
    image, label = PlainImages(split)[3]
    assert image.shape == (3, 32, 32) and label == split.labels[3]
