"""TAKD: the loss of a link, with the paper's weights."""

import pytest
import torch

import codistill as cd
from codistill.methods.cohort import Outputs
from codistill.methods.takd import TAKD

from .. import tiny
from . import slow

METHOD = TAKD
NOW = torch.tensor(0.5)
STUDENT, TEACHER = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])


@pytest.mark.parametrize(("share", "loss"), [(0.5, 0.29447240), (0.9, 0.33700129)])
def test_the_papers_loss_by_hand(share, loss):
    method = tiny.method(TAKD, students=1, ce_weight=1 - share)
    method = cd.WithTeacher(method, tiny.own_students(1)[0], weight=share, temperature=3.0)
    terms = method.losses(Outputs((STUDENT.double(),), (), teacher_logits=TEACHER.double()), torch.tensor([0]), NOW)
    assert list(terms) == ["ce/student0", "kl/teacher->student0"]
    assert sum(terms.values()).item() == pytest.approx(loss, abs=1e-8)


def test_a_step_against_a_slow_derivation(tiny_network, batch):
    teacher = tiny_network(10, 1)
    method = cd.WithTeacher(TAKD([tiny_network()], 3, image_size=(8, 8)), teacher).double()
    slow.disturb_norms(method)
    _, (logits,) = slow.run_students(method, batch[0], (2,))
    target = slow.probabilities(teacher(batch[0]).detach(), 3)
    slow.assert_step_agrees(method, batch, 10, slow.ce(logits, batch[1]) + 9 * slow.kl(target, logits, 3))
