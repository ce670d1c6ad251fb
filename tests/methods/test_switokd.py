"""SwitOKD: the switch by numbers, both modes of a step, and a teacher that keeps still."""

import copy
import math
from itertools import pairwise

import pytest
import torch

import codistill as cd
from codistill.methods.cohort import Outputs
from codistill.methods.switokd import SwitOKD, SwitOKDSettings, gap
from codistill.training.optim import make_optimizer

from .. import tiny
from . import slow

NOW = torch.tensor(0.5)
TERMS = ["ce/student0", "ce/student1", "kl/student1->student0", "kl/student0->student1"]
# Probabilities (0.2, 0.8, 0) and (0.3, 0, 0.7): of class 0 the teacher knows more, of class 1 the student.
APART = torch.tensor([[math.log(0.2), math.log(0.8), -1e4], [math.log(0.3), -1e4, math.log(0.7)]])


@pytest.fixture
def make(tiny_network):
    def build(*shapes, **settings) -> SwitOKD:
        students = [tiny_network(*shape) for shape in shapes or [(8, 2), (10, 1)]]
        method = SwitOKD(students, 3, SwitOKDSettings(**settings), (8, 8))
        slow.disturb_norms(method)
        return method

    return build


def tell_apart(method: SwitOKD) -> None:
    """Have the students predict about `APART`, whatever they see."""
    for student, logits in zip(method.cohort, APART, strict=True):
        torch.nn.init.normal_(student.head.linear.weight, std=1e-3)
        student.head.linear.bias.data.copy_(logits.clamp(min=-12))


@pytest.mark.parametrize(
    ("student", "teacher", "expected", "expert"),
    [
        ([2, 0.5, -1], [3, 0, -2], [0.42880593, 0.10700175, 0.32180418, 0.81897494, 0.34117417], False),
        ([2, 0.5, -1], [1, 1.5, 0], [0.42880593, 1.33700215, 0.90819615, 0.46899572, -0.19824232], False),
        (APART[0].tolist(), APART[1].tolist(), [1.6, 1.4, 1.6, 0.62708909, 0.72207528], True),
    ],
    ids=["near", "the student is ahead", "far"],
)
def test_the_switch_by_hand(student, teacher, expected, expert):
    logits = (torch.tensor([each], dtype=torch.float64) for each in (student, teacher))
    found = gap(*logits, torch.tensor([0]), 1.0)
    assert [each.item() for each in found] == pytest.approx(expected, abs=1e-7)
    assert found.expert.item() is expert


def test_the_switch_looks_at_means_over_the_batch_and_at_shares():
    student, teacher = (torch.stack([APART[0], APART[1]]), torch.stack([APART[1], APART[0]]))
    found = gap(student.double(), teacher.double(), torch.tensor([0, 1]), 1.0)
    # Distances to the labels 1.6 and 2, 1.4 and 0.4; between them 1.6 twice.
    assert [found.student.item(), found.teacher.item(), found.between.item()] == pytest.approx([1.8, 0.9, 1.6])
    assert found.threshold.item() == pytest.approx(1.8 - 0.9 * math.exp(-1 / 3)) and found.expert
    mixed = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    found = gap(student.double(), teacher.double(), mixed, 1.0)
    assert [found.student.item(), found.teacher.item()] == pytest.approx([(1.6 + 2) / 2, (0.4 + 0.4) / 2])


def test_temperature_softens_the_gap_and_not_the_distances_to_the_labels():
    logits = torch.tensor([[2.0, 0.0, 0.0]]).double(), torch.tensor([[0.0, 0.0, 4.0]]).double()
    one, two = (gap(*logits, torch.tensor([0]), temperature) for temperature in (1.0, 2.0))
    assert (one.student, one.teacher, one.ratio) == (two.student, two.teacher, two.ratio)
    p, q = ([math.exp(each / 2) for each in row[0]] for row in logits)
    expected = sum(abs(a / sum(p) - b / sum(q)) for a, b in zip(p, q, strict=True))
    assert two.between.item() == pytest.approx(expected, rel=1e-12) and one.between > two.between


def test_where_both_err_in_the_same_classes_the_teacher_never_waits():
    # Then G = s - t, which is below s - epsilon t.
    wrong = torch.rand(50, dtype=torch.float64).sort(descending=True).values
    for more, less in pairwise(wrong):
        rows = (torch.stack([1 - each, each / 2, each / 2]).log()[None] for each in (0.9 * more, 0.9 * less))
        found = gap(*rows, torch.tensor([0]), 1.0)
        assert found.teacher < found.student and not found.expert


