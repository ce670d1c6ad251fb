"""L-MCL: exits that are whole networks, their comparison across networks, what is aggregated, what is deployed."""

import math

import pytest
import torch
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.l_mcl import LMCL, Aggregator
from codistill.networks import Network, PooledLinear, network
from codistill.networks.network import parameter_count
from codistill.networks.probe import forward_flop
from codistill.report.curves import colour_of

from . import slow
from .test_byot import STRIDES, deep_network
from .test_mcl import contrast, embedded, similarity, softened

METHOD = LMCL
NOW = torch.tensor(0.5)


def make(*widths: int, **settings) -> LMCL:
    """Four stages, so that there are two exits."""
    students = [deep_network(width) for width in widths or (8, 8)]
    method = LMCL(students, 3, LMCL.Settings(**settings), (8, 8)).double()
    slow.disturb_norms(method)
    return method


def test_terms_by_hand():
    method = make(exits=1)
    # Angles of the two embeddings of each network for four images; logits are of no account.
    points = [[[0.1, 1.2, 2.0, 3.0], [0.5, 0.7, 4.0, 5.0]], [[2.0, 2.5, 1.0, 0.0], [6.0, 0.4, 3.3, 1.0]]]
    circles = [[[(math.cos(each), math.sin(each)) for each in leaf] for leaf in own] for own in points]
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    taught = torch.tensor([[0.0, 1.0, 2.0]] * 4, dtype=torch.float64)
    extras = {"student0/exit2": zeros, "student1/exit2": zeros, "aggregated0": taught, "aggregated1": zeros}
    extras |= {f"embeddings{index}": torch.tensor(own, dtype=torch.float64) for index, own in enumerate(circles)}
    classes = [0, 0, 1, 1]
    terms = method.losses(Outputs((zeros, zeros), (), extras=extras), torch.tensor(classes), NOW)
    kinds = ("vcl/student0", "vcl/student1"), ("icl", "softvcl", "softicl")
    arrows = [f"{kind}/student{a}->student{b}" for kind in kinds[1] for a, b in ((1, 0), (0, 1))]
    assert list(terms) == [
        *("ce/student0", "ce/student1", "ce/student0/exit2", "ce/student1/exit2", "ce/aggregated0", "ce/aggregated1"),
        *(f"kl/aggregated{a}->student{b}" for a in (0, 1) for b in (0, 1)),
        *(*kinds[0], *arrows),
    ]
    assert terms["ce/student0/exit2"].item() == pytest.approx(math.log(3), abs=1e-12)
    expected = 9 * slow.divergence([0.0, 1.0, 2.0], [0.0] * 3, 3.0)
    assert terms["kl/aggregated0->student1"].item() == pytest.approx(expected, abs=1e-12)
    first, second = circles
    # Each of the two points of a network is compared with two of the other one.
    vcl = sum(2 * 0.1 * contrast(similarity(a, a), classes) for a in first)
    assert terms["vcl/student0"].item() == pytest.approx(vcl, abs=1e-12)
    pairs = [(a, b) for a in first for b in second]
    icl = sum(0.1 * contrast(similarity(a, b), classes) for a, b in pairs)
    assert terms["icl/student1->student0"].item() == pytest.approx(icl, abs=1e-12)
    within = sum(softened(similarity(b, b), similarity(a, a)) for a, b in pairs)
    assert terms["softvcl/student1->student0"].item() == pytest.approx(within, abs=1e-12)
    between = sum(softened(similarity(b, a), similarity(a, b)) for a, b in pairs)
    assert terms["softicl/student1->student0"].item() == pytest.approx(between, abs=1e-12)


def test_aggregated_logits_by_hand():
    aggregator = Aggregator(2, 2).double()
    first, _, last = aggregator.layers
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 0.0]])), first.bias.zero_()
        last.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]])), last.bias.copy_(torch.tensor([0.0, 3.0]))
    maps = [torch.full((1, 2, 4, 4), 2.0).double(), torch.ones(1, 2, 2, 2).double()]
    # Hidden units 2 + 1 and max(0, -2), so that both classifiers have the score 3.
    found = aggregator(maps, [torch.tensor([[1.0, 5.0]]).double(), torch.tensor([[3.0, -1.0]]).double()])
    assert found.tolist() == [[2.0, 2.0]]


