"""A frozen teacher: its terms worked by hand, what it leaves alone, and every place that it may come from."""

import argparse
import contextlib
import copy
import dataclasses
import inspect
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import codistill as cd
from codistill.cli import main
from codistill.core.console import warn_once
from codistill.core.errors import CheckpointError, DivergedError, UsageError
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.deploy.classifier import load_classifier
from codistill.deploy.export import export_predictor
from codistill.methods import METHODS
from codistill.methods.kd import WithTeacher
from codistill.runs.evaluate import evaluate_run
from codistill.settings.config import TeacherSettings
from codistill.training.step import make_step
from codistill.training.teacher import load_teacher, read_checkpoint

from .. import tiny
from ..networks.zoo import ZOO, foreign

START = torch.tensor(0.0)
STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
TINY = ["--networks", "tiny", "tiny", "--data", "packed", "--batch-size", "8", "--lr", "0.05", "--threads", "1"]
pytestmark = pytest.mark.usefixtures("empty_folder")


def teacher_of(seed: int = 7, classes: int = 3) -> cd.Network:
    torch.manual_seed(seed)
    return tiny.own_students(1, classes)[0]


def taught(kind: type[cd.Method] = cd.KD, weight: float = 1.0, temperature: float = 3.0, **settings) -> cd.Method:
    return WithTeacher(tiny.method(kind, **settings), teacher_of(), weight, temperature)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# The terms.


def test_the_methods_own_terms_stay_what_they_are(batch):
    method = taught(cd.MFEF).double()
    images, labels = batch
    outputs = method(images)
    terms = method.losses(outputs, labels, START)
    own = tiny.method(cd.MFEF).double().losses(tiny.method(cd.MFEF).double()(images), labels, START)
    assert list(terms) == [*own, "kl/teacher->student0", "kl/teacher->student1"]
    torch.testing.assert_close({name: terms[name] for name in own}, own)


@pytest.mark.parametrize(
    "name", [n for n in METHODS if METHODS[n].teacher != "refused" and METHODS[n].adds_teacher_terms]
)
def test_every_method_that_may_have_a_teacher_learns_from_it(name, batch):
    torch.manual_seed(0)
    students = tiny.own_students(max(2, METHODS[name].min_students))
    method = WithTeacher(METHODS[name](students, 3, image_size=(8, 8)), teacher_of()).double()
    images, labels = batch
    views = images if method.views == 1 else images.expand(method.views, *images.shape)
    outputs = method(views)
    terms = method.losses(outputs, labels, START)
    for index, logits in enumerate(outputs.logits):
        term = terms[f"kl/teacher->student{index}"]
        expected = 9 * F.kl_div(
            (logits / 3).log_softmax(1), (method.taught_by.network(images) / 3).softmax(1), reduction="sum"
        )
        torch.testing.assert_close(term, expected / 6)
    sum(terms.values()).backward()


def test_each_view_has_its_own_teacher_logits():
    method = taught(cd.KDCL)
    assert method.views == 2
    views = torch.randn(2, 4, 3, 8, 8)
    outputs = method(views)
    assert outputs.teacher_logits.shape == (2, 4, 3)
    terms = method.losses(outputs, torch.tensor([0, 1, 2, 0]), START)
    for index in range(2):
        target = method.taught_by.network(views[index])
        torch.testing.assert_close(outputs.teacher_logits[index], target)
        expected = 9 * F.kl_div(
            (outputs.logits[index] / 3).log_softmax(1), (target / 3).softmax(1), reduction="batchmean"
        )
        torch.testing.assert_close(terms[f"kl/teacher->student{index}"], expected)


@pytest.mark.fault(61)
@pytest.mark.parametrize("name", METHODS)
def test_progress_may_be_a_number(name):
    kind = METHODS[name]
    students = tiny.own_students(1 if kind.max_students == 1 else max(2, kind.min_students))
    method = kind(students, 3, image_size=(8, 8))
    method = method if kind.teacher == "refused" else WithTeacher(method, teacher_of())
    outputs = method(torch.randn(*((method.views,) if method.views > 1 else ()), 6, 3, 8, 8))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert method.losses(outputs, labels, 0.25) == method.losses(outputs, labels, torch.tensor(0.25))
    assert method.losses(outputs, labels, 1) == method.losses(outputs, labels, torch.tensor(1.0))
    for wrong in (30, -0.1, math.nan):
        with pytest.raises(UsageError, match="it must be epoch / epochs, 0 to 1"):
            method.losses(outputs, labels, wrong)


# What a teacher leaves alone, and is left alone by.


