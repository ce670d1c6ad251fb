"""AHBF: assistants, which pairs teach each other, what an assistant's predictor is made of."""

import math

import pytest
import torch

from codistill.methods.ahbf import AHBF
from codistill.methods.cohort import Outputs
from codistill.networks.network import parameter_count

from . import slow

METHOD = AHBF
SHAPES = [(8, 2)] * 3
FULL = torch.tensor(1.0)


def test_terms_by_hand(make):
    # With logits 3 log 3 the softened probabilities are (3/4, 1/4), with equal ones (1/2, 1/2).
    sure, unsure = (torch.tensor([[value, 0.0]] * 2, dtype=torch.float64) for value in (3 * math.log(3), 0.0))
    outputs = Outputs((unsure, sure, unsure), (), sure, extras={"assistant1": unsure})
    terms = make().losses(outputs, torch.tensor([0, 1]), FULL)
    apart = 9 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))  # T^2 KL of (3/4, 1/4) to (1/2, 1/2)
    back = 9 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    expected = {
        "ce/student0": math.log(2),
        "ce/student1": (math.log(1 + 1 / 27) + math.log(28)) / 2,
        "ce/student2": math.log(2),
        "ce/assistant1": math.log(2),
        "ce/fused": (math.log(1 + 1 / 27) + math.log(28)) / 2,
        "kl/student1->student0": 0.75 * 4 * apart,
        "kl/assistant1->student0": 0.0,
        "kl/assistant1->student1": 0.75 * 2 * back,
        "kl/student2->assistant1": 0.0,
        "kl/fused->assistant1": 0.75 * 2 * apart,
        "kl/fused->student2": 0.75 * 2 * apart,
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, abs=1e-12), name


def test_the_ramp_up_has_240_of_300_epochs(make):
    sure, unsure = (torch.tensor([[value, 0.0]] * 2, dtype=torch.float64) for value in (3 * math.log(3), 0.0))
    outputs = Outputs((unsure, sure), (), sure)
    method = make((8, 2), (8, 2))
    whole = method.losses(outputs, torch.tensor([0, 1]), FULL)["kl/student1->student0"]
    for epoch, weight in ((0, math.exp(-5)), (120, math.exp(-5 / 4)), (240, 1.0), (299, 1.0)):
        found = method.losses(outputs, torch.tensor([0, 1]), epoch / 300)["kl/student1->student0"]
        assert found.item() == pytest.approx(weight * whole.item(), rel=1e-6)


def test_an_assistant_by_hand(make):
    # Two images of a one-pixel map: means are the pixels. BN makes (-1, 1) of (0, 2) and, scaled by 2, (-2, 2).
    method = make((8, 2), (8, 2), (8, 2))
    first = method.assistants.layers[0]
    with torch.no_grad():
        for each in first.parameters():
            each.zero_()
        first.fuse[0].weight[0, 0] = 1.0  # channel 0 of the fused map is that of the first map
        first.fuse[1].weight[0], first.fuse[1].eps = 2.0, 1e-15
        first.gate.layers[0].weight[1, 0] = 3.0  # (-6, 6) before the gate's BN: (-1, 1)
        first.gate.layers[1].weight[1], first.gate.layers[1].eps = math.log(4), 1e-15
    maps = torch.zeros(2, 2, 8, 1, 1, dtype=torch.float64)
    maps[0, 1, 0] = 2.0
    logits = torch.tensor([[[5.0, 0.0], [5.0, 0.0]], [[0.0, 10.0], [0.0, 10.0]]], dtype=torch.float64)
    fused, mixed = first(list(maps), list(logits))
    torch.testing.assert_close(fused[:, 0, 0, 0], torch.tensor([-2.0, 2.0], dtype=torch.float64))
    # Image 0: ReLU makes 0 of -log 4, and the gate (1/2, 1/2); image 1: (1, 4) / 5.
    torch.testing.assert_close(mixed, torch.tensor([[2.5, 5.0], [1.0, 8.0]], dtype=torch.float64))


def assistants_by_hand(method, maps, logits):
    """Logits of all assistants, of equal maps' sizes."""
    fused, mixed, found = maps[0], logits[0], []
    for layer, branch, own in zip(method.assistants.layers, maps[1:], logits[1:], strict=True):
        both = torch.cat([fused, branch], dim=1)
        conv, norm = layer.fuse
        raw = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], both)
        fused = slow.batch_norm(raw, norm)
        linear, gate_norm, _ = layer.gate.layers
        weights = slow.batch_norm(slow.pooled(fused) @ linear.weight.T + linear.bias, gate_norm).clamp(min=0)
        weights = slow.probabilities(weights)
        mixed = weights[:, :1] * mixed + weights[:, 1:] * own
        found.append(mixed)
    return found


