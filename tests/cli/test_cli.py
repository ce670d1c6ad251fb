"""The command line: each command's happy path, and every way of going wrong in one line with its exit status."""

import csv
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import codistill as cd
from codistill.cli import commands, main
from codistill.cli.options import OPTIONS
from codistill.core import errors
from codistill.core.signals import Terminated
from codistill.runs.lock import lock_folder
from codistill.settings.build import build_method
from codistill.training.train import free_folder

from .. import tiny

PREDICTORS = ["student0", "student1", "ensemble", "fused"]
TINY = ["--networks", "tiny", "tiny", "--data", "packed", "--batch-size", "8", "--lr", "0.05", "--threads", "1"]


@pytest.fixture(autouse=True)
def own_handler():
    """Restore the handler of SIGTERM that pytest has."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def made(tiny_registered, tmp_path_factory):
    """A folder with a data file, images and a finished run, all to be read only."""
    folder = tmp_path_factory.mktemp("cli")
    data = tiny.data()
    tiny.write_npz(folder / "colours.npz", data)
    for index in range(3):
        Image.fromarray(data.test.images[index]).save(folder / f"image{index}.png")
    flags = ["--data-dir", str(folder / "colours.npz"), "--epochs", "2", "--seed", "3", "--out", str(folder / "run")]
    assert main(["train", "mfef", *TINY, *flags]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run that may be damaged; the process stands beside it."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, arguments: list[str], status: int, message: str) -> None:
    """Expect one line on stderr, nothing on stdout, and an exit status."""
    assert main(arguments) == status
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("codistill: error: "), error
    assert re.search(message, error), error


def test_train_says_what_it_does(made, capsys, tmp_path):
    flags = ["--data-dir", str(made / "colours.npz"), "--epochs", "2", "--method.temperature", "2", "--out", "out"]
    assert main(["train", "mfef", *TINY, *flags]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    for epoch in (1, 2):
        line = next(line for line in out.splitlines() if line.startswith(f"epoch {epoch}/2"))
        assert re.search(r"images/s  loss \d+\.\d+  ce/student \S+ \S+  ce/fused \S+ .* \d+:\d\d left$", line)
        assert re.search(r"error %: student0 \S+  student1 \S+  ensemble \S+  fused \S+", line)
    assert "parameters" in out and out.splitlines()[-1] == "run folder: out"
    config = cd.Run(tmp_path / "out").config
    assert (config.method_name, config.networks, config.method.temperature) == ("mfef", ("tiny", "tiny"), 2.0)
    assert cd.Run(tmp_path / "out").summary["status"] == "finished"


def test_mfef_is_the_default_method_and_runs_have_names(made, capsys, tmp_path):
    flags = ["--data-dir", str(made / "colours.npz"), "--epochs", "1"]
    for _ in range(2):
        assert main(["train", *TINY, *flags]) == 0
    names = ["packed-mfef-tinyx2-seed0", "packed-mfef-tinyx2-seed0-2"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names
    assert f"run folder: runs/{names[1]}" in capsys.readouterr().out


def test_the_place_of_the_data_is_recorded_in_full(made, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    out = str(tmp_path / "out")
    assert main(["train", "independent", *TINY, "--data-dir", "colours.npz", "--epochs", "1", "--out", out]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "out"]) == 0


def test_the_config_of_a_run_repeats_it(made, capsys, tmp_path):
    assert main(["train", "--recipe", str(made / "run" / "config.json"), "--out", "again"]) == 0
    first, again = cd.Run(made / "run"), cd.Run(tmp_path / "again")
    assert again.config == first.config
    assert tiny.untimed(again.metrics()) == tiny.untimed(first.metrics())
    states = [each.checkpoints.load().method for each in (first, again)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_python_and_the_command_line_train_alike(made, capsys, tmp_path):
    # The command draws the weights of the networks from the seed; Python gets them as they are.
    config = cd.Run(made / "run").config
    method, data = build_method(config, 3, (8, 8)), cd.dataset("packed", made / "colours.npz")
    run = cd.train(method, data, settings=config.train, out=tmp_path / "py", show=False)
    assert tiny.untimed(run.metrics()) == tiny.untimed(cd.Run(made / "run").metrics())


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_evaluate(made, capsys, checkpoint):
    run = cd.Run(made / "run")
    row = run.metrics()[-1 if checkpoint == "last" else run.summary["best_epoch"] - 1]
    assert main(["evaluate", str(run.path), "--checkpoint", checkpoint]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", str(run.path), "--checkpoint", checkpoint, "--json", "--device", "cpu"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == PREDICTORS
    for name, each in scores.items():
        assert {key: each[key] for key in row["test"][name]} == pytest.approx(row["test"][name], rel=1e-4)
        line = next(line for line in table.splitlines() if line.startswith(name))
        low, high = each["top1_error_interval"]
        numbers = [f"{each[key]:.2f}" for key in ("top1_accuracy", "top1_error")] + [f"{low:.2f}-{high:.2f}"]
        numbers += [f"{each[key]:.2f}" for key in ("balanced_error", "top5_error")]
        assert line.split() == [name, *numbers, f"{each['nll']:.4f}", f"{each['ece']:.2f}"]


@pytest.mark.parametrize("predictor", [None, "ensemble"])
def test_predict(made, capsys, predictor):
    images = [str(made / f"image{index}.png") for index in range(3)]
    chosen = [] if predictor is None else ["--predictor", predictor]
    assert main(["predict", str(made / "run"), *images, *chosen, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["predict", str(made / "run"), *images, *chosen, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["image"] for answer in answers] == images
    for line, answer in zip(lines, answers, strict=True):
        shares = answer["classes"]
        assert set(shares) == {"red", "green", "blue"} and sum(shares.values()) == pytest.approx(1)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        first, second, _ = shares
        assert line == f"{answer['image']}: {first} {100 * shares[first]:.1f} %  {second} {100 * shares[second]:.1f} %"


def test_export_and_predict_with_the_file(run, made, capsys):
    assert main(["export", str(run), "--predictor", "fused", "--format", "safetensors"]) == 0
    path = run / "exports" / "fused.safetensors"
    line = capsys.readouterr().out
    assert re.match(rf"ok: {path}: fused, \d,\d+ parameters; .* compared on 9 test images: .* 100\.00 %$", line)
    images = [str(made / f"image{index}.png") for index in range(3)]
    answers = []
    for model in ([str(run), "--predictor", "fused"], [str(path)]):
        assert main(["predict", *model[:1], *images, *model[1:], "--json"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_export_takes_the_format_from_the_file_and_the_best_student(run, capsys, tmp_path):
    assert main(["export", str(run), "--out", str(tmp_path / "x" / "model.safetensors")]) == 0
    assert f"model.safetensors: {cd.Run(run).best_student()}, " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["model.safetensors"]


def test_list(capsys):
    assert main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert list(entries)[:3] == ["methods", "networks", "data"]
    names = {kind: [each["name"] for each in members] for kind, members in entries.items()}
    assert {"independent", "ffl", "mfef"} <= set(names["methods"])
    assert {"resnet20", "wrn-40-2", "densenet-40-12", "mobilenetv2", "resnet18"} <= set(names["networks"])
    assert {"digits", "cifar10", "cifar100", "cinic10", "folder", "packed"} <= set(names["data"])
    costs = {each["name"]: (each["map"], each["parameters"], each["flops"]) for each in entries["multiscale"]}
    assert list(costs) == ["hs", "res2net", "pyconv", "psa", "aspp"]
    assert costs["res2net"] == ([64, 8, 8], 6_912 + 96, 2 * 64 * 6_912)
    summaries = [each["summary"] for members in entries.values() for each in members]
    assert all(isinstance(summary, str) and summary.strip() for summary in summaries)
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for members in names.values() for name in members)
    assert "7,008 parameters, 884,736 flops" in " ".join(table.split())


def test_the_usage_names_every_command(capsys):
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        assert {*re.findall(r"^  (\w+)", capsys.readouterr().out, flags=re.MULTILINE)} == {*OPTIONS}


@pytest.mark.parametrize("command", [*OPTIONS, "train ffl"])
def test_help_of_a_command(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"usage: codistill {command}") and error == ""
    if command == "train ffl":
        assert "--method.temperature" in out and "--epochs" in out and "Number of passes over the training set" in out


USAGE = {
    "trian": "unknown command 'trian': did you mean train",
    "train --networks tiny tiny": "no data set: name one with --data",
    "train --data digits --networks": "no networks: name one for each student",
    "train --data digitz --networks resnet20 resnet20": "unknown data set 'digitz': did you mean digits",
    "train --data digits --networks resnet21 resnet20": "unknown network 'resnet21': did you mean .*resnet20",
    "train --data digits --networks resnet20:shortcut=Z resnet20": "option shortcut is 'Z': choose from A, B",
    "train --data digits --networks resnet20": "mfef needs at least 2 students, got 1",
    "train --data packed --networks tiny tiny": "data set packed: .* give --data-dir",
    "train mfef extra": "unknown option extra",
    "train --epochs": "--epochs",
    "train --padding-mode refect": "'refect' for argument '--padding-mode'",
    "train --recipe none.toml": "recipe none.toml: .*No such file",
    "train --data digits --networks resnet20 resnet20 --device cuda:99": "device 'cuda:99'",
    "evaluate": "missing: RUN",
    "evaluate run --jsn": "codistill evaluate: unknown option --jsn: did you mean --json",
    "evaluate run --checkpoint first": "'first' for argument '--checkpoint'",
    "predict": "missing: MODEL",
    "predict run": "no images: name at least one file",
    "predict run image.png --top 0": "--top is 0; it must be at least 1",
    "export": "missing: RUN",
    "export run --format onxx": "'onxx' for argument '--format'",
    "list methods": "unknown option methods",
}


@pytest.mark.parametrize("command", USAGE)
def test_wrong_usage_is_status_2_and_makes_nothing(capsys, tmp_path, tiny_registered, command):
    refused(capsys, command.split(), 2, USAGE[command])
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_is_taken_is_status_2(made, capsys):
    before = {name: content for name, content in tiny.listing(made / "run").items() if name != ".lock"}
    flags = ["--data-dir", str(made / "colours.npz"), "--out", str(made / "run")]
    refused(capsys, ["train", *TINY, *flags], 2, "run folder .*run is not empty: choose another --out")
    flags[1] = "nowhere"  # no data are read before
    refused(capsys, ["train", *TINY, *flags], 2, "run folder .*run is not empty: choose another --out")
    assert {name: content for name, content in tiny.listing(made / "run").items() if name != ".lock"} == before


def test_files_and_predictors_that_cannot_be_are_status_2(run, made, capsys, tmp_path):
    for arguments in ("--predictor student7", "--out model.txt", "--format onnx --out x.safetensors", ""):
        message = "no predictor 'student7'|no format|must end in .onnx"
        refused(capsys, ["export", str(run), *arguments.split()], 2, message)
    message = "no predictor 'student7': choose from student0, student1, ensemble, fused"
    refused(capsys, ["predict", str(run), str(made / "image0.png"), "--predictor", "student7"], 2, message)
    refused(capsys, ["evaluate", str(run), "--device", "cuda:99"], 2, "device 'cuda:99'")
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not (run / "exports").exists()


def test_missing_data_are_status_3(made, run, capsys, tmp_path):
    missing = str(tmp_path / "none.npz")
    for arguments in (["train", *TINY], ["evaluate", str(run)], ["export", str(run), "--format", "onnx"]):
        refused(capsys, [*arguments, "--data-dir", missing], 3, "none.npz: no such file")
    refused(capsys, ["predict", str(made / "run"), "none.png"], 3, "none.png: no such file")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.fault(51)
def test_bad_images_are_listed_and_the_good_ones_get_their_answers(made, capsys, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cut.png").write_bytes((made / "image0.png").read_bytes()[:-20])
    shutil.copy(made / "image0.png", tmp_path / "some" / "good, I think.png")
    assert main(["predict", str(made / "run"), str(made / "image1.png"), "none.png", "some", "--csv"]) == 3
    out, error = capsys.readouterr()
    heading, *rows = csv.reader(out.splitlines())
    assert heading == ["image", "class1", "probability1", "class2", "probability2", "class3", "probability3"]
    assert [row[0] for row in rows] == [str(made / "image1.png"), "some/good, I think.png"]
    assert all(float(row[2]) >= float(row[4]) for row in rows)
    starts = [line.split(": ")[:3] for line in error.splitlines()]
    assert starts == [["codistill", "error", name] for name in ("none.png", "some/cut.png")]
    refused(capsys, ["predict", str(made / "run"), "some", "--csv", "--json"], 2, "--json and --csv: choose one")


@pytest.mark.fault(44)
def test_skip_bad_leaves_out_what_cannot_be_read_in_every_command(made, capsys, tmp_path):
    names = {"train": ["a/0", "a/1", "b/0", "b/1"], "test": ["a/0", "b/0"]}
    for place in [tmp_path / "photos" / part / f"{name}.png" for part in names for name in names[part]]:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "image0.png", place)
    (tmp_path / "photos/train/a/cut.png").write_bytes((made / "image0.png").read_bytes()[:-20])
    said = f"{tmp_path}/photos: 1 bad file is left out: train/a/cut.png"
    tiny_pair = [*TINY[:3], "--data", "folder", "--data-dir", "photos", "--batch-size", "4", "--threads", "1"]

    def does(*command: str) -> None:
        assert main([*command]) == 0
        assert capsys.readouterr().err.count(said.replace(f"{tmp_path}/", "") if "train" in command else said) == 1

    refused(capsys, ["train", *tiny_pair, "--out", "r"], 3, "cut.png: cannot be read .*leave out bad files: --skip-bad")
    does("train", *tiny_pair, "--out", "r", "--epochs", "1", "--skip-bad")
    run = cd.Run("r")
    assert run.config.data == "folder:skip_bad=true" and run.metadata["dataset"]["left_out"] == ["train/a/cut.png"]
    does("evaluate", "r")
    (tmp_path / "r/summary.json").unlink()
    does("resume", "r")
    # A run that began without bad files, of which there are some now.
    facts = {**run.metadata, "data": "folder"}
    (tmp_path / "r/config.json").write_text(json.dumps(facts))
    refused(capsys, ["evaluate", "r"], 3, "cut.png: cannot be read")
    does("evaluate", "r", "--skip-bad")
    does("export", "r", "--predictor", "student0", "--format", "safetensors", "--skip-bad")
    (tmp_path / "r/report-images.npz").unlink(missing_ok=True)
    does("report", "r", "--skip-bad")
    assert main(["bench", *tiny_pair, "--seconds", "0.01", "--skip-bad"]) == 0
    assert "photos: 1 bad file is left out: train/a/cut.png" in capsys.readouterr().err
    assert main(["predict", str(made / "run"), "photos/train/a", "--skip-bad"]) == 0
    out, error = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "1 bad images are left out: photos/train/a/cut.png: cannot be read" in error
    refused(capsys, ["predict", str(made / "run"), "photos/train/a/cut.png", "--skip-bad"], 3, "cut.png: cannot be")
    refused(
        capsys, ["train", *TINY, "--data-dir", str(made / "colours.npz"), "--skip-bad"], 2, "unknown option 'skip_bad'"
    )


@pytest.mark.fault(52)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_that_the_output_lacks_are_shown_somehow(made, monkeypatch, tmp_path, encoding):
    shutil.copy(made / "image0.png", tmp_path / "猫 [1].png")
    written = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        assert main(["predict", str(made / "run"), "猫 [1].png"]) == 0
        assert written.getvalue().startswith(rb"\u732b [1].png: ")
        # A service may have no stdout at all.
        patch.setattr(sys, "stdout", None)
        assert main(["predict", str(made / "run"), "猫 [1].png"]) == 0


@pytest.mark.fault(54)
def test_commands_without_out_have_folders_of_their_own(made, tmp_path):
    config = cd.Run(made / "run").config
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: free_folder(config), range(24)))
    assert len({*folders}) == 24 and all(folder.is_dir() for folder in folders)


@pytest.mark.fault(54)
def test_a_folder_that_cannot_be_made_is_status_2(made, capsys, tmp_path):
    (tmp_path / "runs").write_text("a file")
    command = ["train", *TINY, "--data-dir", str(made / "colours.npz")]
    refused(capsys, command, 2, "run folder runs/packed-mfef-tinyx2-seed0: Not a directory: choose another --out")
    (tmp_path / "runs").unlink()
    # And one that was made for nothing is gone again.
    refused(capsys, [*command, "--seeds", "0", "1", "--batch-size", "23"], 2, "would be a single image")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(86)
def test_runs_side_by_side_say_once_that_their_batch_is_smaller(made, capsys):
    command = ["train", *TINY, "--data-dir", str(made / "colours.npz"), "--epochs", "1", "--out", "few"]
    assert main([*command, "--seeds", "0", "1", "--batch-size", "999"]) == 0
    assert capsys.readouterr().err.count("less than a batch of 999: each step trains on all of them") == 1


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --optimiser adam", "--optimiser does not exist: choose it with --optimizer: sgd or adamw"),
        ("train --scheduler cosine", "--scheduler does not exist: choose it with --schedule: step or cosine"),
        ("train --gpu 0", "--gpu does not exist: choose it with --device, as cuda, cuda:1 or cpu"),
        ("bench --num_workers=4", "--num-workers does not exist: images are held in memory"),
        ("train --amp", "--amp does not exist: choose it with --precision"),
        # Of flags that a command has not, none is named.
        ("predict --gpu 0", "unknown option --gpu: codistill predict --help lists them"),
        ("evaluate --frobnicate", "unknown option --frobnicate: codistill evaluate --help lists them"),
        ("evaluate --data", "unknown option --data: did you mean --data-dir"),
    ],
)
def test_options_of_other_tools_point_to_what_there_is(capsys, command, message):
    arguments = command.replace("evaluate", "evaluate run").replace("predict", "predict run x.png")
    refused(capsys, arguments.split(), 2, message)


@pytest.mark.fault(56)
def test_the_command_line_may_be_called_from_a_thread(made, capsys):
    before = signal.getsignal(signal.SIGTERM)
    flags = ["--data-dir", str(made / "colours.npz"), "--epochs", "1", "--out", "out [red]"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["train", *TINY, *flags]).result() == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out.splitlines()[-1] == "run folder: out [red]"


@pytest.mark.fault(57)
def test_runs_and_data_sets_have_a_short_repr(made):
    assert repr(cd.Run(made / "run")) == f"Run({str(made / 'run')!r})"
    assert repr(tiny.data()) == "Dataset('colours': 24 training and 9 test images of 8x8, 3 classes)"


@pytest.mark.parametrize("command", ["evaluate PLACE", "export PLACE --format onnx", "predict PLACE image.png"])
def test_what_is_no_run_is_status_4(capsys, tmp_path, command):
    for place in (tmp_path, tmp_path / "none"):
        refused(capsys, command.replace("PLACE", str(place)).split(), 4, "no such file|no such run folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate RUN", "export RUN --format onnx", "predict RUN IMAGE"])
def test_damaged_checkpoints_are_status_4(made, run, capsys, command):
    for path in (run / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = tiny.listing(run)
    arguments = [{"RUN": str(run), "IMAGE": str(made / "image0.png")}.get(word, word) for word in command.split()]
    assert main(arguments) == 4
    *warnings, last = capsys.readouterr().err.splitlines()
    assert all(line.startswith("codistill: warning: ") for line in warnings)
    assert re.match(r"codistill: error: .*epoch-000002\.pt: damaged: .*epoch-000001\.pt: damaged: ", last)
    assert tiny.listing(run) == before


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_a_damaged_model_file_is_status_4(made, capsys, tmp_path, name):
    (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
    refused(capsys, ["predict", name, str(made / "image0.png")], 4, f"{name}: damaged, or not written by codistill")


def test_a_divergence_is_status_5(made, capsys, tmp_path):
    flags = ["--data-dir", str(made / "colours.npz"), "--epochs", "2", "--out", "out", "--lr", "1e9"]
    refused(capsys, ["train", *TINY, *flags], 5, r"became NaN or infinite .*epoch 1 at learning rate 1e\+09")
    assert cd.Run(tmp_path / "out").summary["status"] == "diverged"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MemoryError("too much"), 6, "out of memory: use a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), 6, "out of memory: .*CUDA"),
        (
            OSError(28, "No space left on device"),
            6,
            "No space left on device: free some space; what was .* kept",
        ),
        (errors.UsageError("wrong,\nin two lines"), 2, "wrong, in two lines$"),
        (ZeroDivisionError("division by zero\nsomewhere"), 1, "bug: ZeroDivisionError: .* report it .*--debug"),
        (OSError(5, "Input/output error"), 6, "Input/output error: repair or replace the disk"),
        (OSError(116, "Stale file handle", "x/y"), 6, "x/y: Stale file handle: the network drive was lost"),
        (OSError(24, "Too many open files", "x/y"), 6, "x/y: Too many open files: .*ulimit -n"),
        (PermissionError(13, "Permission denied", "x/y"), 2, "x/y: Permission denied: choose another place"),
        (
            ModuleNotFoundError("no", name="sklearn.datasets"),
            2,
            "scikit-learn is not installed here: .* -m pip install",
        ),
        (ModuleNotFoundError("no", name="codistill.nothing"), 1, "bug: ModuleNotFoundError"),
        (OSError(9, "Bad file descriptor"), 1, "bug: OSError"),
        (KeyboardInterrupt(), 130, r": interrupted$"),
        (Terminated(), 143, r": terminated$"),
    ],
)
def test_every_kind_of_failure_has_its_status(capsys, monkeypatch, error, status, message):
    def fail(arguments):
        raise error

    monkeypatch.setattr(commands, "list_command", fail)
    refused(capsys, ["list"], status, message)
    for arguments in (["--debug", "list"], ["list", "--debug"]):
        assert main(arguments) == status
        traced, line = capsys.readouterr().err.split("codistill: error: ")
        assert traced.startswith("Traceback (most recent call last):\n") and "in fail" in traced and line.endswith("\n")


def test_memory_that_runs_out_in_training_is_status_6(made, capsys, monkeypatch, tmp_path):
    def fail(self, batch, progress):
        raise MemoryError

    monkeypatch.setattr(importlib.import_module("codistill.training.step").TrainStep, "__call__", fail)
    flags = ["--data-dir", str(made / "colours.npz"), "--out", "out"]
    words = "out of memory: mfef with tiny .* at batch size 8: use a smaller --batch-size, or fewer or smaller"
    refused(capsys, ["train", *TINY, *flags], 6, words)
    assert cd.Run(tmp_path / "out").summary["status"] == "failed"


# A shell may have started the tests with SIGINT ignored, and children inherit that.
TRAIN = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from codistill.cli import main
    from tests import tiny
    with tiny.registered():
        sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["train", "resume", "evaluate", "report", "predict", "export"])
@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_at_any_time_is_a_line_and_only_what_trains_is_resumed(capsys, monkeypatch, command, number, line):
    monkeypatch.setattr(f"codistill.cli.commands.{command}_command", lambda _: signal.raise_signal(number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([command, "run", "image.png"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    resumes = "; where a run folder is there already, codistill resume RUN resumes it" * (
        command in ("train", "resume")
    )
    assert capsys.readouterr().err == f"codistill: error: {line}{resumes}\n"


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),  # tests/faults has it in one process
    ],
)
def test_a_signal_ends_a_training_in_order(made, tmp_path, number, status, word):
    flags = ["--data-dir", str(made / "colours.npz"), "--epochs", "100000", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAIN), "train", *TINY, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout.readline().startswith("epoch 1/100000")
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status
    place = r"after step [123] of epoch \d+ and saved: codistill resume "
    assert re.fullmatch(rf"codistill: error: {word} {place}{tmp_path / 'out'}\n", error)
    run = cd.Run(tmp_path / "out")
    assert run.summary["status"] == "interrupted"
    assert run.checkpoints.load().epoch >= len(run.metrics()) >= 1
    # And the folder is free: nobody holds the lock of a process that is gone.
    lock_folder(run.path).close()


@pytest.mark.parametrize("command", ["list --json", "train"])
def test_a_reader_that_goes_away_as_head_does_is_no_error(made, capsys, monkeypatch, tmp_path, command):
    flags = [*TINY, "--data-dir", str(made / "colours.npz"), "--epochs", "3", "--out", "out"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main([*command.split(), *(flags if command == "train" else [])]) == 0
    assert capsys.readouterr().err == ""
    assert command != "train" or cd.Run(tmp_path / "out").summary["status"] == "finished"
