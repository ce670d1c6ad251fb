"""FFSD: shifted attention, decoders, who learns from whom, and the leader alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.ffsd import FFSD, Decoder, shifted, shifted_map, unit_distance
from codistill.methods.losses import attention_map
from codistill.networks import Network, PooledLinear
from codistill.networks.network import parameter_count

from . import slow

METHOD = FFSD
FULL = torch.tensor(1.0)
DOUBLE = {"dtype": torch.float64}


def test_attention_and_distance_by_hand():
    feature_map = torch.tensor([[[[1.0, 0.0]], [[3.0, 2.0]]]], **DOUBLE)
    assert attention_map(feature_map).tolist() == [[5.0, 2.0]]
    # (3, 4) / 5 and (4, 3) / 5 differ by 1/5 in both places; the second image agrees.
    values, target = torch.tensor([[3.0, 4.0], [1.0, 1.0]], **DOUBLE), torch.tensor([[8.0, 6.0], [7.0, 7.0]], **DOUBLE)
    assert unit_distance(values, target).item() == pytest.approx(0.04 / 2, abs=1e-12)


def test_shifted_attention_by_hand():
    # Length 3, u = (1, 2, 2, 0) / 3; a third of four places is one: the lowest u, 0, is the mark.
    found = shifted(torch.tensor([[1.0, 2.0, 2.0, 0.0]], **DOUBLE))
    torch.testing.assert_close(found, torch.tensor([[3 - 1 / 3, 3 - 2 / 3, 3 - 2 / 3, 1.5]], **DOUBLE))
    # Of six places two: the second lowest is the mark, and the one below it stays u. Length 9.
    found = shifted(torch.tensor([[0.0, 2.0, 4.0, 5.0, 6.0, 0.0]], **DOUBLE))
    assert found[0, 2].item() == pytest.approx(9 - 4 / 9, abs=1e-12)
    found = shifted(torch.tensor([[1.0, 2.0, 4.0, 4.0, 6.0, 6.0]], **DOUBLE))
    length = math.sqrt(109)
    expected = [1 / length, length / 2, length - 4 / length, length - 4 / length, length - 6 / length]
    assert found[0, :5].tolist() == pytest.approx(expected, abs=1e-12)
    # One place: the mark itself.
    assert shifted(torch.tensor([[4.0]], **DOUBLE)).item() == 2


def test_the_shifted_map_by_hand():
    # Two channels (1, 2, 2, 0) and (-1, 2, -2, 0): the attention is (1, 4, 4, 0) of length sqrt(33).
    feature_map = torch.tensor([[[[1.0, 2.0], [2.0, 0.0]], [[-1.0, 2.0], [-2.0, 0.0]]]], **DOUBLE)
    length = math.sqrt(33)
    unit = [1 / length, 4 / length, 4 / length, 0.0]
    target = [length - 1 / length, length - 4 / length, length - 4 / length, length / 2]
    missing = [(wanted - have) * length / 2 for wanted, have in zip(target, unit, strict=True)]
    added = (shifted_map(feature_map) - feature_map).flatten(2)
    assert added[0, 0].tolist() == pytest.approx(missing, abs=1e-12)
    assert added[0, 1].tolist() == pytest.approx(missing, abs=1e-12)


@pytest.mark.parametrize(
    "shapes", [[(16, 32, 32), (32, 16, 16), (64, 8, 8)], [(4, 9, 8), (6, 5, 8), (8, 5, 4)], [(4, 56, 56), (6, 14, 14)]]
)
def test_a_decoder_leads_back_through_the_stages(shapes):
    decoder = Decoder(shapes, "it")
    maps = decoder(torch.randn(2, *shapes[-1]))
    assert [each.shape[1:] for each in maps] == shapes[:-1]
    if len(shapes) == 3 and shapes[0][0] == 16:
        assert parameter_count(decoder) == 9 * (64 * 32 + 32 * 16) + 2 * (32 + 16)


def places(feature_map):
    return (feature_map**2).sum(1).flatten(1) / feature_map.shape[1]


def unit(values):
    flat = values.flatten(1)
    return flat / (flat**2).sum(1, keepdim=True).sqrt()


def apart(values, target):
    return ((unit(values) - unit(target)) ** 2).mean()


def shift(rows):
    """One place after the other."""
    result = torch.zeros_like(rows)
    for image, row in enumerate(rows):
        length = (row**2).sum().sqrt()
        mark = sorted((row / length).tolist())[len(row) // 3 - 1]
        for place, value in enumerate(row / length):
            result[image, place] = length - value if value > mark else value if value < mark else length / 2
    return result


def fixed(tensor):
    return torch.tensor(tensor.tolist(), **DOUBLE)


def decoded(decoder, source, running):
    ((conv, norm),) = decoder.layers
    raw = F.conv_transpose2d(source, conv.weight, stride=2, padding=1, output_padding=1)
    if not running:
        return slow.batch_norm(raw, norm).clamp(min=0)
    mean, variance, scale, bias = (
        fixed(each).reshape(1, -1, 1, 1) for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return fixed(((raw - mean) / (variance + 1e-5).sqrt() * scale + bias).clamp(min=0))


def by_hand(method, batch, epoch):
    images, labels = batch
    chosen, leader = method.settings, len(method.cohort) - 1
    temperature = chosen.temperature
    maps, logits = slow.run_students(method, images, (2,) * len(method.cohort))
    last = [each[-1] for each in maps]

    def kl(target, learned):
        return temperature**2 * slow.kl(slow.probabilities(fixed(target), temperature), learned, temperature)

    loss = sum(slow.ce(each, labels) for each in logits)
    for one in range(leader):
        for other in range(leader):
            if one != other:
                loss = loss + kl(logits[other], logits[one]) / (leader - 1)
    both = torch.cat([fixed(each) for each in last[:-1]], dim=1)
    (depthwise, first), (pointwise, second) = method.fusion.transfer
    fused = slow.batch_norm(F.conv2d(both, depthwise.weight, padding=1, groups=both.shape[1]), first).clamp(min=0)
    fused = slow.batch_norm(F.conv2d(fused, pointwise.weight), second).clamp(min=0)
    fused_logits = slow.head_logits(method.fusion, fused)
    loss = loss + slow.ce(fused_logits, labels) + kl(sum(logits[:-1]) / leader, fused_logits)
    loss = loss + kl(fused_logits, logits[leader])
    warm = math.exp(-5 * (1 - min(epoch, 5) / 5) ** 2)
    lifts = {}
    for index in range(1, leader):
        before = fixed(last[index - 1])
        wanted = shift(places(before))
        loss = loss + warm * chosen.diversity_weight * ((unit(places(last[index])) - wanted) ** 2).mean()
        lengths = (places(before) ** 2).sum(1, keepdim=True).sqrt()
        missing = (wanted - unit(places(before))) * lengths / before.shape[1]
        lifts[index] = before + missing.reshape(len(before), 1, *before.shape[2:])
    (depthwise, first), (pointwise, second) = method.transfer
    moved = F.conv2d(last[leader], depthwise.weight, padding=1, groups=last[leader].shape[1])
    moved = F.conv2d(slow.batch_norm(moved, first).clamp(min=0), pointwise.weight)
    moved = slow.batch_norm(moved, second).clamp(min=0)
    led = apart(places(last[leader]), fixed(places(fused))) + apart(places(moved), fixed(places(both)))
    loss = loss + warm * chosen.leader_weight * led
    lifts[leader] = fixed(fused)
    for index, source in lifts.items():
        weight = chosen.leader_weight if index == leader else chosen.diversity_weight
        target = decoded(method.decoders[index], source, running=True)
        loss = loss + warm * weight * apart(places(maps[index][1]), places(target))
        made, wanted = decoded(method.decoders[index], fixed(last[index]), running=False), fixed(maps[index][1])
        loss = loss + warm * chosen.decoder_weight * (apart(made, wanted) + apart(places(made), places(wanted)))
    return loss


CASES = {
    "two peers": (3, {}, 3),
    "three peers": (4, {}, 0),
    "other weights": (
        3,
        {"diversity_weight": 0.7, "leader_weight": 3.0, "decoder_weight": 2.0, "temperature": 3.0},
        40,
    ),
}


@pytest.mark.parametrize(("count", "settings", "epoch"), CASES.values(), ids=CASES)
def test_a_step_against_a_slow_derivation(make, batch, count, settings, epoch):
    method = make(*[(8, 2)] * count, **settings)
    slow.disturb_norms(method)
    for layer in method.decoders.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.3), nn.init.uniform_(layer.running_var, 0.5, 1.5)
    slow.assert_step_agrees(method, batch, epoch, by_hand(method, batch, epoch))


def test_terms(make, batch):
    method = make((8, 2), (8, 2), (8, 2))
    assert list(method.losses(method(batch[0]), batch[1], FULL)) == [
        *("ce/student0", "ce/student1", "ce/student2", "ce/fused", "kl/student1->student0", "kl/student0->student1"),
        *("kl/peers->fused", "kl/fused->student2", "diversity/student0->student1", "attention/fused->student2"),
        *("transfer/peers->student2", "self/student1", "decoder/student1", "self/student2", "decoder/student2"),
    ]


def test_the_leader_listens_and_teaches_nobody(make, batch):
    method = make((8, 2), (8, 2), (8, 2))
    for term in method.losses(method(batch[0]), batch[1], FULL):
        found = slow.reached(method, batch, term, fusion=method.fusion, decoders=method.decoders)
        if "student2" in term:
            assert not found & {*slow.branches(0, 1), "fusion"}, term
        else:
            assert not found & slow.branches(2), term


def test_decoders_teach_with_their_running_statistics(make, batch):
    method = make((8, 2), (8, 2), (8, 2))
    norm = method.decoders[1].layers[0][1]
    method(batch[0])
    assert norm.num_batches_tracked == 1 and norm.training
    raw = method.decoders[1].layers[0][0](method(batch[0]).feature_maps[1])
    assert norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean, (0.1 + 0.9 * 0.1) * raw.mean((0, 2, 3)))
    method.eval()(batch[0])
    assert norm.num_batches_tracked == 2


def test_what_is_deployed_carries_nothing_of_the_teaching(make, batch):
    method = make((8, 2), (8, 2), (8, 2))
    method(batch[0])
    method.eval()
    predictors, outputs = method.predictors(), method(batch[0])
    assert not outputs.extras
    alone, fusion = parameter_count(method.cohort[0]), parameter_count(method.fusion)
    assert parameter_count(predictors["student2"]) == alone
    assert parameter_count(predictors["fused"]) == 2 * (alone - parameter_count(method.cohort[0].head)) + fusion
    assert torch.equal(predictors["fused"](batch[0]), outputs.fused)
    with pytest.raises(ValueError, match="evaluation mode"):
        method.losses(outputs, batch[1], FULL)


def test_views_whose_places_differ_are_refused(tiny_network):
    method = FFSD([tiny_network() for _ in range(3)], 3, FFSD.Settings(views_per_student=True), (8, 8))
    with pytest.raises(UsageError, match="ffsd compares maps place by place, but views have other crops and flips"):
        method.refuse_useless()


def test_networks_without_a_decoder_are_refused():
    def short() -> Network:
        return Network([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)], PooledLinear(8, 3), (4, 8))

    with pytest.raises(UsageError, match="ffsd needs networks of at least 3 stages, but Network has 2: choose another"):
        FFSD([short() for _ in range(3)], 3, None, (8, 8))

    def growing() -> Network:
        stages = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 4, 3), nn.ConvTranspose2d(4, 8, 2, 2)]
        return Network(stages, PooledLinear(8, 3), (4, 4, 8))

    with pytest.raises(UsageError, match=r"no decoder leads from maps \[4, 4\] of Network to \[2, 2\]: choose another"):
        FFSD([growing() for _ in range(3)], 3, None, (8, 8))
