"""What a run folder cannot hold, data, teacher and classes of one's own: recognised, moved, and handed in."""

import contextlib
import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import codistill as cd
from codistill.core.errors import CheckpointError, CodistillError, DataError, UsageError
from codistill.networks import NETWORKS
from codistill.training.resume import resume

from .. import tiny
from .asserting import refused
from .running import arguments, at_step, end_state, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")


def write(path: Path, train: cd.Split | None = None) -> str:
    whole = tiny.data(train=20, test=21)
    return str(tiny.write_npz(path, dataclasses.replace(whole, train=train or whole.train)))


def stopped(work: Callable[[], object], step: int = 5) -> None:
    """Train until a step, and send SIGINT there."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(signal.SIGINT))
        with contextlib.suppress(KeyboardInterrupt):
            assert work() == 130


def changed(split: cd.Split, what: str) -> cd.Split:
    images, labels = split.images.copy(), split.labels.copy()
    if what == "training images":
        images[3, 4, 5, 1] ^= 1
    else:
        labels[:] = np.array([1, 0, 2])[labels]
    return cd.Split(images, labels)


@pytest.mark.fault(71)
@pytest.mark.parametrize("what", ["training images", "training labels"])
def test_a_resume_knows_its_data(tmp_path, capsys, what):
    place = tmp_path / "colours.npz"
    stopped(lambda: run_here(arguments(write(place), tmp_path / "run")))
    write(place, changed(tiny.data(train=20, test=21).train, what))
    refused(capsys, ["resume", str(tmp_path / "run")], 3, what, "SHA-256", str(tmp_path / "run"), unchanged=tmp_path)
    write(place)
    assert run_here(["resume", str(tmp_path / "run")]) == 0


@pytest.mark.fault(101)
def test_evaluate_says_that_the_test_set_is_another_one(tmp_path, capsys):
    place, run = tmp_path / "colours.npz", tmp_path / "run"
    assert run_here(arguments(write(place), run)) == 0
    data = tiny.data(train=20, test=21)
    capsys.readouterr()
    write(place, changed(data.train, "training images"))  # the test set is what it was
    assert run_here(["evaluate", str(run)]) == 0
    out, error = capsys.readouterr()
    assert error == "" and "best student: " in out
    for what in ("training images", "training labels"):
        other = dataclasses.replace(data, test=changed(data.test, what))
        tiny.write_npz(place, other)
        assert run_here(["evaluate", str(run), "--json"]) == 0
        out, error = capsys.readouterr()
        assert error.count("\n") == 1 and error.startswith(f"codistill: warning: {run}: ")
        assert f"{what.replace('training', 'test')} of packed are other ones (SHA-256) than in training" in error
        assert json.loads(out).keys() == cd.Run(run, data=other).evaluate().keys()
        assert "are other ones" in capsys.readouterr().err
        assert run_here(["evaluate", str(run)]) == 0
        assert "best student: " not in capsys.readouterr().out


@pytest.mark.fault(71)
def test_of_runs_that_go_on_side_by_side_each_knows_its_data(tmp_path, capsys):
    place = tmp_path / "colours.npz"
    outs = [tmp_path / "one", tmp_path / "other"]
    stopped(lambda: run_here(arguments(write(place), outs[0])))
    stopped(lambda: run_here(arguments(write(place, changed(tiny.data(train=20).train, "labels")), outs[1])))
    refused(capsys, ["resume", *map(str, outs)], 3, "training labels", str(outs[0]), unchanged=tmp_path)


@pytest.mark.fault(72)
def test_the_lines_about_data_that_moved_name_the_flag(tmp_path, capsys):
    place, moved, out = tmp_path / "colours.npz", tmp_path / "moved.npz", tmp_path / "run"
    stopped(lambda: run_here(arguments(write(place), out)))
    place.rename(moved)
    export = ["export", str(out), "--predictor", "student0", "--format", "safetensors"]
    commands = [["evaluate", str(out)], export, ["resume", str(out)]]
    for command in commands:
        refused(capsys, command, 3, "--data-dir", str(place), str(out), unchanged=tmp_path)
    for command in commands:
        assert run_here([*command, "--data-dir", str(moved)]) == 0


@pytest.mark.fault(73)
def test_a_teacher_that_moved_is_named_and_known_by_its_weights(tmp_path, capsys):
    data = write(tmp_path / "colours.npz")
    for name, seed in (("teacher", "0"), ("another", "1")):
        assert run_here(arguments(data, tmp_path / name, "--seed", seed, method="independent")) == 0
    more = ("--teacher", str(tmp_path / "teacher"))
    assert run_here(arguments(data, tmp_path / "whole", *more, method="kd")) == 0
    out = tmp_path / "run"
    stopped(lambda: run_here(arguments(data, out, *more, method="kd")), 3)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    resumed = ["resume", str(out)]
    refused(capsys, resumed, 4, "--override teacher=PATH", "no such", unchanged=tmp_path)
    shutil.copytree(tmp_path / "another", tmp_path / "teacher")
    refused(capsys, resumed, 4, "--override teacher=PATH", "its weights", "SHA-256", unchanged=tmp_path)
    named = [*resumed, "--override", f"teacher={tmp_path / 'moved'}"]
    stopped(lambda: run_here(named), 2)  # the checkpoint now names another place than config.json
    assert run_here(named) == 0
    assert end_state(out) == end_state(tmp_path / "whole")


@pytest.mark.fault(73)
def test_a_teacher_that_was_attached_in_python_is_not_forgotten(tmp_path):
    def taught(seed: int = 1) -> cd.Method:
        return cd.WithTeacher(tiny.method(cd.KD, students=1), tiny.method(seed=seed).cohort[0])

    settings, out = tiny.settings(), tmp_path / "run"
    whole = cd.train(taught(), tiny.data(), out=tmp_path / "whole", settings=settings, show=False)
    stopped(lambda: cd.train(taught(), tiny.data(), out=out, settings=settings, show=False))
    with pytest.raises(UsageError, match="teacher"):
        resume(out, show=False, method=tiny.method(cd.KD, students=1), data=tiny.data())
    with pytest.raises(CheckpointError, match="its weights are not those"):
        resume(out, show=False, method=taught(seed=2), data=tiny.data())
    resume(out, show=False, method=taught(), data=tiny.data())
    assert end_state(out) == end_state(whole.path)


@pytest.mark.fault(74)
def test_arrays_and_networks_of_ones_own_are_handed_in(tmp_path):
    data, out = tiny.data(), tmp_path / "run"
    whole = cd.train(tiny.method(), data, out=tmp_path / "whole", settings=tiny.settings(), show=False)
    stopped(lambda: cd.train(tiny.method(), data, out=out, settings=tiny.settings(), show=False))
    acts: list[Callable[..., object]] = [
        lambda **own: cd.Run(out, **own).evaluate(device="cpu"),
        lambda **own: cd.Run(out, **own).export("student0", tmp_path / "student.pt2"),
        lambda **own: resume(out, show=False, **own),
    ]
    before = tiny.listing(tmp_path)
    for act in acts:
        for own, missing in (({"method": tiny.method()}, "data"), ({"data": data}, "method")):
            with pytest.raises(CodistillError, match=rf"codistill\.resume\(path, {missing}=\.\.\)") as error:
                act(**own)
            assert f"codistill.Run(path, {missing}=..)" in str(error.value) and "damaged" not in str(error.value)
        with pytest.raises(UsageError, match=r"has temperature = 3\.0, the one that was handed in 2\.0$"):
            act(data=data, method=tiny.method(temperature=2.0))
    assert tiny.listing(tmp_path) == before
    other = changed(data.test, "labels")
    with pytest.raises(DataError, match="test labels"):
        resume(out, show=False, method=tiny.method(), data=dataclasses.replace(data, test=other))
    for act in acts:
        act(data=data, method=tiny.method(seed=5))
    assert end_state(out) == end_state(whole.path)
    assert cd.Run(out, tiny.method(seed=5), data).evaluate(device="cpu") == whole.evaluate(device="cpu")


class Mine(cd.DML):
    """A subclass that keeps the public name of what it derives from."""


@pytest.mark.fault(75)
def test_a_method_of_ones_own_is_never_taken_for_another(tmp_path):
    data, out = cd.dataset("packed", write(tmp_path / "colours.npz")), tmp_path / "run"

    def method() -> cd.Method:
        return Mine([cd.network("tiny", 3), cd.network("tiny", 3)], 3, image_size=(8, 8))

    stopped(lambda: cd.train(method(), data, out=out, settings=tiny.settings(), show=False))
    with pytest.raises(CheckpointError, match=r"method Mine is not registered.*resume\(path, method=\.\.\)"):
        resume(out, show=False)
    run = resume(out, show=False, method=method())
    assert type(run.load_method()) is Mine
    with pytest.raises(CheckpointError, match=r"method Mine .*Run\(path, method=\.\.\)"):
        cd.Run(out).evaluate()
    assert cd.Run(out, method()).evaluate(device="cpu") == run.evaluate(device="cpu")


@pytest.mark.fault(75)
def test_what_is_no_longer_registered_is_not_called_damaged(tmp_path, capsys, monkeypatch):
    out, file = tmp_path / "run", tmp_path / "s.safetensors"
    assert run_here(arguments(write(tmp_path / "colours.npz"), out, "--epochs", "1")) == 0
    assert run_here(["export", str(out), "--predictor", "student0", "--out", str(file)]) == 0
    monkeypatch.delitem(NETWORKS._entries, "tiny")
    line = refused(capsys, ["evaluate", str(out)], 4, "network 'tiny' is not registered", "Run(path, method=..)")
    assert "damaged" not in line
    line = refused(capsys, ["predict", str(file), str(file)], 4, "network 'tiny' is not registered")
    assert "damaged" not in line
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"method": {"name": "theirs", "depth": 3}}))
    assert "damaged" not in refused(capsys, ["evaluate", str(out)], 4, "method 'theirs' is not registered")
