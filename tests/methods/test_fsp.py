"""FSP: flow matrices by hand, the two stages, unlike widths, a whole step against a slow derivation."""

import pytest
import torch

import codistill as cd
from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.fsp import FSP, flow

from . import slow

METHOD = FSP
TERM = "flow/teacher->student0"
NOW = torch.tensor(0.5)
ONE, COUNTED = torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
SECOND = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]])


def test_a_flow_matrix_by_hand():
    assert flow(COUNTED, SECOND).tolist() == [[[2.5, 1.5]]]
    assert flow(ONE, SECOND).tolist() == [[[1.0, 0.5]]]
    # A map of one place: the other one's mean, or maximum.
    assert flow(COUNTED, torch.full((1, 1, 1, 1), 2.0)).tolist() == [[[5.0]]]
    assert flow(COUNTED, torch.full((1, 1, 1, 1), 2.0), maximum=True).tolist() == [[[8.0]]]
    # 3x3 places are no multiple of 2x2.
    assert flow(torch.ones(1, 1, 3, 3), SECOND).tolist() == [[[1.0, 0.5]]]


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 1.625), ({"reduction": "sum"}, 3.25), ({"flow_weight": 2.0}, 3.25)]
)
def test_a_term_by_hand(taught, settings, expected):
    method = taught((8, 2), **settings)
    outputs = Outputs((torch.zeros(1, 3),), (SECOND,), stage_maps=((COUNTED, SECOND),), teacher_maps=(ONE, SECOND))
    terms = method.initial_losses(outputs, torch.tensor([0]))
    assert {name: each.item() for name, each in terms.items()} == {TERM: expected}


def by_hand(method, batch, maximum=False, summed=False):
    images, _ = batch
    maps, _ = slow.run_students(method, images, [2] * len(method.cohort))
    taught = slow.stage_outputs(method.taught_by.network, images, (1, 1, 2), trained=False)
    loss = torch.zeros((), dtype=torch.float64)
    for own in maps:
        for number in (0, 1):
            matrices = []
            for first, second in ((own[number], own[number + 1]), (taught[number], taught[number + 1])):
                if first.shape[2] > second.shape[2]:
                    parts = torch.stack([first[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)])
                    first = parts.max(0).values if maximum else parts.sum(0) / 4
                places = first.shape[2] * first.shape[3]
                matrices.append((first[:, :, None] * second[:, None]).sum((3, 4)) / places)
            difference = matrices[0] - matrices[1]
            loss = loss + (difference**2).sum() / (len(images) if summed else difference.numel())
    return loss


@pytest.mark.parametrize("paper", [False, True])
def test_an_initial_step_against_a_slow_derivation(taught, batch, paper):
    method = taught((8, 2), (8, 2), **({"pooling": "max", "reduction": "sum"} if paper else {}))
    method.initialising = True
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch, paper, paper))


def test_then_the_labels_alone_train_without_the_teacher(taught, batch, monkeypatch):
    method = taught((8, 2))
    monkeypatch.setattr(method.taught_by.network, "stages", None)  # it does not run
    _, logits = slow.run_students(method, batch[0], [2])
    slow.assert_step_agrees(method, batch, 10, slow.ce(logits[0], batch[1]))


def test_without_an_initialisation_both_train_together(taught, batch):
    method = taught((8, 2), initial_share=0.0)
    _, logits = slow.run_students(method, batch[0], [2])
    assert method.initial_epochs(300) == 0
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch) + slow.ce(logits[0], batch[1]))


def test_thirty_epochs_of_two_hundred_and_seventy(taught):
    assert taught((8, 2)).initial_epochs(270) == 30


def test_the_term_reaches_all_stages(taught, batch):
    method = taught((8, 2), (8, 2), initial_share=0.0)
    assert slow.reached(method, batch, TERM) == {"branch0"}


def test_unlike_widths_are_refused():
    method = FSP([cd.network("resnet20", 3)], 3)
    with pytest.raises(UsageError) as caught:
        cd.WithTeacher(method, cd.network("wrn-16-2", 3))
    assert str(caught.value).startswith(
        "fsp needs stages of the teacher's widths [16, 32, 64, 128], but resnet20 has [16, 16, 32, 64]: choose networks"
    )


def test_networks_that_differ_in_depth_alone_go_together(batch):
    method = cd.WithTeacher(FSP([cd.network("resnet8", 3)], 3), cd.network("resnet14", 3))
    method.initialising = True
    assert method.losses(method(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]), NOW)[TERM] > 0