@pytest.mark.parametrize("kind", [cd.KD, cd.MFEF, cd.KDCL], ids=lambda kind: kind.name)
def test_training_leaves_the_teacher_alone(kind):
    method = taught(kind)
    teacher = method.taught_by.network
    before = copies(teacher)
    run = cd.train(method, tiny.data(), out="run", settings=tiny.settings(), show=False)
    assert run.summary["status"] == "finished"
    assert same(copies(teacher), before)
    assert not teacher.training and method.training
    assert all(each.grad is None and not each.requires_grad for each in teacher.parameters())
    assert all(row["train"]["kl/teacher->student1"] > 0 for row in run.metrics())


def test_no_gradient_reaches_the_teacher(batch):
    method = taught().double()
    outputs = method(batch[0])
    assert not outputs.teacher_logits.requires_grad
    # Not even one that came with a graph.
    given = outputs.teacher_logits.clone().requires_grad_()
    terms = method.losses(dataclasses.replace(outputs, teacher_logits=given), batch[1], START)
    sum(terms.values()).backward()
    assert given.grad is None


def test_the_teacher_is_in_evaluation_mode_in_every_mode(batch):
    teacher = teacher_of().train()  # as whoever handed it in had left it
    method = WithTeacher(tiny.method(cd.DML), teacher).double()
    expected = copy.deepcopy(teacher).eval()(batch[0])
    for mode in (True, False, True):
        method.train(mode)
        assert not teacher.training and method.training is mode
    torch.testing.assert_close(method(batch[0]).teacher_logits, expected.detach())


def test_the_teacher_belongs_to_nothing():
    method, plain = taught(cd.MFEF), tiny.method(cd.MFEF)
    theirs = {id(each) for each in method.taught_by.network.parameters()}
    assert theirs.isdisjoint(map(id, method.parameters()))
    assert theirs.isdisjoint(id(each) for group in method.parameter_groups() for each in group.parameters)
    assert not any(module is method.taught_by.network for module in method.modules())
    assert same(copies(method), copies(plain))
    other = tiny.method(cd.MFEF, seed=1)
    other.load_state_dict(method.state_dict())
    assert same(copies(other), copies(plain))
    method.load_state_dict(tiny.method(cd.MFEF, seed=2).state_dict())
    assert same(copies(method), copies(tiny.method(cd.MFEF, seed=2)))


@pytest.mark.parametrize("move", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_the_teacher_moves_along(move):
    method = taught()
    assert method.to(**move) is method
    for tensor in [*method.taught_by.network.parameters(), *method.taught_by.network.buffers(), *method.parameters()]:
        assert tensor.device.type == move.get("device", "cpu")
        assert not tensor.is_floating_point() or tensor.dtype == move.get("dtype", torch.float32)
    assert {each.dtype for each in method.half().taught_by.network.parameters()} == {torch.float16}


def test_a_copy_has_a_teacher_of_its_own():
    method = taught()
    other = copy.deepcopy(method).to("meta")
    assert (
        next(other.taught_by.network.parameters()).is_meta and not next(method.taught_by.network.parameters()).is_meta
    )


def test_in_evaluation_the_teacher_is_not_run(batch):
    method = taught().double().eval()

    def fail(*_: object) -> None:
        raise AssertionError("the teacher was run")

    method.taught_by.network.register_forward_pre_hook(fail)
    outputs = method(batch[0])
    assert outputs.teacher_logits is None
    assert list(method.predictions(outputs)) == ["student0", "student1", "ensemble"]
    with pytest.raises(ValueError, match="no teacher logits: they were computed in evaluation mode"):
        method.losses(outputs, batch[1], START)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].family == "offline"])
def test_losses_of_a_method_left_in_evaluation_mode_are_refused(name, batch):
    students = max(1, METHODS[name].min_students)
    settings = METHODS[name].Settings(**({"initial_share": 0.0} if name in ("fsp", "ab") else {}))
    method = METHODS[name](tiny.own_students(students), 3, settings, (8, 8))
    if method.teacher == "required":
        WithTeacher(method, teacher_of())
    with pytest.raises(ValueError, match="they were computed in evaluation mode"):
        method.eval().losses(method(batch[0].float()), batch[1], START)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(UsageError, match="the teacher has 4 classes, but the students 3"):
        WithTeacher(tiny.method(cd.KD), teacher_of(classes=4))


def test_a_step_reads_nothing_on_the_host():
    method, data = taught(cd.KDCL), tiny.data()
    images = DeviceImages(data.train, data.statistics, torch.device("cpu"))
    step = make_step(method, images, Augmentation(), tiny.settings())
    plan = epoch_indices(24, 0, 0, Augmentation(), torch.device("cpu"), method.views)
    with tiny.HostReads() as reads:
        step(plan.part(0, 8), START)
    assert reads.found == []