def aggregated(aggregator: Aggregator, maps, logits) -> torch.Tensor:
    first, _, last = aggregator.layers
    hidden = (torch.cat([slow.pooled(each) for each in maps], 1) @ first.weight.T + first.bias).clamp(min=0)
    weights = slow.probabilities(hidden @ last.weight.T + last.bias)
    return sum(weights[:, index : index + 1] * each for index, each in enumerate(logits))


def by_hand(method, batch, weights=(0.1, 0.1, 1.0, 1.0), tau=0.1, temperature=3.0, kl=1.0):
    images, labels = batch
    loss, points, mixed, last = torch.zeros((), dtype=torch.float64), [], [], []
    for index, student in enumerate(method.cohort):
        stages = slow.stage_outputs(student, images, STRIDES)
        maps, logits = [], []
        for leave in method.exits[index]:
            rest = len(leave.stages)
            maps.append(slow.stage_outputs(leave, stages[-1 - rest], STRIDES[-rest:])[-1])
            logits.append(slow.head_logits(leave, maps[-1]))
        maps, logits = [*maps, stages[-1]], [*logits, slow.head_logits(student, stages[-1])]
        mixed.append(aggregated(method.aggregators[index], maps, logits))
        points.append([embedded(*each) for each in zip(method.embeddings[index], maps, strict=True)])
        last.append(logits[-1])
        loss = loss + sum(slow.ce(each, labels) for each in (*logits, mixed[-1]))
    for target in mixed:
        target = slow.probabilities(torch.tensor(target.tolist(), dtype=torch.float64), temperature)
        loss = loss + sum(kl * temperature**2 * slow.kl(target, each, temperature) for each in last)

    def supervised(rows):
        total, count = 0.0, len(labels)
        for p in range(count):
            others = [k for k in range(count) if k != p]
            positives = [k for k in others if labels[k] == labels[p]]
            whole = sum(rows[p, k].exp() for k in others).log()
            total = total + sum(whole - rows[p, q] for q in positives) / (len(positives) * count)
        return total

    def taught(target, rows):
        return temperature**2 * slow.kl(slow.probabilities(target.detach(), temperature), rows, temperature)

    for i in range(len(points)):
        for j in range(i + 1, len(points)):
            for a in points[i]:
                for b in points[j]:
                    aa, bb, ab, ba = (one @ other.T / tau for one, other in ((a, a), (b, b), (a, b), (b, a)))
                    loss = loss + weights[0] * (supervised(aa) + supervised(bb))
                    loss = loss + weights[1] * (supervised(ab) + supervised(ba))
                    loss = loss + weights[2] * (taught(bb, aa) + taught(aa, bb))
                    loss = loss + weights[3] * (taught(ba, ab) + taught(ab, ba))
    return loss


@pytest.mark.parametrize(
    ("widths", "settings", "derivation"),
    {
        "a pair": ((8, 8), {}, {}),
        "one exit each": ((8, 8), {"exits": 1, "shared_stages": 3}, {}),
        "three, unlike": ((8, 6, 8), {"exits": 1, "kl_weight": 0.0}, {"kl": 0.0}),
        "settings": (
            (8, 6),
            {
                "vcl_weight": 0.3,
                "icl_weight": 0.7,
                "soft_vcl_weight": 0.4,
                "soft_icl_weight": 2.0,
                "contrast_temperature": 0.5,
                "temperature": 1.5,
                "kl_weight": 0.6,
            },
            {"weights": (0.3, 0.7, 0.4, 2.0), "tau": 0.5, "temperature": 1.5, "kl": 0.6},
        ),
    }.values(),
)
def test_a_step_against_a_slow_derivation(batch, widths, settings, derivation):
    method = make(*widths, **settings)
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch, **derivation))


