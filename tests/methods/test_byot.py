"""BYOT: the exits, who teaches them, their shapes, what is deployed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.byot import BYOT, BYOTSettings, Exit
from codistill.networks import Network, PooledLinear, network
from codistill.networks.layers import conv_bn_act, initialise
from codistill.networks.network import parameter_count

from . import slow

NOW = torch.tensor(0.5)
STRIDES = (1, 1, 2, 2)


def deep_network(last: int = 8) -> Network:
    """Four stages: 4 and 6 channels at 8x8, 7 at 4x4, `last` at 2x2; so there are two exits."""
    widths = (4, 6, 7, last)
    stages = [
        conv_bn_act(before, after, 3, stride)
        for before, after, stride in zip((3, *widths), widths, STRIDES, strict=False)
    ]
    built = Network(stages, PooledLinear(last, 3), widths)
    initialise(built)
    return built


def make(count: int = 1, size: tuple[int, int] = (8, 8), **settings) -> BYOT:
    method = BYOT([deep_network() for _ in range(count)], 3, BYOTSettings(**settings), size).double()
    slow.disturb_norms(method)
    return method


def test_terms(batch):
    method = make(2)
    terms = method.losses(method(batch[0]), batch[1], NOW)
    assert list(terms) == [
        *("ce/student0", "ce/student1"),
        *("ce/student0/exit1", "soft/student0/exit1"),
        *("ce/student0/exit2", "soft/student0/exit2", "hint/student0/exit2"),
        *("ce/student1/exit1", "soft/student1/exit1"),
        *("ce/student1/exit2", "soft/student1/exit2", "hint/student1/exit2"),
    ]


def adapted(leave: Exit, features: torch.Tensor) -> torch.Tensor:
    """Convolutions 1x1, s x s with stride s, 1x1, each with batch normalisation and ReLU."""
    first, norm1, middle, norm2, last, norm3 = leave.adapter
    stride = features.shape[2] // 2
    assert middle.weight.shape[2:] == (stride, stride)
    features = slow.batch_norm(F.conv2d(features, first.weight), norm1).clamp(min=0)
    features = slow.batch_norm(F.conv2d(features, middle.weight, stride=stride), norm2).clamp(min=0)
    return slow.batch_norm(F.conv2d(features, last.weight), norm3).clamp(min=0)


def constant(tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tensor.tolist(), dtype=torch.float64)


def by_hand(method, batch, a=0.3, temperature=3.0, factor=1.0, weight=0.03, hinted=(2,), form="pooled"):
    images, labels = batch
    loss = torch.zeros((), dtype=torch.float64)
    for student, exits in zip(method.cohort, method.exits, strict=True):
        maps = slow.stage_outputs(student, images, STRIDES)
        logits, last = slow.head_logits(student, maps[-1]), constant(maps[-1])
        loss = loss + slow.ce(logits, labels)
        target = slow.probabilities(constant(logits), temperature)
        for number, (leave, features) in enumerate(zip(exits, maps[1:3], strict=True), start=1):
            own = adapted(leave, features)
            own_logits = slow.head_logits(leave, own)
            loss = loss + (1 - a) * slow.ce(own_logits, labels)
            entropies = -(target * slow.probabilities(own_logits, temperature).log()).sum(1)
            loss = loss + a * factor * entropies.sum() / len(labels)
            if number in hinted and form == "pooled":
                loss = loss + weight * ((slow.pooled(own) - slow.pooled(last)) ** 2).sum() / len(labels)
            elif number in hinted:
                loss = loss + weight * ((own - last) ** 2).sum() / (4 * len(labels))
    return loss


@pytest.mark.parametrize(
    ("settings", "derivation"),
    {
        "defaults": ({}, {}),
        "two students": ({"count": 2}, {}),
        "shared stages": ({"count": 2, "shared_stages": 3}, {}),
        "scaled": ({"scale_by_temperature": True, "temperature": 2.0}, {"factor": 4.0, "temperature": 2.0}),
        "weights": ({"soft_weight": 0.8, "hint_weight": 2.0}, {"a": 0.8, "weight": 2.0}),
        "maps": ({"hint_form": "map", "hint_weight": 1.0}, {"form": "map", "weight": 1.0}),
        "all hints": ({"hint_skips": "none"}, {"hinted": (1, 2)}),
        "as the code does": ({"hint_skips": "deepest"}, {"hinted": (1,)}),
        "narrow": ({"adapter_width": 1}, {}),
    }.values(),
)
def test_a_step_against_a_slow_derivation(batch, settings, derivation):
    method = make(**settings)
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch, **derivation))


def parts(method, batch, term) -> set[str]:
    value = method.losses(method(batch[0]), batch[1], NOW)[term]
    found = set()
    for name, parameter in method.named_parameters():
        (gradient,) = torch.autograd.grad(value, [parameter], retain_graph=True, allow_unused=True)
        if gradient is not None and gradient.any():
            # cohort.students.0.stages.1..., cohort.students.0.head..., exits.0.1...
            _, *rest = name.split(".")
            found.add(f"exit{int(rest[1]) + 1}" if name.startswith("exits") else ".".join(rest[2:4])[:8])
    return found


@pytest.mark.parametrize("form", ["pooled", "map"])
def test_a_hint_trains_the_adapter_and_the_stages_below_it(batch, form):
    method = make(hint_form=form)
    assert parts(method, batch, "hint/student0/exit2") == {"stages.0", "stages.1", "stages.2", "exit2"}
    method.losses(method(batch[0]), batch[1], NOW)["hint/student0/exit2"].backward()
    assert method.exits[0][1].head.linear.weight.grad is None


def test_students_do_not_learn_from_each_other(batch):
    method = make(2)
    for name, term in method.losses(method(batch[0]), batch[1], NOW).items():
        other = method.cohort[1 if "student0" in name else 0]
        gradients = torch.autograd.grad(term, list(other.parameters()), retain_graph=True, allow_unused=True)
        assert all(each is None or not each.any() for each in gradients), name


def test_a_student_alone_is_the_same_beside_another(batch):
    pair, alone = make(2), make()
    alone.cohort[0].load_state_dict(pair.cohort[0].state_dict())
    alone.exits[0].load_state_dict(pair.exits[0].state_dict())
    expected = pair.losses(pair(batch[0]), batch[1], NOW)
    for name, term in alone.losses(alone(batch[0]), batch[1], NOW).items():
        assert torch.equal(term, expected[name])


def test_each_student_may_have_a_view_of_its_own(batch):
    images = torch.stack([batch[0], batch[0].flip(3)])
    for shared in (0, 2):
        method = make(2, shared_stages=shared).eval()
        outputs = method(images)
        for index, view in enumerate(images):
            single = method(view)
            torch.testing.assert_close(outputs.logits[index], single.logits[index])
            for name in (name for name in single.extras if f"student{index}" in name):
                torch.testing.assert_close(outputs.extras[name], single.extras[name])


@pytest.mark.parametrize(
    ("shape", "last", "kernel", "stride"),
    [
        ((5, 8, 8), (7, 2, 2), (4, 4), (4, 4)),
        ((5, 4, 4), (7, 4, 4), (1, 1), (1, 1)),
        ((5, 9, 8), (7, 3, 4), (3, 2), (3, 2)),
        ((5, 5, 7), (7, 3, 2), (3, 4), (1, 3)),
    ],
)
def test_an_adapter_gives_the_shape_of_the_last_map(shape, last, kernel, stride):
    leave = Exit(shape, last, 3, 2)
    assert leave.adapter[2].kernel_size == kernel and leave.adapter[2].stride == stride
    features, logits = leave(torch.randn(2, *shape))
    assert features.shape == (2, *last) and logits.shape == (2, 3)
    assert parameter_count(leave) == 5 * 2 + 4 + 4 * math.prod(kernel) + 4 + 2 * 7 + 14 + 7 * 3 + 3


@pytest.mark.parametrize(
    ("name", "exits"),
    # 16 or 32 -> middle -> last: convolutions, BN, head of 100 classes.
    [
        (
            "resnet20",
            [
                16 * 16 + 256 * 16 + 16 * 64 + 2 * 96 + 6500,
                32 * 16 + 256 * 4 + 16 * 64 + 2 * 96 + 6500,
            ],
        ),
        (
            "wrn-16-2",
            [
                32 * 32 + 1024 * 16 + 32 * 128 + 2 * 192 + 12900,
                64 * 32 + 1024 * 4 + 32 * 128 + 2 * 192 + 12900,
            ],
        ),
    ],
)
def test_parameters_of_the_exits(name, exits):
    with torch.device("meta"):
        method = BYOT([network(name, 100)], 100)
    assert [parameter_count(each) for each in method.exits[0]] == exits


@pytest.mark.parametrize("name", ["densenet-40-12", "mobilenetv2", "resnet18"])
def test_other_families_have_exits(name):
    with torch.device("meta"):
        method = BYOT([network(name, 10)], 10)
        outputs = method(torch.randn(2, 3, 32, 32))
    assert len(method.exits[0]) == len(method.cohort[0].stages) - 2
    for key, value in outputs.extras.items():
        assert value.shape == ((2, 10) if key.startswith("logits/") else outputs.feature_maps[0].shape)


def test_only_the_plain_network_is_deployed(batch):
    method = make().eval()
    predictors = method.predictors()
    assert list(predictors) == list(method.predictions(method(batch[0]))) == ["student0"]
    assert predictors["student0"] is method.cohort[0]
    (group,) = method.parameter_groups()
    assert len(group.parameters) == len(list(method.parameters()))


def test_equal_students_share_nothing_unless_asked():
    assert make(2).cohort.shared_stages == 0
    assert make(2, shared_stages=None).cohort.shared_stages == 3


def test_networks_without_room_for_exits_are_refused(tiny_network):
    short = tiny_network()
    short = Network(list(short.stages)[:2], PooledLinear(6, 3), short.widths[:2], "short")
    with pytest.raises(UsageError, match="at least 3 stages, but short has 2: choose another"):
        BYOT([short], 3, image_size=(8, 8))
    growing = tiny_network()
    growing.stages[2] = nn.Upsample(scale_factor=2)
    with pytest.raises(UsageError, match=r"maps of Network grow from \(8, 8\) to \(16, 16\)"):
        BYOT([growing], 3, image_size=(8, 8))
