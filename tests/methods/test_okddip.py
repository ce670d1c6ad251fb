"""OKDDip: numbers by hand, attention, a whole step against a slow derivation, who moves what."""

import math

import pytest
import torch
from torch import Tensor

from codistill.methods.cohort import Outputs
from codistill.methods.losses import mean_logits
from codistill.methods.okddip import OKDDip, PeerAttention
from codistill.networks import network
from codistill.networks.network import parameter_count

from . import slow
from .slow import assert_step_agrees, branches, ce, disturb_norms, kl, pooled, probabilities, ramp, reached

METHOD = OKDDip
EQUAL = [(8, 2)] * 3
FOUR = [(16, 2)] * 4
UNLIKE = [(8, 2), (10, 1), (8, 1), (12, 2)]
Z1, Z2, Z3 = ([2, 0.5, -1], [1, 1.5, 0], [3, 0, -2])


def outputs_by_hand() -> Outputs:
    """Two peers and a leader; the first peer looks at the peers with 1/4 and 3/4, the second with 1/2 each."""
    logits = tuple(torch.tensor([each], dtype=torch.float64) for each in (Z1, Z2, Z3))
    weights = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64)
    return Outputs(logits, (torch.zeros(1, 8, 4, 4),) * 3, extras={"log_attention": weights.log()})


@pytest.mark.parametrize(
    ("ensemble_of", "divergences"),
    [
        # t_1 = z1 / 4 + 3 z2 / 4 = (1.25, 1.25, -.25); t_2 = (1.5, 1, -.5), which the leader learns from too.
        ("logits", [0.2738134538948296, 0.11952345737668027, 0.9040992992610652]),
        ("probabilities", [0.26587608937752427, 0.12569689126678907, 0.8877810454554002]),
    ],
)
def test_numbers_by_hand(make, ensemble_of, divergences):
    terms = make(ensemble_of=ensemble_of).losses(outputs_by_hand(), torch.tensor([0]), torch.tensor(1.0))
    expected = {f"kl/peers->student{index}": each for index, each in enumerate(divergences)}
    expected |= {"ce/student0": 0.24131129665715703, "ce/student1": 1.1041306053367284}
    expected |= {"ce/student2": 0.05498523537714751}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-12)


def test_attention_by_hand():
    attention = PeerAttention([8, 8], 8).double()
    with torch.no_grad():
        attention.query["8"].weight.copy_(torch.eye(8)[:1])
        attention.key["8"].weight.copy_(torch.eye(8)[1:2])
    features = torch.zeros(2, 1, 8, dtype=torch.float64)
    # Queries 1 and 0, keys 0 and ln 3: softmax(0, ln 3) = (1/4, 3/4), and softmax(0, 0).
    features[0, 0, 0], features[1, 0, 1] = 1.0, math.log(3)
    weights = attention(list(features)).exp()
    torch.testing.assert_close(weights, torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64))


def test_attention_is_not_symmetric_and_each_row_adds_up(make, batch):
    weights = make(*FOUR)(batch[0]).extras["log_attention"].exp()
    assert weights.shape == (6, 3, 3)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(6, 3, dtype=torch.float64))
    assert not torch.allclose(weights, weights.transpose(1, 2))


def loss_by_hand(method: OKDDip, batch: tuple[Tensor, Tensor], strides: list[int], epoch: int) -> Tensor:
    images, labels = batch
    maps, logits = slow.run_students(method, images, strides)
    *peers, leader = logits
    hold = (lambda each: each.detach()) if method.settings.detach_teachers else (lambda each: each)
    features = [hold(pooled(own[-1])) for own in maps[:-1]]
    queries = [each @ method.attention.query[str(each.shape[1])].weight.T for each in features]
    keys = [each @ method.attention.key[str(each.shape[1])].weight.T for each in features]
    taught = [hold(each) for each in peers]
    as_mixed = taught if method.settings.ensemble_of == "logits" else [probabilities(each, 3.0) for each in taught]

    def target(weights: list[Tensor]) -> Tensor:
        mixed = sum(weight[:, None] * each for weight, each in zip(weights, as_mixed, strict=True))
        return probabilities(mixed, 3.0) if method.settings.ensemble_of == "logits" else mixed

    equal = [torch.ones_like(features[0][:, 0]) / len(peers) for _ in peers]
    distillation = kl(target(equal), leader, 3.0)
    for query, student in zip(queries, peers, strict=True):
        powers = [torch.exp((query * key).sum(1)) for key in keys]
        distillation = distillation + kl(target([each / sum(powers) for each in powers]), student, 3.0)
    return sum(ce(each, labels) for each in logits) + ramp(epoch) * 9 * distillation


