"""The package as its users meet it: six lines of Python, and `python -m codistill`."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core import console
from codistill.data import cifar
from codistill.data.cifar_files import CIFAR100
from codistill.deploy.classifier import load_classifier
from codistill.training.verify import end_state

from . import tiny
from .data.writers import cifar_binary, random_arrays, sha256, write_archive


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a data set of 32x32 images in a file."""
    monkeypatch.chdir(tmp_path)
    tiny.write_npz(tmp_path / "colours.npz", tiny.data(train=128, test=9, size=(32, 32)))
    return tmp_path


def test_six_lines_of_python(place, tiny_registered, capsys):
    data = cd.dataset("packed", root="colours.npz")
    students = [cd.network("tiny", data.num_classes), cd.network("tiny:width=12", data.num_classes)]
    method = cd.MFEF(students, num_classes=data.num_classes)
    run = cd.train(method, data, epochs=2, out="runs/pair")
    run.export("student0", "student.onnx")

    assert capsys.readouterr().err == ""
    assert run.summary["status"] == "finished" and run.summary["networks"] == ["tiny", "tiny:width=12"]
    session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
    pixels = np.ascontiguousarray(data.test.images.transpose(0, 3, 1, 2))
    (logits,) = session.run(["logits"], {"images": pixels})
    error = 100 * float((logits.argmax(axis=1) != data.test.labels).mean())
    assert error == pytest.approx(run.summary["top1_error"]["student0"])
    # And later, from the folder alone.
    later = load_classifier(place / "runs" / "pair", "student0").logits(data.test.images)
    np.testing.assert_allclose(later.numpy(), logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """Make an archive of few images the published one of CIFAR-100, in data/."""
    files = cifar_binary("cifar100", random_arrays(100, per_class=1))
    (tmp_path / "data").mkdir()
    content = write_archive(tmp_path / "data" / CIFAR100[0].archive, CIFAR100[0].folder, files).read_bytes()
    digests = {file: sha256(files[file]) for file in CIFAR100[0].digests}
    small = dataclasses.replace(CIFAR100[0], size=len(content), digest=sha256(content), digests=digests)
    monkeypatch.setattr(cifar, "CIFAR100", (small, CIFAR100[1]))
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 100)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 100)
    monkeypatch.chdir(tmp_path)


@pytest.mark.fault(97)
def test_the_readmes_lines_repeat_and_equal_the_command_line(small_cifar100, monkeypatch, no_pages, capsys):
    monkeypatch.setattr(cd.Run, "export", lambda run, *rest: None)
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(import codistill as cd\n.*?)```", text, flags=re.DOTALL)
    assert lines.count("epochs=300") == lines.count('out="runs/pair"') == 1
    for out in ("first", "second"):
        torch.rand(3)
        short = lines.replace("epochs=300", "epochs=1").replace("resnet32", "resnet8").replace("wrn-16-2", "wrn-16-1")
        exec(short.replace("runs/pair", out), {})
    flags = ["--networks", "resnet8", "wrn-16-1", "--data", "cifar100:download=true", "--data-dir", "data"]
    assert main(["train", "mfef", *flags, "--epochs", "1", "--out", "third"]) == 0
    runs = [cd.Run(name) for name in ("first", "second", "third")]
    assert len({end_state(run) for run in runs}) == 1
    assert len({str(run.metadata["initial_weights"]) for run in runs}) == 1
    assert runs[0].metadata["initial_weights"]["from_recipe"]
    assert "weights" not in capsys.readouterr().err


def test_the_docstring_is_the_six_lines():
    lines = [line for line in cd.__doc__.splitlines() if " = " in line or line.startswith("run.")]
    names = set(re.findall(r"cd\.(\w+)", "\n".join(lines)))
    assert len(lines) == 5 and {"dataset", "network", "MFEF", "train"} <= names <= set(cd.__all__)
    assert all(hasattr(cd, name) for name in cd.__all__)


def test_progress_is_shown_without_a_terminal(place, capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    settings = tiny.settings(epochs=2, batch_size=64)
    cd.train(tiny.method(), tiny.data(train=128, size=(8, 8)), out="run", settings=settings)
    lines = capsys.readouterr().out.splitlines()
    rate, terms, left = r"[\d,]+ images/s", r"loss \d+\.\d+  ce/student \S+ \S+  ce/fused \S+.*", r"\d+:\d\d left"
    for epoch in (1, 2):
        for step in (1, 2):
            assert any(
                re.fullmatch(rf"epoch {epoch}/2  step {step}/2  {rate}  {terms}  {left}", line) for line in lines
            )
        assert any(re.fullmatch(rf"epoch {epoch}/2  {rate}  {terms}  test error %: .*  {left}", line) for line in lines)
    assert re.fullmatch(r"best student: student\d, chosen by test error, so its \S+ % is too optimistic: .*", lines[-2])
    assert lines[-1] == "run folder: run" and not any("\x1b" in line for line in lines)


def test_a_quiet_training_says_nothing(place, capsys):
    cd.train(tiny.method(), tiny.data(), out="run", settings=tiny.settings(epochs=1), show=False)
    assert capsys.readouterr() == ("", "")


def test_the_module_runs_as_a_program(place):
    arguments = ["train", "independent", "--networks", "resnet20", "--data", "packed", "--data-dir", "colours.npz"]
    flags = ["--epochs", "1", "--train-limit", "16", "-b", "8", "--threads", "1", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "codistill", *arguments, *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"epoch 1/1  \d+ images/s  loss ", done.stdout)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["status"] == "finished" and list(summary["top1_error"]) == ["student0"]
    # It is ResNet-20: 0.27 million parameters.
    assert 0.25e6 < summary["parameters"]["student0"] < 0.3e6


def test_the_module_gives_the_exit_status(place):
    done = subprocess.run([sys.executable, "-m", "codistill", "trian"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("codistill: error: unknown command 'trian'") and done.stderr.count("\n") == 1