def by_hand(method, batch, epoch, strides):
    images, labels = batch
    chosen = method.settings
    stage_maps, logits = slow.run_students(method, images, strides)
    mixed = assistants_by_hand(method, [each[-1] for each in stage_maps], logits)
    weight = math.exp(-5 * (1 - min(epoch, 240) / 240) ** 2) * chosen.temperature**2 * chosen.kl_weight

    def kl(target, learned):
        target = target.detach() if chosen.detach_teachers else target
        return slow.kl(slow.probabilities(target, chosen.temperature), learned, chosen.temperature)

    loss = sum(slow.ce(each, labels) for each in (*logits, *mixed))
    for index, assistant in enumerate(mixed):
        below, deeper = (logits[0] if index == 0 else mixed[index - 1]), logits[index + 1]
        loss = loss + weight * chosen.branch_weight * kl(deeper, below)
        loss = loss + weight * chosen.assistant_weight * (kl(assistant, below) + kl(assistant, deeper))
    return loss


CASES = {
    "two": ([(8, 2)] * 2, {}),
    "four": ([(8, 2)] * 4, {}),
    "unlike widths": ([(8, 2), (12, 2), (10, 2)], {"shared_stages": 2}),
    "fixed teachers": ([(8, 2)] * 3, {"detach_teachers": True}),
    "other weights": (
        [(8, 2)] * 3,
        {"assistant_weight": 4.0, "branch_weight": 2.0, "kl_weight": 1.0, "temperature": 2.0},
    ),
}


@pytest.mark.parametrize(("shapes", "settings"), CASES.values(), ids=CASES)
def test_a_step_against_a_slow_derivation(make, batch, shapes, settings):
    method = make(*shapes, **settings)
    slow.disturb_norms(method)
    slow.assert_step_agrees(method, batch, 90, by_hand(method, batch, 90, [stride for _, stride in shapes]))


def test_who_learns_from_what(make, batch):
    layers = dict(zip(("first", "second"), make().assistants.layers, strict=True))
    assert set(layers) == {"first", "second"}

    def reached(method, term: str) -> set[str]:
        first, second = method.assistants.layers
        return slow.reached(method, batch, term, first=first, second=second)

    method, fixed = make(), make(detach_teachers=True)
    assert reached(method, "kl/student1->student0") == {"trunk"} | slow.branches(0, 1)
    assert reached(fixed, "kl/student1->student0") == {"trunk"} | slow.branches(0)
    assert reached(fixed, "kl/fused->student2") == {"trunk"} | slow.branches(2)
    assert reached(fixed, "kl/student2->assistant1") == {"trunk", "first"} | slow.branches(0, 1)


def test_unlike_maps_are_brought_to_the_smallest(make, batch):
    method = make((12, 1), (8, 2), (10, 1))
    assert [parameter_count(each) > 0 for each in method.assistants.adapters] == [True, False, True]
    first, second = method.assistants.layers
    assert (first.fuse[0].weight.shape, second.fuse[0].weight.shape) == ((8, 20, 1, 1), (8, 18, 1, 1))
    assert method(batch[0]).fused.shape == (6, 3)


def test_an_assistant_is_deployed_with_what_lies_below_it(make, batch):
    method = make(*[(8, 2)] * 4)
    method(batch[0])
    method.eval()
    predictors, predictions = method.predictors(), method.predictions(method(batch[0]))
    names = ["student0", "student1", "student2", "student3", "ensemble", "fused", "assistant1", "assistant2"]
    assert list(predictors) == list(predictions) == names
    for name, logits in predictions.items():
        assert torch.equal(predictors[name](batch[0]), logits), name
    trunk, branch = parameter_count(method.cohort[0].stages[:2]), parameter_count(method.cohort[0].stages[2:])
    own, one = branch + parameter_count(method.cohort[0].head), parameter_count(method.assistants.layers[0])
    assert parameter_count(predictors["assistant1"]) == trunk + 2 * own + one
    assert parameter_count(predictors["assistant2"]) == trunk + 3 * own + 2 * one
    assert parameter_count(predictors["fused"]) == trunk + 4 * own + 3 * one
    assert parameter_count(predictors["student0"]) == trunk + own
    # By hand: 1x1 from 16 to 8 channels, its BN, a linear layer from 8 to 2, its BN.
    assert one == 16 * 8 + 2 * 8 + 8 * 2 + 2 + 2 * 2