@pytest.mark.parametrize("ensemble_of", ["logits", "probabilities"])
@pytest.mark.parametrize("detach", [False, True], ids=["moving", "detached"])
@pytest.mark.parametrize(
    ("shapes", "shared"),
    [(EQUAL, None), (FOUR, None), (FOUR, 0), (UNLIKE, None)],
    ids=["equal", "four", "network-based", "unlike"],
)
def test_a_whole_step_agrees_with_a_slow_derivation(make, batch, shapes, shared, detach, ensemble_of):
    method = make(*shapes, shared_stages=shared, detach_teachers=detach, ensemble_of=ensemble_of)
    disturb_norms(method)
    for epoch in (40, 80):
        method.zero_grad()
        assert_step_agrees(method, batch, epoch, loss_by_hand(method, batch, [stride for _, stride in shapes], epoch))


@pytest.mark.parametrize("ensemble_of", ["logits", "probabilities"])
def test_who_moves_what_with_detached_teachers(make, batch, ensemble_of):
    method = make(detach_teachers=True, ensemble_of=ensemble_of)
    for index in (0, 1):
        parts = {"trunk", "attention"} | branches(index)
        assert reached(method, batch, f"kl/peers->student{index}", attention=method.attention) == parts
    assert reached(method, batch, "kl/peers->student2", attention=method.attention) == {"trunk"} | branches(2)


def test_the_leader_teaches_nobody(make, batch):
    method = make()
    outputs = method(batch[0])
    moved = Outputs((*outputs.logits[:-1], outputs.logits[-1] + 1.5), outputs.feature_maps, extras=outputs.extras)
    moved.logits[-1][:, 0] += 1
    before, after = (method.losses(each, batch[1], torch.tensor(1.0)) for each in (outputs, moved))
    for name in before:
        assert torch.equal(before[name], after[name]) != name.endswith("student2"), name
    torch.testing.assert_close(method.targets(outputs)[-1], mean_logits(outputs.logits[:-1]))


def test_peers_that_agree_teach_nothing(make, batch):
    method = make()
    outputs = method(batch[0])
    alike = Outputs((outputs.logits[0],) * 3, outputs.feature_maps, extras=outputs.extras)
    terms = method.losses(alike, batch[1], torch.tensor(1.0))
    assert all(abs(term) < 1e-12 for name, term in terms.items() if name.startswith("kl/"))


def test_peers_of_one_width_share_the_attention(make):
    attention = make(*UNLIKE, attention_reduction=2).attention
    assert list(attention.query) == list(attention.key) == ["8", "10"]
    # The leader's width, 12, is not among them; both pairs lead into 8 / 2 channels.
    assert parameter_count(attention) == 2 * (8 * 4 + 10 * 4)


def test_parameters():
    with torch.device("meta"):
        method = OKDDip([network("resnet32", 100) for _ in range(4)], 100)
    assert parameter_count(method.attention) == 2 * 64 * 8
    (students,) = method.parameter_groups()
    assert {id(each) for each in method.attention.parameters()} <= {id(each) for each in students.parameters}


def test_features_narrower_than_the_reduction_keep_one_channel():
    attention = PeerAttention([6, 5], 8)
    assert {each.out_features for each in [*attention.query.values(), *attention.key.values()]} == {1}
