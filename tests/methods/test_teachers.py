"""Several frozen teachers: the mean of their softened predictions, where they come from, and how they are recorded."""

import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core.errors import CheckpointError, UsageError
from codistill.methods import METHODS
from codistill.settings.config import TeacherSettings
from codistill.training.teacher import load_teacher

from .. import tiny
from ..faults.running import at_step, end_state
from . import slow

TINY = ["--networks", "tiny", "tiny", "--data", "packed", "--batch-size", "8", "--lr", "0.05", "--threads", "1"]
pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")


def students(seed: int, count: int = 1, classes: int = 3) -> list[cd.Network]:
    torch.manual_seed(seed)
    return tiny.own_students(count, classes)


def test_the_mean_of_the_softened_predictions_teaches(batch):
    first, second = [*students(1), *students(2)]
    method = cd.WithTeacher(cd.KD(students(3), 3, image_size=(8, 8)), [first, second], 0.5, 4.0).double()
    slow.disturb_norms(method)
    outputs = method(batch[0])
    mean = (slow.probabilities(first(batch[0]), 4.0) + slow.probabilities(second(batch[0]), 4.0)) / 2
    expected = 0.5 * 16 * slow.kl(mean, outputs.logits[0], 4.0)
    terms = method.losses(outputs, batch[1], 0.0)
    torch.testing.assert_close(terms["kl/teacher->student0"], expected, rtol=1e-8, atol=0)
    loss = slow.ce(outputs.logits[0], batch[1]) + expected
    slow.assert_step_agrees(method, batch, 10, loss)
    assert not any(each.requires_grad or each.grad is not None for each in (*first.parameters(), *second.parameters()))
    assert not first.training and not second.training


def test_two_teachers_by_hand():
    # (3/4, 1/4) and (1/4, 3/4) have the mean (1/2, 1/2).
    log3 = math.log(3)

    class Fixed(torch.nn.Module):
        def __init__(self, *logits: float) -> None:
            super().__init__()
            self.register_buffer("logits", torch.tensor(logits))

        def forward(self, images):
            return self.logits.expand(len(images), -1)

    method = cd.WithTeacher(
        cd.KD(students(3, 1, 2), 2, image_size=(8, 8)), [Fixed(log3, 0.0), Fixed(0.0, log3)], 1.0, 1.0
    )
    torch.testing.assert_close(method.taught_by.logits(torch.zeros(5, 3, 8, 8)).softmax(1), torch.full((5, 2), 0.5))


def test_one_in_a_list_is_that_one(batch):
    (teacher,) = students(1)
    assert cd.WithTeacher(tiny.method(cd.KD), [teacher]).taught_by.network is teacher


def test_what_cannot_teach(batch):
    for teachers, message in (
        ([], "there is no teacher in the list: hand in at least one"),
        ([*students(1), *students(2, 1, 4)], "the teacher has 4 classes, but the students 3"),
    ):
        with pytest.raises(UsageError, match=message):
            cd.WithTeacher(tiny.method(cd.KD), teachers)
    for name in (name for name in METHODS if METHODS[name].teacher_maps):
        with pytest.raises(UsageError, match="there are 2 teachers, but this method needs the maps of one: name one"):
            cd.WithTeacher(tiny.method(METHODS[name]), [*students(1), *students(2)])


def test_places_of_teachers():
    assert TeacherSettings(teacher=["a"]) == TeacherSettings(teacher="a")
    assert TeacherSettings(teacher="a").teachers == ("a",)
    assert TeacherSettings(teacher=["a", "b"]).teachers == ("a", "b")
    assert TeacherSettings(teacher=[]) == TeacherSettings()
    with pytest.raises(CheckpointError, match="teacher b: no such run folder or file"):
        load_teacher(TeacherSettings(teacher=("b", "c")), tiny.CLASSES, ((0.0,) * 3, (1.0,) * 3))


@pytest.fixture(scope="module")
def made(tiny_registered, tmp_path_factory) -> Path:
    """A data file, and a run of two students; to be read only."""
    folder = tmp_path_factory.mktemp("teachers")
    tiny.write_npz(folder / "colours.npz", tiny.data())
    flags = ["--data-dir", str(folder / "colours.npz"), "--epochs", "2", "--out", str(folder / "run")]
    assert main(["train", "independent", *TINY, *flags]) == 0
    return folder


def test_a_run_with_two_teachers(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for predictor in ("student0", "student1"):
        cd.Run(made / "run").export(predictor, tmp_path / f"{predictor}.safetensors")
    names = ["student0.safetensors", "student1.safetensors"]
    command = ["train", "kd", *TINY, "--data-dir", str(made / "colours.npz"), "--epochs", "2", "--teacher", *names]
    assert main([*command, "--out", "whole"]) == 0
    said = capsys.readouterr().out
    for name in names:
        assert f"{name}: error on the test set" in said.replace("\n", "")
    run = cd.Run("whole")
    assert f"the mean of the teachers: error on the test set {run.summary['teacher_top1_error']:.2f} %" in said
    assert run.metadata["teacher"] == [str(tmp_path / name) for name in names]
    assert len(run.metadata["teacher_sha256"]) == 64
    assert set(run.load_method().state_dict()) == set(tiny.method(cd.Independent).state_dict())

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda _: signal.raise_signal(signal.SIGTERM))
        assert main([*command, "--out", "broken"]) == 143
    Path("elsewhere").mkdir()
    for name in names:
        shutil.move(name, "elsewhere")
    moved = [f"teacher={tmp_path / 'elsewhere' / name}" for name in names]
    capsys.readouterr()
    assert main(["resume", "broken"]) != 0
    assert "student0.safetensors: no such run folder or file; if it has moved, name all in the order that it" in (
        capsys.readouterr().err
    )
    assert main(["resume", "broken", "--override", *moved[::-1]]) != 0
    assert "its weights are not those that broken began with" in capsys.readouterr().err
    assert main(["resume", "broken", "--override", *moved]) == 0
    assert end_state(Path("broken")) == end_state(Path("whole"))


def test_one_teacher_is_recorded_as_ever(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", "kd", *TINY, "--data-dir", str(made / "colours.npz"), "--epochs", "1"]
    assert main([*command, "--teacher", str(made / "run"), "--out", "one"]) == 0
    assert cd.Run("one").metadata["teacher"] == str(made / "run")
    assert cd.Run("one").config.teaching.teacher == str(made / "run")