def test_settings_of_a_teacher():
    for changes, message in (
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0; it must be a number above 0"),
        ({"teacher_temperature": math.nan}, "teacher_temperature is nan; it must be a number above 0"),
        ({"teacher_weight": -1.0}, "teacher_weight is -1.0; it must be a number, at least 0"),
        ({"teacher_network": "resnet20"}, "teacher_network and teacher_predictor describe a teacher"),
        ({"teacher_predictor": "student0"}, "teacher_network and teacher_predictor describe a teacher"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            TeacherSettings(**changes)


# Where a teacher comes from: runs and exported files.


@pytest.fixture(scope="module")
def made(tiny_registered, tmp_path_factory) -> Path:
    """A data file, one of other classes, and a run of two students with a fused classifier; to be read only."""
    folder = tmp_path_factory.mktemp("teacher")
    data = tiny.data()
    tiny.write_npz(folder / "colours.npz", data)
    tiny.write_npz(folder / "others.npz", dataclasses.replace(data, class_names=("red", "green", "violet")))
    dimmed = cd.Split(data.train.images // 2, data.train.labels)
    tiny.write_npz(folder / "dimmed.npz", dataclasses.replace(data, train=dimmed))
    flags = ["--data-dir", str(folder / "colours.npz"), "--epochs", "2", "--out", str(folder / "run")]
    assert main(["train", "mfef", *TINY, *flags]) == 0
    return folder


def train_kd(made: Path, *flags: str, method: str = "kd", data: str = "colours.npz", out: str = "out") -> int:
    """Train for an epoch with a teacher; an option that comes a second time wins."""
    return main(["train", method, *TINY, "--data-dir", str(made / data), "--epochs", "1", "--out", out, *flags])


def loaded(made: Path, place: Path, statistics: tuple | None = None, **settings: str) -> nn.Module:
    record = cd.Run(made / "run").metadata["dataset"]
    own = (tuple(record["mean"]), tuple(record["std"]))
    return load_teacher(TeacherSettings(teacher=str(place), **settings), tiny.CLASSES, statistics or own)


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_a_run_teaches_with_its_best_student(made):
    run = cd.Run(made / "run")
    predictors = run.load_method().predictors()
    assert torch.equal(loaded(made, run.path).eval()(IMAGES), predictors[run.best_student()](IMAGES))


def test_a_run_teaches_with_the_predictor_that_is_named(made):
    predictors = cd.Run(made / "run").load_method().predictors()
    for name, predictor in predictors.items():
        teacher = loaded(made, made / "run", teacher_predictor=name).eval()
        assert torch.equal(teacher(IMAGES), predictor(IMAGES)), name
    with pytest.raises(
        UsageError, match="has no predictor 'student7': choose from student0, student1, ensemble, fused"
    ):
        loaded(made, made / "run", teacher_predictor="student7")


@pytest.mark.parametrize("predictor", ["student1", "fused"])
def test_an_exported_file_teaches_as_its_run_does(made, tmp_path, predictor):
    run = cd.Run(made / "run")
    path = export_predictor(run, predictor, tmp_path / "teacher.safetensors").path
    expected = run.load_method().predictors()[predictor](IMAGES)
    torch.testing.assert_close(loaded(made, path).eval()(IMAGES), expected)


def test_a_teacher_gets_images_in_its_own_normalisation(made):
    run = cd.Run(made / "run")
    plain = loaded(made, run.path)
    assert isinstance(plain, cd.Network)
    teacher = loaded(made, run.path, STATISTICS).eval()
    pixels = tiny.data().test.images
    expected = load_classifier(run.path).logits(pixels)
    given = DeviceImages(tiny.data().test, STATISTICS, torch.device("cpu")).normalised(torch.from_numpy(pixels))
    torch.testing.assert_close(teacher(given), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain.eval()(given), expected, atol=0.01)


def test_a_teacher_from_another_normalisation_teaches(made, capsys):
    assert train_kd(made, "--teacher", str(made / "run"), data="dimmed.npz") == 0
    teacher, run = cd.Run(made / "run"), cd.Run("out")
    assert run.metadata["dataset"]["mean"] != teacher.metadata["dataset"]["mean"]
    assert set(run.load_method().state_dict()) == set(tiny.method(cd.Independent).state_dict())


@pytest.mark.parametrize("method", ["kd", "mfef", "dml", "kdcl"])
def test_a_taught_run_is_used_without_its_teacher(made, capsys, tmp_path, method):
    elsewhere = tmp_path / "teacher"
    elsewhere.symlink_to(made / "run")
    flags = ["--teacher", str(elsewhere), "--teacher-weight", "0.5", "--teacher-temperature", "2"]
    assert train_kd(made, *flags, method=method) == 0
    elsewhere.unlink()
    run = cd.Run("out")
    (row,) = run.metrics()
    kinds = {"mfef": "kl/fused->student0", "dml": "kl/student1->student0", "kdcl": "kl/teacher->student0"}
    assert {"ce/student0", "kl/teacher->student0", "kl/teacher->student1", kinds.get(method, "loss")} <= set(
        row["train"]
    )
    teaching = run.config.teaching
    assert (teaching.teacher_weight, teaching.teacher_temperature) == (0.5, 2.0)
    scores = evaluate_run(run)
    assert {name: each.top1_error for name, each in scores.items()} == run.summary["top1_error"]
    assert main(["evaluate", "out"]) == 0
    assert main(["export", "out", "--format", "safetensors"]) == 0
    assert not [name for name in run.checkpoints.load().method if "teacher" in name or "frozen" in name]


def test_a_taught_run_can_teach(made, capsys):
    assert train_kd(made, "--teacher", str(made / "run")) == 0
    assert train_kd(made, "--teacher", "out", method="mfef", out="second") == 0
    assert cd.Run("second").summary["status"] == "finished"


def test_the_place_of_the_teacher_is_recorded_in_full(made, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    assert train_kd(made, "--teacher", "run", out=str(tmp_path / "out")) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", "out/config.json", "--out", "again"]) == 0
    first, again = cd.Run("out"), cd.Run("again")
    assert tiny.untimed(first.metrics()) == tiny.untimed(again.metrics())


def test_weight_and_temperature_from_python_are_recorded():
    method = taught(weight=0.9, temperature=4.0)
    run = cd.train(method, tiny.data(), out="run", settings=tiny.settings(epochs=1), show=False)
    assert (run.metadata["teacher"], run.metadata["teacher_weight"], run.metadata["teacher_temperature"]) == (
        None,
        0.9,
        4.0,
    )


def test_a_stronger_teacher_term_brings_the_students_closer(made, capsys):
    gaps = []
    for weight in ("0", "5"):
        flags = ["--teacher", str(made / "run"), "--teacher-weight", weight, "--epochs", "8", "--milestones", "7"]
        assert train_kd(made, *flags, "--method.ce-weight", "0", out=f"weight{weight}") == 0
        run = cd.Run(f"weight{weight}")
        images = DeviceImages(tiny.data().test, tiny.data().statistics, torch.device("cpu")).batch(0, 9)[0]
        taught_logits = loaded(made, made / "run").eval()(images)
        gaps.append((run.load_method()(images).logits[0] - taught_logits).square().mean().item())
    assert gaps[1] < gaps[0]


# How good it is.


def told(capsys, name: str) -> tuple[float, str]:
    """Return the error of a teacher that is shown once, before the first epoch, and the warnings."""
    out, warnings = capsys.readouterr()
    (line,) = re.findall(rf"^{name}: error on the test set (\d+\.\d\d) %$", out, re.MULTILINE)
    assert out.startswith(f"{name}: ") and out.count("error on the test set") == 1
    return float(line), warnings


@pytest.mark.fault(82)
def test_the_error_of_a_teacher_is_shown_and_recorded(made, capsys, tmp_path):
    good = cd.Run(made / "run")
    error = good.summary["top1_error"][good.best_student()]
    assert train_kd(made, "--teacher", str(made / "run")) == 0
    shown, _ = told(capsys, f"teacher {made}/run")
    assert shown == pytest.approx(error, abs=0.01)
    assert cd.Run("out").summary["teacher_top1_error"] == pytest.approx(error)
    # The line of runs side by side comes once.
    assert train_kd(made, "--teacher", str(made / "run"), "--seeds", "0", "1", out="two") == 0
    assert told(capsys, f"teacher {made}/run")[0] == shown
    assert [cd.Run(f"two/seed{seed}").summary["teacher_top1_error"] for seed in (0, 1)] == [pytest.approx(error)] * 2


class MeanColour(nn.Module):
    """Whose logits are the mean red, green and blue: it knows the classes."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.mark.fault(82)
def test_a_good_teacher_is_not_warned_of(capsys):
    method = WithTeacher(tiny.method(cd.KD), MeanColour())
    run = cd.train(method, tiny.data(), out="run", settings=tiny.settings(epochs=1))
    assert told(capsys, "teacher") == (0.0, "")
    assert run.summary["teacher_top1_error"] == 0


@pytest.mark.fault(82)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [("a guess", r"teaches nothing \(a guess has an error of 66\.67 %\): are these"), ("nan", "logits are NaN")],
)
def test_a_teacher_that_knows_nothing_is_warned_of(capsys, spoil, says):
    method = taught(cd.MFEF)
    with torch.no_grad():
        method.taught_by.network.head.linear.weight.zero_()
        method.taught_by.network.head.linear.bias.fill_(math.nan if spoil == "nan" else 0)
    warn_once.cache_clear()
    with contextlib.suppress(DivergedError):
        cd.train(method, tiny.data(test=90), out="run", settings=tiny.settings(epochs=1))
    error, warnings = told(capsys, "teacher")
    assert error == pytest.approx(200 / 3, abs=0.01)
    assert re.match(rf"codistill: warning: teacher {says if spoil != 'nan' else '.*' + says}", warnings), warnings
    assert warnings.count("\n") == 1
    assert cd.Run("run").summary["teacher_top1_error"] == pytest.approx(error, abs=0.01)


# Where a teacher comes from: checkpoints of other repositories.


FOREIGN = {"resnet20": "layer1.0.conv1.weight", "wrn-16-2": "block1.layer.0.bn1.bias"}
FORMS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "RepDistiller": lambda state: {
        "epoch": 240,
        "accuracy": torch.tensor(72.1),
        "model": state,
        "optimizer": {"a": [1]},
    },
    "mdistiller": lambda state: {"epoch": 240, "model": state, "best_acc": 72.1},
    "state_dict": lambda state: {"state_dict": state, "arch": "net"},
    "plain": lambda state: state,
    "RepDistiller's last": lambda state: {"opt": argparse.Namespace(model="resnet20", lr=0.1), "model": state},
    "numpy beside it": lambda state: {"best": np.float64(72.1), "epoch": np.int64(3), "net": state},
    "nested": lambda state: {"checkpoint": {"state_dict": {f"module.{name}": each for name, each in state.items()}}},
    "with momentum": lambda state: {
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "mean": torch.zeros(3),
        "weights": state,
    },
    "a student beside it": lambda state: {"student": tiny.network(10).state_dict(), "teacher": state},
    "data parallel": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "old torch": lambda state: {"model": {name: each for name, each in state.items() if "num_batches" not in name}},
}


def shaken(module: nn.Module) -> nn.Module:
    """Set statistics and weights of batch normalisation other than the initial ones."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module.eval()


@pytest.mark.fault(62)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FOREIGN)
def test_checkpoints_of_other_repositories_give_the_same_logits(tmp_path, name, form):
    theirs = shaken(foreign(name, 10))
    assert FOREIGN[name] in theirs.state_dict()
    torch.save(FORMS[form](theirs.state_dict()), tmp_path / "teacher.pth")
    same_logits(theirs, tmp_path / "teacher.pth", name)


def same_logits(theirs: nn.Module, path: Path, name: str, classes: int = 10, size: int = 32) -> None:
    teacher = read_checkpoint(path, name, classes).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert teacher.spec == name


@pytest.mark.fault(81)
@pytest.mark.parametrize("name", ["resnet8", "resnet32x4", "wrn-40-2", "wrn-16-1", "vgg8", "vgg13"])
def test_last_checkpoints_of_the_zoo_give_the_same_logits(tmp_path, name):
    options = argparse.Namespace(model=name, learning_rate=0.05, lr_decay_epochs=[150, 180, 210], tb_path="./save")
    theirs = shaken(foreign(name, 100))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    saved = {"opt": options, "model": theirs.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved | {"accuracy": torch.tensor(79.42)}, tmp_path / f"{name}_last.pth")
    same_logits(theirs, tmp_path / f"{name}_last.pth", name, 100, 64 if name == "vgg8" else 32)


@pytest.mark.fault(81)
@pytest.mark.parametrize("name", ZOO)
def test_all_of_the_zoo_has_our_shapes_in_our_order(name):
    with torch.device("meta"):
        theirs, ours = foreign(name, 100).state_dict(), cd.network(name, 100).state_dict()
    shapes = [[(key.rpartition(".")[2], each.shape) for key, each in state.items()] for state in (theirs, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.fault(81)
def test_names_of_the_zoo_lead_to_ours(tmp_path):
    for spelling, name in {"wrn_40_2": "wrn-40-2", "vgg13_bn": "vgg13", "resnet8X4": "resnet8x4"}.items():
        with pytest.raises(UsageError, match=f"unknown network '{spelling}': did you mean .*{name}"):
            cd.network(spelling, 10)


KEYS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "student", "student_state_dict")


@pytest.mark.fault(62)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_equal_names_are_matched_by_name(made, tmp_path, prefix):
    state = {f"{prefix}{name}": value for name, value in reversed(teacher_of().state_dict().items())}
    for key in KEYS:
        torch.save({"epoch": 3, key: state}, tmp_path / "teacher.pth")
        assert same(read_checkpoint(tmp_path / "teacher.pth", "tiny", 3).state_dict(), teacher_of().state_dict())
    safetensors.torch.save_file(state, tmp_path / "teacher.safetensors")
    found = read_checkpoint(tmp_path / "teacher.safetensors", "tiny", 3)
    assert same(found.state_dict(), teacher_of().state_dict())


@pytest.mark.fault(62)
def test_plain_safetensors_teach(made, capsys, tmp_path):
    safetensors.torch.save_file(teacher_of().state_dict(), tmp_path / "plain.safetensors")
    assert train_kd(made, "--teacher", "plain.safetensors") == 4
    assert "plain weights teach with --teacher-network" in capsys.readouterr().err
    assert train_kd(made, "--teacher", "plain.safetensors", "--teacher-network", "tiny") == 0
    assert cd.Run("out").metrics()[0]["train"]["kl/teacher->student0"] > 0


def test_a_file_of_an_old_torch_is_read(tmp_path):
    theirs = shaken(foreign("resnet20", 10))
    torch.save({"model": theirs.state_dict()}, tmp_path / "t.pth", _use_new_zipfile_serialization=False)
    same_logits(theirs, tmp_path / "t.pth", "resnet20")


def test_a_checkpoint_teaches(made, capsys, tmp_path):
    state = {f"foreign{index}": value for index, value in enumerate(teacher_of().state_dict().values())}
    torch.save({"model": state}, tmp_path / "ckpt_epoch_240.pth")
    assert train_kd(made, "--teacher", "ckpt_epoch_240.pth", "--teacher-network", "tiny") == 0
    assert cd.Run("out").metrics()[0]["train"]["kl/teacher->student0"] > 0


# What cannot be.


def refused(capsys, tmp_path, status: int, message: str, *arguments: str) -> None:
    """Expect one line on stderr and an exit status, and that nothing was written."""
    before = sorted(os.listdir(tmp_path))
    capsys.readouterr()
    assert main(["train", *arguments, "--out", "out"]) == status
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("codistill: error: "), error
    assert re.search(message, error), error
    assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture
def flags(made):
    return [*TINY, "--data-dir", str(made / "colours.npz"), "--epochs", "1"]


def test_kd_needs_a_teacher(flags, capsys, tmp_path):
    message = "kd needs a teacher: give --teacher a run folder, an exported file or a checkpoint"
    refused(capsys, tmp_path, 2, message, "kd", *flags)
    with pytest.raises(UsageError, match="kd needs a teacher"):
        cd.train(tiny.method(cd.KD), tiny.data(), out=tmp_path / "out", settings=tiny.settings(), show=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].teacher == "refused"])
def test_some_methods_have_no_use_for_a_teacher(made, flags, capsys, tmp_path, method):
    message = f"{method} has no use for a teacher: leave --teacher out, or choose kd"
    refused(capsys, tmp_path, 2, message, method, *flags, "--teacher", str(made / "run"))


@pytest.fixture
def unchecked():
    """Types are not checked, as in a program of somebody else's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_teacher_that_has_no_use_is_not_attached():
    for method in (tiny.method(cd.Independent), tiny.method(METHODS["rocket"])):
        with pytest.raises(UsageError, match=f"{method.name} has no use for a teacher: .* choose kd$"):
            WithTeacher(method, teacher_of())
        assert method.taught_by is None

    class Mine(cd.Method):
        """Of somebody else."""

    with pytest.raises(UsageError, match='or set teacher = "allowed" in its class'):
        WithTeacher(tiny.method(Mine), teacher_of())


def test_numbers_of_a_teacher_that_cannot_be(unchecked):
    for changes, message in (
        ({"temperature": 0.0}, "temperature is 0.0; it must be a number above 0"),
        ({"temperature": math.inf}, "temperature is inf; it must be a number above 0"),
        ({"weight": -1.0}, "weight is -1.0; it must be a number, at least 0"),
        ({"kl": "dkdd"}, "kl is dkdd; it must be one of kl, standardised, dkd, dist"),
        (
            {"kl": "dkd", "kl_weights": (1.0,)},
            "kl_weights is (1.0,); it must be two numbers, at least 0, beside kl dkd",
        ),
        ({"kl_weights": (5.0, 5.0)}, "kl_weights is (5.0, 5.0); it must be two numbers, at least 0, beside kl dkd"),
    ):
        method = tiny.method(cd.KD)
        with pytest.raises(UsageError, match=re.escape(message)):
            WithTeacher(method, teacher_of(), **changes)
        assert method.taught_by is None


def test_a_second_teacher_and_a_student_as_teacher_are_refused():
    method = tiny.method(cd.KD)
    with pytest.raises(UsageError, match="the teacher is a student of the method, which would be frozen"):
        WithTeacher(method, method.cohort[1])
    assert all(each.requires_grad for each in method.parameters())
    first = WithTeacher(method, teacher_of()).taught_by
    with pytest.raises(UsageError, match="the method has a teacher: hand in all of them at once, in a list"):
        WithTeacher(method, teacher_of())
    assert method.taught_by is first


def test_unlike_classes_are_refused(made, flags, capsys, tmp_path):
    message = (
        r"teacher \S*run knows 3 classes \(packed\S*\) that are not the 3 of the data set: give a teacher of the same"
    )
    arguments = ["kd", *flags, "--data-dir", str(made / "others.npz"), "--teacher", str(made / "run")]
    refused(capsys, tmp_path, 2, message, *arguments)


def test_a_checkpoint_without_its_network_is_refused(flags, capsys, tmp_path):
    torch.save(teacher_of().state_dict(), tmp_path / "weights.pth")
    message = "teacher weights.pth: name the network whose weights it holds with --teacher-network"
    refused(capsys, tmp_path, 2, message, "kd", *flags, "--teacher", "weights.pth")


@pytest.mark.fault(93)
@pytest.mark.parametrize("more", [[], ["--teacher-network", "tiny"]], ids=str)
def test_an_exported_file_that_cannot_teach_is_not_called_damaged(more, flags, capsys, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"whatever")
    message = "teacher model.onnx: .onnx files do not teach: name the run, or export it as .safetensors"
    refused(capsys, tmp_path, 2, message, "kd", *flags, "--teacher", "model.onnx", *more)


def test_more_of_no_teacher_is_refused(flags, capsys, tmp_path):
    message = "teacher_network and teacher_predictor describe a teacher, but --teacher names none"
    refused(capsys, tmp_path, 2, message, "kd", *flags, "--teacher-network", "tiny")


@pytest.mark.parametrize(
    "arguments", ["none", "none.safetensors", "none.pth", "none.pth --teacher-network tiny"], ids=str
)
def test_a_missing_teacher_is_refused(flags, capsys, tmp_path, arguments):
    refused(capsys, tmp_path, 4, r"none\S*: no such", "kd", *flags, "--teacher", *arguments.split())


def test_an_unknown_network_is_refused(flags, capsys, tmp_path):
    torch.save(teacher_of().state_dict(), tmp_path / "weights.pth")
    arguments = ["--teacher", "weights.pth", "--teacher-network", "resnet21"]
    refused(capsys, tmp_path, 2, "unknown network 'resnet21': did you mean .*resnet20", "kd", *flags, *arguments)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "folder", "list", "no weights"])
def test_a_damaged_checkpoint_is_refused(flags, capsys, tmp_path, damage):
    path = tmp_path / "weights.pth"
    torch.save(teacher_of().state_dict(), path)
    whole = path.read_bytes()
    if damage in ("list", "no weights"):
        torch.save([1, 2] if damage == "list" else {"model": {"epoch": 3}}, path)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "noise": b"\x80\x02noise" * 40, "empty": b""}[damage])
    message = "teacher weights.pth: (cannot be read: |is a folder: |holds no weights by name|has 0 tensors, but tiny)"
    arguments = ["--teacher", "weights.pth", "--teacher-network", "tiny"]
    refused(capsys, tmp_path, 4, message, "kd", *flags, *arguments)


@pytest.mark.parametrize("name", ["run", "teacher.safetensors"])
def test_a_damaged_run_or_file_is_refused(made, flags, capsys, tmp_path, name):
    if name == "run":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{")
    else:
        export_predictor(cd.Run(made / "run"), "student0", tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-100])
    refused(capsys, tmp_path, 4, f"{name}.*damaged", "kd", *flags, "--teacher", name)


def test_a_run_that_did_not_finish_has_no_best_student(made, flags, capsys, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("config.json", "checkpoints", "metrics.jsonl"):
        (copied / name).symlink_to(made / "run" / name)
    summary = {**json.loads((made / "run" / "summary.json").read_text()), "status": "interrupted"}
    del summary["top1_error"]
    (copied / "summary.json").write_text(json.dumps(summary))
    refused(capsys, tmp_path, 2, "copied .*interrupted.*name a predictor", "kd", *flags, "--teacher", "copied")
    # Its last checkpoint is good enough for whoever names a predictor.
    assert train_kd(made, "--teacher", "copied", "--teacher-predictor", "student0") == 0


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.fault(64)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_malicious_checkpoint_runs_nothing(flags, capsys, tmp_path, zipped):
    sentinel = tmp_path / "sentinel"
    content = {"model": {**teacher_of().state_dict(), "x": Evil(sentinel)}}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    arguments = ["--teacher", "evil.pth", "--teacher-network", "tiny"]
    refused(capsys, tmp_path, 4, "teacher evil.pth: cannot be read: ", "kd", *flags, *arguments)
    assert not sentinel.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # and it would have
    assert sentinel.exists()


@pytest.mark.fault(64)
def test_the_content_of_a_file_counts_and_no_file_of_weights_is_said_to_be_none(made, tmp_path):
    state = teacher_of().state_dict()
    safetensors.torch.save_file(state, tmp_path / "T.SAFETENSORS")
    assert torch.equal(
        read_checkpoint(tmp_path / "T.SAFETENSORS", "tiny", 3).state_dict()[next(iter(state))],
        next(iter(state.values())),
    )
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    with pytest.raises(
        CheckpointError, match=r"pointer\.pth: cannot be read: it is damaged, or no file of weights .*tensors$"
    ):
        read_checkpoint(tmp_path / "pointer.pth", "tiny", 3)


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (None, "the teacher is a NoneType: hand in a torch.nn.Module"),
        ("teacher.pth", "is a str: hand in"),
        (lambda images: images, "is a function: hand in"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "lazy layers without weights: call it once"),
    ],
)
def test_what_is_no_module_with_weights_does_not_teach(teacher, message):
    with pytest.raises(UsageError, match=message):
        inspect.unwrap(WithTeacher)(tiny.method(cd.DML), teacher)  # without the tests' checks of types


@pytest.mark.fault(64)
def test_a_checkpoint_that_does_not_fit_names_its_keys(made, tmp_path):
    def says(content: object, message: str) -> None:
        torch.save(content, tmp_path / "t.pth")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / "t.pth", "tiny", 3)

    state = teacher_of().state_dict()
    says({"epoch": 3, "best": 0.5}, "holds no weights by name; its keys are epoch, best$")
    says({"epoch": 3, "net": teacher_of(classes=4).state_dict()}, r"is \[4, 8\], but tiny .*; its keys are epoch, net$")
    says({"model": nn.Linear(2, 2)}, r"cannot be read: it holds a torch\S*Linear, .*save the network's state_dict\(\)")
    rounded = {name: each.to(torch.int8) if each.ndim else each for name, each in state.items()}
    says(rounded, "is int8: such weights are rounded: save them as float32")
    # Two tensors of one shape in another order would be another network without a word.
    swap = {"weight": "bias", "bias": "weight"}
    pairs = [(name.rpartition(".")[2], each) for name, each in state.items()]
    turned = {f"a{index}.{swap.get(end, end)}": each for index, (end, each) in enumerate(pairs)}
    says({"net": turned}, "a0.bias is where tiny with 3 classes has stages.0.0.weight: not in the order of its layers")
    safetensors.torch.save_file(
        {f"b{index}": each for index, each in enumerate(state.values())}, tmp_path / "t.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"b0 is not a name in tiny .*has no order"):
        read_checkpoint(tmp_path / "t.safetensors", "tiny", 3)


def test_weights_of_another_shape_name_the_first_tensor(flags, capsys, tmp_path):
    torch.save({"model": tiny.network(3, width=9).state_dict()}, tmp_path / "wide.pth")
    message = (
        r"teacher wide\.pth: stages\.2\.0\.weight is \[9, 6, 3, 3\], but tiny with 3 classes has \[8, 6, 3, 3\] there: "
        "name its network with --teacher-network"
    )
    refused(capsys, tmp_path, 4, message, "kd", *flags, "--teacher", "wide.pth", "--teacher-network", "tiny")


def test_weights_for_other_classes_are_refused(tmp_path):
    torch.save(foreign("resnet20", 100).state_dict(), tmp_path / "hundred.pth")
    message = r"fc\.weight is \[100, 64\], but resnet20 with 10 classes has \[10, 64\] there"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "hundred.pth", "resnet20", 10)


@pytest.mark.parametrize(("change", "count"), [("more", 18), ("fewer", 16)])
def test_another_number_of_tensors_is_refused(flags, capsys, tmp_path, change, count):
    state = tiny.network(3).state_dict()
    if change == "more":
        state["another.weight"] = torch.zeros(3)
    else:
        del state["head.linear.bias"]
    torch.save({"model": state}, tmp_path / "weights.pth")
    message = f"teacher weights.pth: has {count} tensors, but tiny 17: not that network"
    refused(capsys, tmp_path, 4, message, "kd", *flags, "--teacher", "weights.pth", "--teacher-network", "tiny")
