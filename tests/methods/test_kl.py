"""The forms of the distillation terms: numbers by hand, whole steps, and where each of them may be chosen."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.data.mixing import soft_labels
from codistill.methods import METHODS
from codistill.methods.kdcl import KDCLSettings
from codistill.methods.losses import correlation_loss, decoupled_kl, distillation, soft_target_kl, standardised
from codistill.methods.terms import DistillationSettings, KLSettings
from codistill.settings.config import TeacherSettings
from codistill.training.prepare import build_taught

from .. import tiny
from . import slow

FORMS = ["kl", "standardised", "dkd", "dist"]
STUDENT = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 0.0, -2.0]], dtype=torch.float64)
# Logarithms of the probabilities (1/2, 1/4, 1/4) and (1/4, 1/4, 1/2).
LOG_HALF, LOG_QUARTER = math.log(1 / 2), math.log(1 / 4)
HALVES = torch.tensor([[LOG_HALF, LOG_QUARTER, LOG_QUARTER]], dtype=torch.float64)
OTHERS = torch.tensor([[LOG_QUARTER, LOG_QUARTER, LOG_HALF]], dtype=torch.float64)
LABEL = torch.tensor([0])
WITH_KL = [name for name in METHODS if issubclass(METHODS[name].Settings, KLSettings)]


def test_standardised_logits_by_hand():
    # Mean 1/2 and unbiased deviation 3/2; mean 1/3 and the root of (64 + 1 + 49) / 18.
    torch.testing.assert_close(standardised(STUDENT)[0], torch.tensor([1.0, 0.0, -1.0]).double(), rtol=1e-6, atol=1e-9)
    expected = torch.tensor([1.05962584, -0.13245323, -0.92717261]).double()
    torch.testing.assert_close(standardised(TEACHER)[0], expected, rtol=1e-6, atol=1e-9)
    value = distillation(STUDENT, TEACHER, LABEL, 2.0, form="standardised")
    assert value.item() == pytest.approx(0.00398017, abs=6e-9)


def test_standardised_terms_do_not_see_scale_and_shift():
    one = distillation(STUDENT, TEACHER, LABEL, 2.0, form="standardised")
    other = distillation(5 * STUDENT - 1, 0.1 * TEACHER + 3, LABEL, 2.0, form="standardised")
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_dkd_by_hand():
    # Of the label 1/4 and 1/2; of the others among themselves (1/3, 2/3) and (1/2, 1/2).
    label = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    others = math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3
    assert decoupled_kl(HALVES, OTHERS, LABEL, 1.0, (1.0, 0.0)).item() == pytest.approx(label, rel=1e-12)
    assert decoupled_kl(HALVES, OTHERS, LABEL, 1.0, (0.0, 1.0)).item() == pytest.approx(others, rel=1e-12)
    assert distillation(HALVES, OTHERS, LABEL, 1.0, form="dkd").item() == pytest.approx(0.58387614, abs=6e-9)
    assert distillation(3 * HALVES, 3 * OTHERS, LABEL, 3.0, form="dkd").item() == pytest.approx(9 * 0.58387614)


def test_dkd_with_the_teachers_own_weight_of_the_others_is_kl():
    logits, targets = torch.randn(2, 1, 5, dtype=torch.float64)
    of_label = torch.softmax(targets / 2, 1)[0, 3].item()
    value = decoupled_kl(logits, targets, torch.tensor([3]), 2.0, (1.0, 1.0 - of_label))
    torch.testing.assert_close(value, soft_target_kl(logits, targets, 2.0))


def test_dkd_takes_the_largest_share_as_the_label():
    shares = torch.tensor([[0.3, 0.6, 0.1]], dtype=torch.float64)
    values = [decoupled_kl(HALVES, OTHERS, each, 1.0) for each in (shares, torch.tensor([1]), torch.tensor([0]))]
    assert values[0] == values[1] != values[2]
    equal = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    assert decoupled_kl(HALVES, OTHERS, equal, 1.0) == values[2]


def test_dkd_stays_finite_with_sure_predictions():
    logits = torch.tensor([[500.0, 0.0, 0.0]], requires_grad=True)
    value = decoupled_kl(logits, -logits.detach(), LABEL, 1.0)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_dist_by_hand():
    # Rows: r = -1/2 and 1. Columns: one side is constant, r = 1, one side is constant.
    second = torch.tensor([[LOG_QUARTER, LOG_HALF, LOG_QUARTER]], dtype=torch.float64)
    logits, targets = torch.cat([HALVES, second]), torch.cat([OTHERS, second])
    assert correlation_loss(logits, targets, 1.0, (1.0, 0.0)).item() == pytest.approx(3 / 4, abs=1e-6)
    assert correlation_loss(logits, targets, 1.0, (0.0, 1.0)).item() == pytest.approx(2 / 3, abs=1e-6)
    assert distillation(logits, targets, torch.tensor([0, 1]), 1.0, form="dist").item() == pytest.approx(
        17 / 12, abs=1e-6
    )
    weighted = distillation(2 * logits, 2 * targets, torch.tensor([0, 1]), 2.0, form="dist", weights=(2.0, 3.0))
    assert weighted.item() == pytest.approx(4 * 3.5, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_equal_predictions_cost_nothing(form):
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    assert distillation(logits, logits + 3.0, labels, 2.0, form=form).abs() < 1e-5
    assert distillation(logits, logits.flip(1), labels, 2.0, form=form) > 0.01


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("equal", ["student", "teacher", "both"])
def test_gradients_are_finite_where_all_logits_are_equal(form, equal):
    logits, targets = torch.randn(2, 6, 4)
    logits = torch.full_like(logits, 0.5) if equal != "teacher" else logits
    targets = torch.full_like(targets, 0.5) if equal != "student" else targets
    logits.requires_grad_()
    value = distillation(logits, targets, torch.tensor([0, 1, 2, 3, 0, 1]), 3.0, form=form)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_several_heads_are_the_losses_of_each(form):
    logits, targets = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = [distillation(*pair, labels, 3.0, form=form) for pair in zip(logits, targets, strict=True)]
    torch.testing.assert_close(distillation(logits, targets, labels, 3.0, form=form), torch.stack(expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("detach", [True, False])
def test_gradients(form, detach):
    logits, targets = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True).unbind()
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.autograd.gradcheck(
        lambda *both: distillation(both[0], both[1].detach() if detach else both[1], labels, 3.0, form, detach=detach),
        (logits.detach().requires_grad_(), targets.detach().requires_grad_(not detach)),
    )
    target = targets.detach().requires_grad_()
    distillation(logits.detach().requires_grad_(), target, labels, 3.0, form, detach=detach).backward()
    assert (target.grad is None) == detach


def standardised_by_hand(logits: Tensor) -> Tensor:
    rows = []
    for row in logits:
        mean = sum(row) / len(row)
        deviation = (sum((each - mean) ** 2 for each in row) / (len(row) - 1)).sqrt()
        rows.append((row - mean) / (1e-7 + deviation))
    return torch.stack(rows)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    one, other = first - sum(first) / len(first), second - sum(second) / len(second)
    return sum(one * other) / (sum(one**2).sqrt() * sum(other**2).sqrt() + 1e-8)


def distance_by_hand(form: str, target: Tensor, own: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """A distillation loss without T^2, in loops over images and classes."""
    if form == "standardised":
        target, own = standardised_by_hand(target), standardised_by_hand(own)
    p, q = slow.probabilities(target, temperature), slow.probabilities(own, temperature)
    if form == "dist":
        rows = sum(correlation(p[image], q[image]) for image in range(len(p))) / len(p)
        columns = sum(correlation(p[:, label], q[:, label]) for label in range(p.shape[1])) / p.shape[1]
        return (1 - rows) + (1 - columns)
    if form != "dkd":
        return slow.kl(p, own, temperature)
    total = own.sum() * 0
    for image, label in enumerate(labels):
        a, b = p[image, label], q[image, label]
        total = total + a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()
        for other in range(p.shape[1]):
            if other != label:
                c, d = p[image, other] / (1 - a), q[image, other] / (1 - b)
                total = total + 8 * c * (c / d).log()
    return total / len(labels)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_step_against_a_slow_derivation(tiny_network, batch, form):
    settings = cd.METHODS["dml"].Settings(kl=form, temperature=2.0)
    method = cd.DML([tiny_network(8, 2), tiny_network(10, 1)], 3, settings, (8, 8)).double()
    slow.disturb_norms(method)
    images, labels = batch
    _, logits = slow.run_students(method, images, (2, 1))
    loss = sum(slow.ce(each, labels) for each in logits)
    for own, peer in (logits, logits[::-1]):
        loss = loss + 4 * distance_by_hand(form, peer.detach(), own, labels, 2.0)
    slow.assert_step_agrees(method, batch, 10, loss)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_step_with_a_teacher_against_a_slow_derivation(tiny_network, batch, form):
    method = cd.WithTeacher(cd.KD([tiny_network()], 3, image_size=(8, 8)), tiny_network(), 0.5, 4.0, form).double()
    slow.disturb_norms(method)
    images, labels = batch
    _, (logits,) = slow.run_students(method, images, (2,))
    target = method.taught_by.network(images).detach()
    loss = slow.ce(logits, labels) + 8 * distance_by_hand(form, target, logits, labels, 4.0)
    slow.assert_step_agrees(method, batch, 10, loss)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("name", WITH_KL)
def test_every_method_takes_every_form(tiny_network, batch, name, form):
    kind = METHODS[name]
    students = [tiny_network() for _ in range(max(2, kind.min_students))]

    def terms(labels: Tensor, **settings) -> dict[str, Tensor]:
        torch.manual_seed(1)  # of the method's own modules, and of what it draws
        settings |= {"kl_weight": 1.0} if hasattr(kind.Settings, "kl_weight") else {}
        method = kind([each.float() for each in students], 3, kind.Settings(**settings), (8, 8)).double()
        images = batch[0].expand(method.views, *batch[0].shape) if method.views > 1 else batch[0]
        return method.losses(method(images), labels, 0.3)

    plain, chosen = terms(batch[1]), terms(batch[1], kl=form)
    assert plain.keys() == chosen.keys()
    changed = {term for term in plain if not torch.equal(plain[term], chosen[term])}
    assert changed == {term for term in plain if term.startswith("kl/")} != set()
    torch.stack(list(chosen.values())).sum().backward()
    mixed = terms(torch.lerp(soft_labels(batch[1], 3), soft_labels(batch[1].flip(0), 3), 0.3).double(), kl=form)
    assert all(term.isfinite() for term in mixed.values())


def test_two_standardised_logits_teach_nothing_and_are_refused(tiny_network):
    logits, target = torch.tensor([[2.0, 0.5]], requires_grad=True), torch.tensor([[3.0, -1.0]])
    (gradient,) = torch.autograd.grad(distillation(logits, target, LABEL, 2.0, form="standardised"), logits)
    assert gradient.abs().max() < 1e-6
    for classes in (2, 3):
        students = [tiny_network(classes=classes) for _ in range(3)]
        dml = cd.DML(students[:2], classes, cd.DML.Settings(kl="standardised"), (8, 8))
        kd = cd.WithTeacher(cd.KD(students[:1], classes, image_size=(8, 8)), students[2], kl="standardised")
        for method, name in ((dml, r"method\.kl"), (kd, "teacher_kl")):
            if classes > 2:
                method.refuse_useless()
                continue
            with pytest.raises(UsageError, match=f"{name} is standardised, which teaches nothing with two classes"):
                method.refuse_useless()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (1.0, math.inf), (1.0, 2.0, 3.0)])
def test_weights_that_cannot_be(weights):
    with pytest.raises(UsageError, match=r"method.kl_weights is .*two numbers, at least 0, beside kl dkd or dist"):
        DistillationSettings(kl="dkd", kl_weights=weights)
    with pytest.raises(UsageError, match=r"teacher_kl_weights is .*two numbers, at least 0, beside teacher_kl dkd or"):
        TeacherSettings(teacher_kl="dkd", teacher_kl_weights=weights)


def test_settings_that_do_not_go_together():
    with pytest.raises(UsageError, match=r"method.kl_weights is"):
        DistillationSettings(kl_weights=(1.0, 2.0))
    with pytest.raises(UsageError, match=r"method.target_epsilon is 1e-07; it must be 0 with kl dist"):
        DistillationSettings(kl="dist", target_epsilon=1e-7)
    assert DistillationSettings(kl="standardised", target_epsilon=1e-7).needs_full_batch == ""
    assert DistillationSettings(kl="dist").needs_full_batch == KDCLSettings(kl="dist", variant="naive").needs_full_batch
    with pytest.raises(UsageError, match=r"teacher_kl is 'dks'.*dkd"):
        TeacherSettings(teacher_kl="dks")


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_registered", "no_pages")
def test_the_command_line(tmp_path, capsys):
    data = tiny.write_npz(tmp_path / "colours.npz", tiny.data(train=20, test=6))
    common = ["--networks", "tiny", "tiny", "--data", "packed", "--data-dir", str(data), "-b", "10", "--epochs", "1"]
    common += ["--threads", "1"]
    chosen = ["--method.kl", "dkd", "--method.kl-weights", "2", "3"]
    assert main(["train", "dml", *common, *chosen, "--out", str(tmp_path / "dkd")]) == 0
    run = cd.Run(tmp_path / "dkd")
    assert (run.config.method.kl, run.config.method.kl_weights) == ("dkd", (2.0, 3.0))
    taught = ["--teacher", str(tmp_path / "dkd"), "--teacher-kl", "dist", "--teacher-kl-weights", "2", "2"]
    assert main(["train", "kd", *common, *taught, "--out", str(tmp_path / "dist")]) == 0
    teaching = cd.Run(tmp_path / "dist").config.teaching
    assert (teaching.teacher_kl, teaching.teacher_kl_weights) == ("dist", (2.0, 2.0))
    method = cd.Run(tmp_path / "dist").load_method()
    assert method.taught_by is None
    how = {"teacher_weight": 0.5, "teacher_temperature": 2.0, "teacher_kl": "dist", "teacher_kl_weights": (3.0, 4.0)}
    config = dataclasses.replace(run.config, teaching=TeacherSettings(teacher=str(tmp_path / "dkd"), **how))
    teacher = build_taught(config, run.load_data()).taught_by
    assert {f"teacher_{name}": getattr(teacher, name) for name in ("weight", "temperature", "kl", "kl_weights")} == how
    assert main(["train", "dml", *common, "--method.kl-weights", "2", "3", "--out", str(tmp_path / "no")]) == 2
    assert "method.kl_weights is (2.0, 3.0); it must be two numbers" in capsys.readouterr().err
