"""What looks like damage and is none has a line of its own."""

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from codistill.report.page import write_report

from .. import tiny
from .asserting import refused
from .running import arguments, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")
SAFE = "student0.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_registered):
    folder = tmp_path_factory.mktemp("runs")
    data = str(tiny.write_npz(folder / "colours.npz", tiny.data(train=20, test=21)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
        assert run_here(arguments(data, folder / "all" / "run")) == 0
    assert (
        run_here(["export", str(folder / "all" / "run"), "--predictor", "student0", "--out", str(folder / SAFE)]) == 0
    )
    return folder


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


KINDS = {
    "no folder": (shutil.rmtree, 4, "there is no such folder"),
    "an empty folder": (lambda run: (shutil.rmtree(run), run.mkdir()), 4, "is empty, no run folder"),
    "another folder": (lambda run: (run / "config.json").rename(run / "settings.json"), 4, "a run folder?"),
    "a file": (lambda run: (shutil.rmtree(run), run.write_text("")), 4, "is a file, no run folder"),
    "a setting of a newer version": (
        lambda run: changed(run / "config.json", environment={"codistill": "99.0"}, shine=1),
        4,
        "is of codistill 99.0, this is ",
    ),
    "checkpoints of a newer version": (
        lambda run: changed(run / "checkpoints" / "index.json", format=99),
        4,
        "made by a newer version of codistill",
    ),
    "no checkpoint yet": (lambda run: shutil.rmtree(run / "checkpoints"), 4, "did not complete an epoch"),
    "one that is being written": (
        lambda run: (
            (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").mkdir())
            and (run / "checkpoints" / "epoch-000001.pt.tmp-1").write_bytes(b"half")
        ),
        4,
        "did not complete an epoch",
    ),
}


@pytest.mark.fault(93)
@pytest.mark.parametrize(("change", "status", "words"), KINDS.values(), ids=KINDS)
def test_a_folder_that_is_not_damaged_is_not_called_so(trained, tmp_path, capsys, change, status, words):
    run = shutil.copytree(trained / "all" / "run", tmp_path / "run")
    change(run)
    assert "damaged" not in refused(capsys, ["evaluate", str(run)], status, words, unchanged=tmp_path)


@pytest.mark.fault(93)
def test_a_folder_of_runs_names_one(trained, capsys):
    for command in (["evaluate"], ["export", "--format", "onnx"]):
        refused(capsys, [*command, str(trained / "all")], 4, f"holds runs: name one of them, such as {trained}/all/run")


@pytest.mark.fault(93)
def test_a_run_without_an_end_asks_for_a_predictor(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "all" / "run", tmp_path / "run")
    (run / "summary.json").unlink()
    refused(capsys, ["predict", str(run), "x.png"], 2, "its training has not come to its end: name a predictor")


@pytest.mark.fault(93)
@pytest.mark.parametrize("name", ["config.json", "index.json", "epoch-000002.pt", SAFE])
def test_what_may_not_be_read_is_not_damaged(trained, capsys, monkeypatch, name):
    def withheld(file, *more, **named):
        if Path(str(file)).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *more, **named)

    opened = io.open
    monkeypatch.setattr(io, "open", withheld)
    command = ["predict", str(trained / SAFE), "x.png"] if name == SAFE else ["evaluate", str(trained / "all" / "run")]
    assert "damaged" not in refused(capsys, command, 4, name, "Permission denied")


@pytest.mark.fault(92)
def test_a_model_whose_package_is_missing(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "x.onnx").write_bytes(b"whatever")
    line = refused(capsys, ["predict", str(tmp_path / "x.onnx"), "x.png"], 2, "onnxruntime is not installed here: ")
    assert "damaged" not in line and f"{sys.executable} -m pip install 'onnxruntime>=" in line


@pytest.mark.fault(92)
@pytest.mark.parametrize("package", ["jinja2", "torch.utils.tensorboard", "sklearn.datasets"])
def test_a_missing_package_costs_no_run(trained, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setattr("codistill.training.trainer.write_report", write_report)
    monkeypatch.setitem(sys.modules, package, None)
    name = {"sklearn.datasets": "scikit-learn", "torch.utils.tensorboard": "torch"}.get(package, package.split(".")[0])
    how = f"the package {name} is not installed here: "
    if name == "scikit-learn":
        refused(capsys, ["train", "--networks", "resnet20", "resnet20", "--data", "digits"], 2, how, " -m pip install ")
        return
    capsys.readouterr()
    assert run_here(arguments(str(trained / "colours.npz"), tmp_path / "run")) == 0
    warning = capsys.readouterr().err
    assert how in warning and " -m pip install " in warning and warning.count("\n") == 1
