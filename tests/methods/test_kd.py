"""KD: the weights of the labels and of the teacher, worked by hand."""

import pytest
import torch

from codistill.methods.cohort import Outputs
from codistill.methods.kd import KD, KDSettings, WithTeacher
from codistill.settings.config import TeacherSettings

from . import slow

START = torch.tensor(0.0)
# Three classes, the label is 0.
STUDENT, OTHER, TEACHER = [2.0, 0.5, -1.0], [1.0, 1.5, 0.0], [3.0, 0.0, -2.0]
LABEL = torch.tensor([0])
# -log softmax(STUDENT)[0] and -log softmax(OTHER)[0], in nats.
CE, OTHER_CE = 0.2413113, 1.10413061


@pytest.fixture
def make(tiny_network):
    def build(students: int = 1, weight: float = 1.0, temperature: float = 3.0, **settings) -> KD:
        method = KD([tiny_network() for _ in range(students)], 3, KDSettings(**settings), (8, 8))
        return WithTeacher(method, tiny_network(), weight, temperature)

    return build


def terms_at(method: KD, *logits: list[float]) -> dict[str, float]:
    students = tuple(torch.tensor([each], dtype=torch.float64) for each in logits)
    outputs = Outputs(students, (), teacher_logits=torch.tensor([TEACHER], dtype=torch.float64))
    return {name: term.item() for name, term in method.losses(outputs, LABEL, START).items()}


def test_the_default_weights_are_one_and_one_at_temperature_three(make):
    terms = terms_at(make(), STUDENT)
    expected = {"ce/student0": CE, "kl/teacher->student0": 9 * slow.divergence(TEACHER, STUDENT, 3.0)}
    assert terms == pytest.approx(expected, abs=6e-9)
    chosen = TeacherSettings()
    assert (chosen.teacher_weight, chosen.teacher_temperature, KDSettings().ce_weight) == (1.0, 3.0, 1.0)


def test_the_weights_of_repdistiller(make):
    # (1 - a) CE + a T^2 KL with a = 0.9 and T = 4.
    terms = terms_at(make(weight=0.9, temperature=4.0, ce_weight=0.1), STUDENT)
    expected = {"ce/student0": 0.1 * CE, "kl/teacher->student0": 0.9 * 16 * slow.divergence(TEACHER, STUDENT, 4.0)}
    assert terms == pytest.approx(expected, abs=6e-9)


def test_each_student_learns_alone(make):
    terms = terms_at(make(students=2, ce_weight=0.5), STUDENT, OTHER)
    assert terms == pytest.approx(
        {
            "ce/student0": 0.5 * CE,
            "ce/student1": 0.5 * OTHER_CE,
            "kl/teacher->student0": 9 * slow.divergence(TEACHER, STUDENT, 3.0),
            "kl/teacher->student1": 9 * slow.divergence(TEACHER, OTHER, 3.0),
        },
        abs=6e-9,
    )
    method = make(students=2)
    assert method.cohort.shared_stages == 0
    method.losses(method(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0]), START)["kl/teacher->student0"].backward()
    assert all(each.grad is not None and each.grad.any() for each in method.cohort[0].head.parameters())
    assert all(each.grad is None or not each.grad.any() for each in method.cohort[1].parameters())


def test_no_weight_on_the_labels_leaves_the_teacher(make):
    terms = terms_at(make(ce_weight=0.0), STUDENT)
    assert terms["ce/student0"] == 0 < terms["kl/teacher->student0"]


def test_the_gradient_by_hand(make):
    # d/dz of a CE + b T^2 KL is a (softmax(z) - label) + b T (softmax(z / T) - softmax(t / T)).
    method = make(weight=0.9, temperature=4.0, ce_weight=0.1)
    logits = torch.tensor([STUDENT], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([TEACHER], dtype=torch.float64)
    sum(method.losses(Outputs((logits,), (), teacher_logits=teacher), LABEL, START).values()).backward()
    hard = logits.detach().softmax(1) - torch.tensor([[1.0, 0.0, 0.0]])
    soft = (logits.detach() / 4).softmax(1) - (teacher / 4).softmax(1)
    torch.testing.assert_close(logits.grad, 0.1 * hard + 0.9 * 4 * soft)


def test_one_student_is_enough(make):
    assert list(make(students=1).predictors()) == ["student0"]
    assert list(make(students=2).predictors()) == ["student0", "student1", "ensemble"]
