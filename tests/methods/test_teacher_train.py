"""A teacher of which parts are trained: what learns, what stays, and that a run goes on exactly."""

import signal
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.methods import METHODS
from codistill.methods.losses import cross_entropy
from codistill.settings.config import TeacherSettings
from codistill.training.optim import make_optimizer
from codistill.training.step import make_step

from .. import tiny
from ..faults.running import at_step, end_state
from . import slow

TINY = ["--networks", "tiny", "tiny", "--data", "packed", "--batch-size", "8", "--lr", "0.05", "--threads", "1"]


def teacher_of() -> cd.Network:
    torch.manual_seed(7)
    return tiny.own_students(1)[0]


def taught(kind: type[cd.Method] = cd.KD, pattern: str = "head", **settings) -> cd.Method:
    return cd.WithTeacher(tiny.method(kind, **settings), teacher_of(), 0.5, 4.0, train=pattern)


def test_a_whole_step_against_a_slow_derivation(batch):
    method = taught(pattern=r"head|stages\.2\.1").double().train()
    slow.disturb_norms(method)
    images, labels = batch
    _, logits = slow.run_students(method, images, (2, 2))
    own = method.taught_by.network(images)
    target = slow.probabilities(own.detach(), 4.0)
    loss = slow.ce(own, labels) + sum(slow.ce(each, labels) + 8 * slow.kl(target, each, 4.0) for each in logits)
    assert len(method.teacher_parts) == 4
    slow.assert_step_agrees(method, batch, 10, loss)


def test_each_view_of_a_student_teaches_the_teacher(batch):
    method = taught(cd.KDCL).double().train()
    views = torch.stack([batch[0], batch[0].flip(3)])
    outputs = method(views)
    expected = sum(cross_entropy(method.taught_by.network(each), batch[1]) for each in views) / 2
    torch.testing.assert_close(method.losses(outputs, batch[1], 0.5)["ce/teacher"], expected)


@pytest.mark.parametrize("kind", [cd.KD, cd.MFEF, cd.PCL])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_named_learns_and_the_rest_stays(kind, optimizer):
    method, data = taught(kind, pattern=r"stages\.1\.0"), tiny.data()
    teacher = method.taught_by.network
    before = {name: each.clone() for name, each in teacher.state_dict().items()}
    images = DeviceImages(data.train, data.statistics, torch.device("cpu"))
    step = make_step(method, images, Augmentation(), tiny.settings(optimizer=optimizer))
    plan = epoch_indices(24, 0, 0, Augmentation(), torch.device("cpu"), method.views)
    for start in (0, 8, 16):
        step(plan.part(start, start + 8), torch.tensor(0.0))
    changed = {name for name, each in teacher.state_dict().items() if not torch.equal(each, before[name])}
    assert changed == {"stages.1.0.weight"}
    assert not teacher.training and "ce/teacher" in step.sums.names
    trained = [id(each) for group in make_optimizer(method, tiny.settings()).param_groups for each in group["params"]]
    assert trained.count(id(teacher.stages[1][0].weight)) == 1


def test_without_a_pattern_all_is_frozen(batch):
    method = cd.WithTeacher(tiny.method(cd.KD), teacher_of()).double()
    outputs = method(batch[0])
    assert not outputs.teacher_logits.requires_grad and not len(method.teacher_parts)
    assert "ce/teacher" not in method.losses(outputs, batch[1], 0.5)


def test_bad_patterns():
    for pattern, message in (
        ("heads", "teacher_train is 'heads', which is in no name of the teacher's parameters, as .*head.linear.bias"),
        ("he(ad", r"teacher_train is 'he\(ad', which is no regular expression: missing \)"),
    ):
        with pytest.raises(UsageError, match=message):
            taught(pattern=pattern)
    with pytest.raises(UsageError, match="teacher_train is 'head', but there are 2 teachers: name one"):
        cd.WithTeacher(tiny.method(cd.KD), [teacher_of(), teacher_of()], train="head")
    with pytest.raises(UsageError, match="teacher_train is 'head', but the students take turns"):
        taught(cd.DML, update="alternating")
    for name in ("fsp", "ab"):
        line = f"teacher_train is 'head', but the teacher of {name} does not run while the labels train: set method.kl"
        with pytest.raises(UsageError, match=line):
            taught(METHODS[name], students=1)
        assert len(taught(METHODS[name], students=1, kl_weight=0.5).teacher_parts) == 2
    with pytest.raises(UsageError, match="teacher_train is 'head', but --teacher names none"):
        TeacherSettings(teacher_train="head")


@pytest.mark.usefixtures("tiny_registered", "no_pages")
def test_a_run_goes_on_exactly(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_npz(tmp_path / "colours.npz", tiny.data())
    common = [*TINY, "--data-dir", "colours.npz", "--epochs", "2"]
    assert main(["train", "independent", *common, "--out", "teacher"]) == 0
    command = ["train", "mfef", *common, "--ema-decay", "0.9", "--teacher", "teacher", "--teacher-train", "head"]
    assert main([*command, "--out", "whole"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda _: signal.raise_signal(signal.SIGTERM))
        assert main([*command, "--out", "broken"]) == 143
    assert main(["resume", "broken"]) == 0
    assert end_state(Path("broken")) == end_state(Path("whole"))
    run = cd.Run("whole")
    parts = {name for name in run.checkpoints.load().method if name.startswith("teacher_parts.")}
    assert len(parts) == 2 and not parts & set(run.load_method().state_dict())
    (tmp_path / "teacher").rename(tmp_path / "gone")
    assert "student0" in run.evaluate() and run.export("student0", tmp_path / "student.safetensors").exists()
    assert main([*command[:-1], "tail", "--teacher", "gone", "--out", "no"]) == 2
    assert "teacher_train is 'tail', which is in no name of the teacher's parameters" in capsys.readouterr().err
