"""FitNets: the hint, regressors by size, the paper's two stages, a whole step against a slow derivation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import codistill as cd
from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.fitnets import FitNets
from codistill.methods.offline import regressor

from . import slow

METHOD = FitNets
HINT, SOFT = "hint/teacher->student0", "soft/teacher->student0"
# One label, 0, of three classes.
STUDENT, TEACHER = [2.0, 0.5, -1.0], [3.0, 0.0, -2.0]


def terms_at(method, progress: float) -> dict[str, float]:
    own = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    other, targets = torch.zeros(1, 1, 2, 2), torch.tensor([TEACHER])
    outputs = Outputs(
        (torch.tensor([STUDENT]),), (own,), None, targets, ((other, other, own),), (other, other, torch.zeros_like(own))
    )
    terms = method.losses(outputs, torch.tensor([0]), torch.tensor(progress))
    return {name: each.item() for name, each in terms.items()}


def test_one_stage_by_hand(taught):
    # (1 + 4 + 9 + 16) / 4 = 7.5, times 100.
    assert terms_at(taught((8, 2)), 0.5) == pytest.approx({"ce/student0": 0.2413113, HINT: 750})


@pytest.mark.parametrize(("progress", "weight"), [(0.25, 4.0), (0.625, 2.5), (1.0, 1.0), (0.2, 4.0)])
def test_the_second_stage_by_hand(taught, progress, weight):
    # Cross-entropy with both sides at T = 3, without T^2.
    terms = terms_at(taught((8, 2), initial_share=0.25), progress)
    assert terms == pytest.approx({"ce/student0": 0.2413113, SOFT: weight * 0.919752}, rel=1e-6)


def test_the_first_stage_has_the_hint_alone(taught, batch):
    method = taught((8, 2), initial_share=0.25)
    method.initialising = True
    assert list(method.losses(method(batch[0]), batch[1], 0.0)) == [HINT]
    assert method.initial_epochs(100) == 25


def test_the_first_stage_trains_the_student_up_to_the_hint(taught):
    method = taught((8, 2), (8, 2), initial_share=0.25, hint_stage=1)
    trained = {id(each) for each in method.initial_parameters()}
    names = {name for name, each in method.named_parameters() if id(each) in trained}
    expected = ("connectors.", *(f"cohort.students.{index}.stages.{stage}." for index in (0, 1) for stage in (0, 1)))
    assert names == {name for name, _ in method.named_parameters() if name.startswith(expected)}


def regressed(regress, features):
    conv, norm = regress
    if isinstance(conv, nn.ConvTranspose2d):
        features = F.conv_transpose2d(features, conv.weight, stride=2, padding=1)
    else:
        features = F.conv2d(features, conv.weight, stride=conv.stride, padding=conv.padding)
    return slow.batch_norm(features, norm).clamp(min=0)


def hints(method, batch, last_strides, teacher_stride):
    maps, logits = slow.run_students(method, batch[0], last_strides)
    network = method.taught_by.network
    taught = slow.stage_outputs(network, batch[0], (1, 1, teacher_stride), trained=False)
    hint = method.settings.hint_stage
    loss = torch.zeros((), dtype=torch.float64)
    for regress, own in zip(method.connectors, maps, strict=True):
        loss = loss + 100 * ((regressed(regress, own[hint]) - taught[hint]) ** 2).sum() / taught[hint].numel()
    return loss, logits, slow.head_logits(network, taught[-1])


@pytest.mark.parametrize(
    ("shapes", "teacher", "hint"),
    [([(8, 2), (5, 1)], (12, 2), 2), ([(8, 2)], (12, 1), 2), ([(8, 2), (8, 2)], (8, 2), 1)],
)
def test_a_step_against_a_slow_derivation(taught, batch, shapes, teacher, hint):
    method = taught(*shapes, teacher=teacher, hint_stage=hint)
    loss, logits, _ = hints(method, batch, [last for _, last in shapes], teacher[1])
    slow.assert_step_agrees(method, batch, 10, loss + sum(slow.ce(each, batch[1]) for each in logits))


def test_steps_of_both_stages_against_a_slow_derivation(taught, batch):
    method = taught((8, 2), (5, 1), initial_share=0.1)
    loss, logits, targets = hints(method, batch, [2, 1], 2)
    method.initialising = True
    slow.assert_step_agrees(method, batch, 10, loss)
    method.initialising = False
    method.zero_grad()
    _, logits, targets = hints(method, batch, [2, 1], 2)
    weight = 4 - 3 * (100 / 300 - 0.1) / 0.9
    loss = sum(slow.ce(each, batch[1]) for each in logits)
    for each in logits:
        log = slow.probabilities(each, 3.0).log()
        loss = loss - weight * (slow.probabilities(targets, 3.0) * log).sum() / len(log)
    slow.assert_step_agrees(method, batch, 100, loss)


def test_which_modules_the_terms_reach(taught, batch):
    method = taught((8, 2), (8, 2))
    between = {f"connector{index}": each for index, each in enumerate(method.connectors)}
    assert slow.reached(method, batch, HINT, **between) == {"branch0", "connector0"}
    method = taught((8, 2), (8, 2), initial_share=0.1)
    assert slow.reached(method, batch, SOFT) == {"branch0", "head0"}


@pytest.mark.parametrize(
    ("size", "target", "kernel", "stride"),
    [((8, 8), (8, 8), (1, 1), (1, 1)), ((8, 8), (4, 4), (3, 3), (2, 2)), ((8, 8), (5, 8), (4, 1), (1, 1)),
     ((4, 4), (8, 8), (4, 4), (2, 2)), ((8, 6), (4, 5), (3, 2), (2, 1))],
)  # fmt: skip
def test_regressors_by_size(size, target, kernel, stride):
    made = regressor((3, *size), (7, *target), act=True, whose="")
    assert (made[0].kernel_size, made[0].stride) == (kernel, stride)
    result = made(torch.randn(2, 3, *size))
    assert result.shape == (2, 7, *target) and result.min() == 0


def test_sizes_without_an_answer_are_refused():
    method = FitNets([cd.network("resnet8", 3)], 3)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    teacher = cd.Network([stem, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)], cd.network("resnet8", 3).head, [4, 4, 4])
    teacher.head.linear = nn.Linear(4, 3)
    message = "fitnets: resnet8: no layer brings maps of 16x16 to the teacher's 30x30: choose networks whose maps"
    with pytest.raises(UsageError, match=message):
        cd.WithTeacher(method, teacher)


def test_stages_that_do_not_exist_are_refused(taught):
    message = r"fitnets: Network has no partner of the teacher's for stage 3: choose a --method\.hint-stage from 0 to 2"
    with pytest.raises(UsageError, match=message):
        taught((8, 2), hint_stage=3)
    method = FitNets([cd.network("resnet18", 3)], 3, FitNets.Settings(hint_stage=0))
    with pytest.raises(UsageError, match=r"resnet18 has no partner .* for stage 0: choose a .* from 1 to 4"):
        cd.WithTeacher(method, cd.network("resnet8", 3))