@pytest.mark.parametrize(("label", "learns"), [(0, 0), (1, 1)], ids=["expert", "learning"])
def test_terms_by_hand(make, label, learns):
    method, logits = make(), APART.clamp(min=-12).double()
    terms = method.losses(Outputs(tuple(each[None] for each in logits), ()), torch.tensor([label]), NOW)
    assert list(terms) == TERMS
    assert method.pause.item() == 1 - learns
    student, teacher = logits.softmax(dim=1).tolist()
    assert terms["ce/student0"].item() == pytest.approx(-math.log(student[label]))
    assert terms["ce/student1"].item() == pytest.approx(-learns * math.log(teacher[label]))
    own, other = logits.tolist()
    assert terms["kl/student1->student0"].item() == pytest.approx(slow.divergence(other, own))
    assert terms["kl/student0->student1"].item() == pytest.approx(learns * slow.divergence(own, other))


@pytest.mark.parametrize("expert", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_whole_step_against_a_slow_derivation(make, batch, expert, temperature):
    method = make(temperature=temperature).double()
    images, labels = batch
    if expert:
        tell_apart(method)
        labels = torch.zeros_like(labels)
    _, (student, teacher) = slow.run_students(method, images, (2, 1))
    assert gap(student, teacher, labels, temperature).expert.item() == expert

    def distilled(own: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        target = slow.probabilities(source.detach(), temperature)
        return temperature**2 * slow.kl(target, own, temperature)

    loss = slow.ce(student, labels) + distilled(student, teacher)
    loss = loss + (0 if expert else 1) * (slow.ce(teacher, labels) + distilled(teacher, student))
    slow.assert_step_agrees(method, (images, labels), 10, loss)


def test_what_the_terms_move(make, batch):
    method = make().double()
    assert slow.reached(method, batch, "kl/student1->student0") == slow.branches(0)
    assert slow.reached(method, batch, "kl/student0->student1") == slow.branches(1)
    tell_apart(method)
    expert = batch[0], torch.zeros_like(batch[1])
    assert slow.reached(method, expert, "ce/student0") == slow.branches(0)
    assert slow.reached(method, expert, "ce/student1") == slow.reached(method, expert, TERMS[3]) == set()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_teacher_that_waits_takes_no_step(make, batch, optimizer, shared):
    # The first updates build up momentum; a reference skips the teacher's own optimiser, as the authors' code does.
    settings = tiny.settings(optimizer=optimizer, weight_decay=0.1, learning_rate=1e-3, decay_norms=True)
    method = make((8, 2), (8, 2), shared_stages=shared)
    tell_apart(method)
    twin, own = copy.deepcopy(method), make_optimizer(method, settings)
    kinds = {
        "sgd": lambda group: torch.optim.SGD(group, 1e-3, 0.9, weight_decay=0.1, nesterov=True, foreach=False),
        "adamw": lambda group: torch.optim.AdamW(group, 1e-3, (0.9, 0.999), weight_decay=0.1, foreach=False),
    }
    reference = [kinds[optimizer](list(group.parameters)) for group in twin.parameter_groups()]
    waited = []
    for label in (1, 1, 0, 0, 1, 0):
        labels = torch.full_like(batch[1], label)
        before = [each.clone() for each in method.parameter_groups()[1].parameters]
        for each in (method, twin):
            each.zero_grad()
            torch.stack(list(each.losses(each(batch[0].float()), labels, NOW).values())).sum().backward()
        own.step()
        waited.append(bool(twin.pause))
        for each in reference[: 1 if waited[-1] else 2]:
            each.step()
        after = method.parameter_groups()[1].parameters
        assert all(torch.equal(*pair) == waited[-1] for pair in zip(before, after, strict=True))
        torch.testing.assert_close(list(method.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-7)
    assert waited == [False, False, True, True, False, True]


def test_the_pause_is_in_no_checkpoint(make):
    assert not any("pause" in name for name in make().state_dict())


def test_it_needs_the_full_batch():
    assert SwitOKDSettings().needs_full_batch
    assert cd.METHODS["switokd"] is SwitOKD
