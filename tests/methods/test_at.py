"""AT: the attention maps, their distance, unlike sizes, a whole step against a slow derivation."""

import math

import pytest
import torch

from codistill.core.errors import UsageError
from codistill.methods.at import AT, attention
from codistill.methods.cohort import Outputs

from . import slow

METHOD = AT
TERM = "attention/teacher->student0"
NOW = torch.tensor(0.5)


def test_an_attention_map_by_hand():
    # a^2 / ||a^2|| of a = (3, 4): (9, 16) / sqrt(337).
    expected = torch.tensor([[9.0, 16.0]]) / math.sqrt(337)
    torch.testing.assert_close(attention(torch.tensor([[[[3.0, -4.0]]]])), expected)
    assert expected[0].tolist() == pytest.approx([0.490261, 0.871576], abs=1e-6)
    # The mean over channels of the squares: (1 + 49) / 2 and (9 + 1) / 2, which are 25 and 5.
    torch.testing.assert_close(
        attention(torch.tensor([[[[1.0, 3.0]], [[7.0, -1.0]]]])), torch.tensor([[5.0, 1.0]]) / math.sqrt(26)
    )


def test_terms_by_hand(taught):
    method = taught((8, 2), ce_weight=0.5)
    first, own, other = torch.ones(1, 4, 1, 2), torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    outputs = Outputs(
        (torch.zeros(1, 3),), (own,), stage_maps=((first, own, other),), teacher_maps=(first, other, other)
    )
    terms = method.losses(outputs, torch.tensor([0]), NOW)
    assert list(terms) == ["ce/student0", TERM]
    assert terms["ce/student0"].item() == pytest.approx(0.5 * math.log(3))
    # Of the pair that differs, with the means over two places; the first pair is not compared.
    expected = 1000 * ((0.490261 - 1) ** 2 + 0.871576**2) / 2
    assert terms[TERM].item() == pytest.approx(expected, rel=1e-5)


def by_hand(method, batch, last_strides, teacher_stride):
    images, labels = batch
    maps, logits = slow.run_students(method, images, last_strides)
    taught = slow.stage_outputs(method.taught_by.network, images, (1, 1, teacher_stride), trained=False)
    loss = sum(slow.ce(each, labels) for each in logits)
    for own in maps:
        for mine, others in zip(own[1:], taught[1:], strict=True):
            if mine.shape[2] == 2 * others.shape[2]:
                mine = sum(mine[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)) / 4
            vectors = []
            for each in (mine, others):
                squares = (each**2).sum(1).flatten(1) / each.shape[1]
                vectors.append(squares / (squares**2).sum(1, keepdim=True).sqrt())
            loss = loss + 1000 * ((vectors[0] - vectors[1]) ** 2).sum() / vectors[0].numel()
    return loss


@pytest.mark.parametrize(("shapes", "stride"), [([(8, 2), (8, 2)], 2), ([(8, 2), (5, 1)], 2)])
def test_a_step_against_a_slow_derivation(taught, batch, shapes, stride):
    method = taught(*shapes, teacher=(8, stride))
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch, [last for _, last in shapes], stride))


def test_larger_maps_of_the_teacher_are_averaged_too(taught, batch):
    method = taught((8, 2), teacher=(8, 1))
    terms = method.losses(method(batch[0]), batch[1], NOW)
    assert terms[TERM].isfinite() and terms[TERM] > 0


def test_the_term_spares_the_head(taught, batch):
    assert slow.reached(taught((8, 2), (8, 2)), batch, TERM) == {"branch0"}


def test_the_teachers_kl_may_be_added(taught, batch):
    method = taught((8, 2), ce_weight=0.1, kl_weight=0.9)
    terms = method.losses(method(batch[0]), batch[1], NOW)
    assert list(terms) == ["ce/student0", "kl/teacher->student0", TERM]


def test_a_weight_below_zero_is_refused(taught):
    with pytest.raises(UsageError, match=r"method\.attention_weight is -1.0; it must be a number, at least 0"):
        taught(attention_weight=-1.0)
