"""Rocket launching: the hint, the gradient block, what is shared."""

import copy
import math

import pytest
import torch

from codistill.methods.cohort import Outputs
from codistill.methods.rocket import Rocket, RocketSettings
from codistill.networks import Network, PooledLinear
from codistill.networks.layers import conv_bn_act
from codistill.networks.network import parameter_count

from . import slow

NOW = torch.tensor(0.5)
HINT = "hint/student1->student0"
LIGHT, BOOSTER = {"branch0", "head0"}, {"branch1", "head1"}


@pytest.fixture
def make(tiny_network):
    def build(*shapes, **settings) -> Rocket:
        students = [tiny_network(*shape) for shape in shapes or [(8, 2), (8, 2)]]
        method = Rocket(students, 3, RocketSettings(**settings), (8, 8)).double()
        slow.disturb_norms(method)
        return method

    return build


def terms_by_hand(method, light, booster) -> dict[str, float]:
    logits = tuple(torch.tensor(each, dtype=torch.float64) for each in (light, booster))
    terms = method.losses(Outputs(logits, ()), torch.tensor([0, 1]), NOW)
    return {name: term.item() for name, term in terms.items()}


def test_terms_by_hand(make):
    # Squared distances of the two images: 1 + 4 and 1; their mean is 3.
    terms = terms_by_hand(make(), [[1.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 1.0]])
    assert list(terms) == ["ce/student0", "ce/student1", HINT]
    assert terms["ce/student0"] == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2, abs=1e-12)
    assert terms["ce/student1"] == pytest.approx((math.log(1 + math.exp(2)) + math.log(1 + math.exp(-1))) / 2)
    assert terms[HINT] == pytest.approx(0.03 * 3, abs=1e-12)
    assert terms_by_hand(make(hint_weight=2.0), [[1.0, 0.0]] * 2, [[0.0, 2.0]] * 2)[HINT] == pytest.approx(
        10, abs=1e-12
    )


def test_the_hint_on_probabilities_by_hand(make):
    # softmax of (log 3, 0) is (3/4, 1/4), of (0, 0) it is (1/2, 1/2): 2 / 16; the other image agrees.
    light, booster = [[math.log(3), 0.0], [1.0, 1.0]], [[0.0, 0.0], [5.0, 5.0]]
    assert terms_by_hand(make(hint="softmax"), light, booster)[HINT] == pytest.approx(0.03 / 16, abs=1e-12)


def by_hand(method, batch, last_strides=(2, 2), gamma=0.03, softmax=False, block=True):
    images, labels = batch
    _, (light, booster) = slow.run_students(method, images, last_strides)
    loss = slow.ce(light, labels) + slow.ce(booster, labels)
    target = torch.tensor(booster.tolist(), dtype=torch.float64) if block else booster
    if softmax:
        light, target = slow.probabilities(light), slow.probabilities(target)
    for image in range(len(labels)):
        for label in range(3):
            loss = loss + gamma * (light[image, label] - target[image, label]) ** 2 / len(labels)
    return loss


@pytest.mark.parametrize("shared", [0, 1, 2, 3])
def test_a_step_against_a_slow_derivation(make, batch, shared):
    method = make(shared_stages=shared, hint_weight=0.7)
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch, gamma=0.7))


@pytest.mark.parametrize("hint", ["logits", "softmax"])
@pytest.mark.parametrize("block", [True, False])
def test_a_step_of_unlike_networks_against_a_slow_derivation(make, batch, hint, block):
    method = make((8, 2), (10, 1), shared_stages=2, hint=hint, detach_booster=block)
    loss = by_hand(method, batch, (2, 1), softmax=hint == "softmax", block=block)
    slow.assert_step_agrees(method, batch, 10, loss)


def test_a_whole_update_equals_one_written_by_hand(make, batch):
    method = make()
    other = copy.deepcopy(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(method.losses(method(batch[0]), batch[1], NOW).values()).backward()
        optimizer.step()
        parameters = list(other.parameters())
        gradients = torch.autograd.grad(by_hand(other, batch), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient
    torch.testing.assert_close(list(method.parameters()), list(other.parameters()), rtol=1e-8, atol=1e-10)


def test_the_gradient_block_spares_the_booster(make, batch):
    assert slow.reached(make(), batch, HINT) == {"trunk"} | LIGHT
    assert slow.reached(make(shared_stages=0), batch, HINT) == LIGHT
    assert slow.reached(make(detach_booster=False), batch, HINT) == {"trunk"} | LIGHT | BOOSTER


def test_without_gamma_both_train_alone(make, batch):
    assert make(hint_weight=0.0).losses(make()(batch[0]), batch[1], NOW)[HINT] == 0


def test_unlike_networks_share_what_is_asked_for(make):
    assert make((8, 2), (10, 1)).cohort.shared_stages == 0
    light, booster = make((8, 2), (10, 1), shared_stages=2).cohort
    assert [light.stages[index] is booster.stages[index] for index in range(3)] == [True, True, False]


def test_a_light_network_may_be_the_low_stages_of_the_booster(tiny_network, batch):
    # The paper's "bottom" form: the light network is a classifier on the booster's low stages.
    def chain(count: int) -> Network:
        widths = (4, 6, 8)[:count]
        stages = [conv_bn_act(before, after, 3) for before, after in zip((3, *widths), widths, strict=False)]
        return Network(stages, PooledLinear(widths[-1], 3), widths)

    light, booster = chain(2), chain(3)
    method = Rocket([light, booster], 3, RocketSettings(shared_stages=2), (8, 8)).double()
    assert parameter_count(method) == parameter_count(booster) + parameter_count(light.head)
    method.losses(method(batch[0]), batch[1], NOW)[HINT].backward()
    assert all(parameter.grad.any() for parameter in light.parameters())
    assert booster.stages[2][0].weight.grad is None and booster.head.linear.weight.grad is None
    method.eval()
    outputs, predictors = method(batch[0]), method.predictors()
    for name, logits in method.predictions(outputs).items():
        assert torch.equal(predictors[name](batch[0]), logits)
