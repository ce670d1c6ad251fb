"""`--import`: networks, methods and data sets of one's own in every command, and in later processes."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from codistill.core import imports
from codistill.data import DATASETS
from codistill.methods import METHODS
from codistill.networks import NETWORKS
from codistill.sweeps import driver
from codistill.sweeps.engines import local

from ..faults.asserting import refused
from ..faults.running import end_state, kill_at_step, run_here

MINE = """
from codistill.data import DATASETS
from codistill.methods import METHODS
from codistill.methods.dml import DML
from codistill.networks import NETWORKS
from tests import tiny

NETWORKS.register("mynet")(tiny.network)

@METHODS.register("my-method")
class MyMethod(DML):
    "A method of mine."

@DATASETS.register("mydata")
def mydata(images: int = 24):
    return tiny.data(train=images, test=9, name="mydata")
"""
TRAIN = ["train", "my-method", "--networks", "mynet", "mynet:width=6", "--data", "mydata", "--epochs", "2"]
TRAIN += ["-b", "8", "--threads", "1"]


@pytest.fixture
def fresh(monkeypatch, tmp_path, empty_folder):
    """Return what makes this process one that has imported nothing of the user's."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "theirs.py").write_text(MINE)
    registries = [(each, dict(each)) for each in (NETWORKS, METHODS, DATASETS)]
    before, path = {*sys.modules}, list(sys.path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget() -> None:
        for registry, entries in registries:
            for name in registry.keys() - entries.keys():
                del registry._registered[name]
        imports._done.clear()
        for name in sys.modules.keys() - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
                del sys.modules[name]
        sys.path[:] = path
        importlib.invalidate_caches()

    yield forget
    forget()


@pytest.mark.fault(90)
@pytest.mark.parametrize(
    "name",
    ["./mine.py", "deep.theirs", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mine", "deep/theirs.py"))],
)
def test_what_is_imported_is_trained_and_used_in_later_processes(fresh, name, capsys, monkeypatch):
    own = ["--import", name]
    with pytest.MonkeyPatch.context() as patch:
        kill_at_step(patch, 5, 2)
        assert run_here([*TRAIN, "--out", "stopped", *own]) == 130
    fresh()
    recorded = json.loads(Path("stopped/config.json").read_text())["imports"]
    assert capsys.readouterr().err.endswith(f"and saved: codistill resume stopped --import {recorded[0]}\n")
    assert recorded == [str(Path(name).absolute()) if name.endswith(".py") else name]
    for command in (["resume", "stopped"], ["evaluate", "stopped"], ["export", "stopped", "--format", "safetensors"]):
        refused(capsys, command, 4, "'my-method' is not registered", f"--import {recorded[0]}")
    assert "mine" not in sys.modules and "deep.theirs" not in sys.modules  # a folder imports nothing by itself
    assert run_here([f"--import={name}", "resume", "stopped"]) == 0
    assert run_here([*own, *TRAIN, "--out", "whole"]) == 0
    assert end_state(Path("stopped")) == end_state(Path("whole"))
    exporting = ["export", "whole", "--predictor", "student1", "--out", "one.safetensors"]
    for command in (["evaluate", "whole"], exporting, ["train", "--recipe", "whole/config.json", "--out", "again"]):
        fresh()
        assert run_here([*command, *own]) == 0
    assert end_state(Path("again")) == end_state(Path("whole"))
    fresh()
    refused(capsys, ["predict", "one.safetensors", "x.png"], 4, "not registered", f"--import {recorded[0]}")


@pytest.mark.fault(90)
def test_help_and_lists_have_what_is_imported(fresh, capsys):
    assert run_here(["train", "my-method", "--import", "mine", "--help"]) == 0
    assert "codistill train my-method" in capsys.readouterr().out
    assert run_here(["list", "--json", "--import", "./mine.py", "--import", "mine"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"name": "my-method", "summary": "A method of mine."} in listed["methods"]
    assert "mynet" in {each["name"] for each in listed["networks"]}
    refused(capsys, [*TRAIN[:1], "my-metod", *TRAIN[2:], "--import", "mine"], 2, "did you mean my-method?")
    refused(capsys, [*TRAIN, "--imprt", "mine"], 2, "did you mean --import?")
    fresh()
    refused(capsys, TRAIN, 2, "unknown method 'my-method'", "--import MODULE")


@pytest.mark.fault(90)
def test_sweeps_hand_imports_on(fresh, monkeypatch):
    commands = []
    monkeypatch.setattr(local, "launch", lambda command, *_: commands.append(command) or 1 / 0)
    Path("spec.toml").write_text('networks = ["mynet", "mynet"]\nmethod = "my-method"\ndata = "mydata"\n')
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "codistill", "--import", "mine", "sweep", "spec.toml"])
    assert run_here(["--import", "mine", "sweep", "spec.toml", "--out", "sweep"]) == 1
    assert commands[0][-2:] == ["--import", "mine"] and commands[0].count("--import") == 1
    argv = ["python", "-m", "mine", "sweep", "--import=mine", "s.toml"]
    monkeypatch.setattr(sys, "orig_argv", argv)
    assert driver.own_program(["sweep", "s.toml"])[1:] == ["-m", "mine"]


@pytest.mark.fault(90)
@pytest.mark.parametrize(
    ("name", "source", "reason"),
    {
        "a module that raises": ("wrong", "x = 1\nraise RuntimeError('so\\nthat')", "RuntimeError: so that ("),
        "a file that raises": ("./wrong.py", "1 / 0", "wrong.py, line 1"),
        "no Python": ("wrong", "def (", "SyntaxError: invalid syntax (wrong.py, line 1)"),
        "it imports what is not there": ("./wrong.py", "import not_there", "No module named 'not_there'"),
        "it exits": ("wrong", "raise SystemExit(0)", "SystemExit: 0"),
        "a taken name": (
            "./wrong.py",
            "from codistill.networks import NETWORKS\nNETWORKS.register('resnet20')(print)",
            "two entries for the network 'resnet20'",
        ),
        "no such module": ("wrongly", "", "no module 'wrongly' is found from"),
        "no such part": ("wrong.part", "", "no module 'wrong.part' is found from"),
        "no such file": ("./wrongly.py", "", "no such file"),
        "a folder": (".", "", "is a folder"),
        "nothing": ("", "", "name a module or a .py file"),
        "a flag": ("--out", "", "name a module or a .py file"),
    }.values(),
)
def test_what_cannot_be_imported_is_one_line(fresh, capsys, name, source, reason):
    Path("wrong.py").write_text(source)
    refused(capsys, [*TRAIN, "--import", name], 2, "--import", reason, unchanged=Path.cwd())


@pytest.mark.fault(90)
def test_a_hostile_config_names_imports_that_are_text_only():
    for names in ({"a": 1}, [1, None], "mine", []):
        assert "--import" in imports.trained_with({"imports": names})