def test_each_exit_is_a_predictor_of_its_own(batch):
    method = make().eval()
    outputs, predictors = method(batch[0]), method.predictors()
    exits = [f"student{index}/exit{number}" for index in (0, 1) for number in (1, 2)]
    assert list(predictors) == ["student0", "student1", "ensemble", *exits]
    for name in exits:
        leaf, student = predictors[name], method.cohort[int(name[7])]
        assert isinstance(leaf, Network) and torch.equal(leaf(batch[0]), method.predictions(outputs)[name])
        # Its low stages are the student's, the others and the head its own.
        number = int(name[-1])
        same = [own is theirs for own, theirs in zip(leaf.stages, student.stages, strict=True)]
        assert same == [True] * (number + 1) + [False] * (3 - number) and leaf.head is not student.head
        assert parameter_count(leaf) == parameter_count(student)
    assert colour_of("student1/exit2") == colour_of("student1") != colour_of("student0/exit1")


def test_an_exit_fits_the_network_that_its_student_is():
    method = LMCL([network("resnet8", 10) for _ in range(2)], 10)
    leaf = method.predictors()["student0/exit1"]
    twin = network(leaf.spec, 10)
    twin.load_state_dict(leaf.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(twin.eval()(images), leaf.eval()(images))


def test_copies_start_with_weights_of_their_own():
    method = make()
    for student, exits in zip(method.cohort, method.exits, strict=True):
        for leave in exits:
            own, theirs = leave.state_dict(), student.state_dict()
            first = 4 - len(leave.stages)
            for number in range(len(leave.stages)):
                name = "0.weight"
                assert not torch.equal(own[f"stages.{number}.{name}"], theirs[f"stages.{first + number}.{name}"])
            assert not torch.equal(own["head.linear.weight"], theirs["head.linear.weight"])


def test_a_pair_costs_four_networks():
    students = [network("resnet8", 100) for _ in range(2)]
    one = forward_flop(students[0], (32, 32))
    method = LMCL(students, 100)
    # Stages cost nearly the same, so that a network with all of its exits costs (1 + 2 + 3) / 3 of one. Of ResNet-8 the
    # first stage has no projection, and the stem, which no exit repeats, is a part to notice.
    assert forward_flop(method, (32, 32)) / one == pytest.approx(4, abs=0.25)


def test_networks_of_other_depths_train_together(tiny_network, batch):
    method = LMCL([deep_network(), tiny_network(10)], 3, image_size=(8, 8)).double()
    assert list(method.named_exits()) == ["student0/exit1", "student0/exit2", "student1/exit1"]
    terms = method.losses(method(batch[0]), batch[1], NOW)
    # Three embeddings of the one and two of the other: 1/10 of log 5 for each comparison, if all points were one.
    assert terms["vcl/student0"].item() == pytest.approx(0.1 * 3 * 2 * math.log(5), rel=0.3)
    assert terms["vcl/student1"].item() == pytest.approx(0.1 * 2 * 3 * math.log(5), rel=0.3)
    sum(terms.values()).backward()
    assert all(each.grad is not None for each in method.parameters())


def test_which_exits_there_are():
    method = make(exits=1)
    assert list(method.named_exits()) == ["student0/exit2", "student1/exit2"]
    with pytest.raises(UsageError, match=r"method\.exits is 3, but Network of 4 stages has room for 2: use fewer"):
        make(exits=3)
    with pytest.raises(UsageError, match=r"method\.exits is 0; it must be at least 1"):
        LMCL.Settings(exits=0)
    with pytest.raises(UsageError, match=r"method\.kl_weight is -1\.0; it must be at least 0"):
        LMCL.Settings(kl_weight=-1.0)


def test_networks_without_room_for_exits_are_refused(tiny_network):
    plain = [tiny_network() for _ in range(2)]
    short = [Network(list(each.stages)[:2], PooledLinear(6, 3), each.widths[:2], "short") for each in plain]
    with pytest.raises(UsageError, match="l-mcl needs networks of at least 3 stages, but short has 2: choose another"):
        LMCL(short, 3, image_size=(8, 8))


def test_linear_layers_of_a_head_of_ones_own_are_drawn_anew():
    def own() -> Network:
        plain = deep_network()
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))
        return Network(list(plain.stages), head, plain.widths)

    method = LMCL([own(), own()], 3, image_size=(8, 8))
    with torch.no_grad():
        method.cohort[0].head[2].weight.fill_(7.0)
    again = LMCL([method.cohort[0], own()], 3, image_size=(8, 8))
    assert not torch.equal(again.exits[0][0].head[3].weight, method.cohort[0].head[3].weight)
    assert torch.equal(again.exits[0][0].head[2].weight, torch.ones(8))
