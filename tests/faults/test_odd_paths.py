"""Brackets, spaces and bytes that are no UTF-8 in the paths of a whole journey, and in what is printed of it."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import codistill as cd

from .. import tiny
from .asserting import refused
from .running import arguments, end_state, kill_at_step, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered")
NAMES = {
    "spaces and brackets": "my run [1] (old) #2 100% {x} :smile: [red] $HOME 'a'",
    "no UTF-8": os.fsdecode(b"caf\xe9 [b]"),
    "letters": "猫 naïve \u2028 e\u0301",
    "a leading dash": "-out",
}
SOON = ("spaces and brackets", "no UTF-8")


@pytest.mark.fault(95)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, id=kind, marks=[pytest.mark.slow] * (kind not in SOON)) for kind, name in NAMES.items()],
)
def test_a_journey_below_an_odd_path(tmp_path, capsys, monkeypatch, name):
    folder = tmp_path / name
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    if name.isascii():  # the page of the others is the same
        monkeypatch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
    data = tiny.write_npz(folder / f"{name}.npz", tiny.data(train=20, test=21))
    out, whole = folder / "run", folder / "whole"
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5, 2)
        assert run_here(arguments(str(data), out)) == 130
    assert run_here(["resume", str(out)]) == 0
    assert run_here(["train", "--recipe", str(out / "config.json"), "--out", str(whole)]) == 0
    assert end_state(out) == end_state(whole)
    assert name.isascii() or (out / "report.html").stat().st_size > 1000
    assert run_here(["evaluate", str(out), "--data-dir", str(data)]) == 0
    model = folder / f"{name}.safetensors"
    assert run_here(["export", str(out), "--predictor", "student0", "--out", str(model)]) == 0
    pictures = folder / "pictures"
    (pictures / name).mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(pictures / name / f"{name}.png")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        # As a terminal has it; pytest's own refuses what is no UTF-8.
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
        for form in ("--csv", "--json"):
            assert run_here(["predict", str(model), str(pictures), form]) == 0
        text = sys.stdout.buffer.getvalue().decode()
    shown = str(pictures / name / f"{name}.png").encode(errors="backslashreplace").decode()
    lines = text.replace("\u2028", "?").splitlines()
    assert next(csv.reader(lines[1:2]))[0] == shown.replace("\u2028", "?") or "\u2028" in name
    assert json.loads(lines[2])["image"] == str(pictures / name / f"{name}.png")
    moved = folder / "moved.npz"
    shutil.move(data, moved)
    refused(capsys, ["evaluate", str(out)], 3, "--data-dir")
    assert cd.Run(Path(os.fspath(out))).evaluate(data_dir=str(moved))
