"""The optimiser: groups, the schedule, and equality with torch's plain SGD."""

import copy

import pytest
import torch

from codistill.methods.mfef import MFEF, MFEFSettings
from codistill.settings.config import TrainSettings
from codistill.training.optim import learning_rate_at, make_optimizer, set_learning_rate


@pytest.fixture
def method(tiny_network):
    return MFEF([tiny_network(), tiny_network()], 3, image_size=(8, 8))


def papers(method):
    return make_optimizer(method, TrainSettings())


def test_groups(method):
    students, fusion = papers(method).param_groups
    assert (students["name"], students["weight_decay"]) == ("students", 1e-4)
    assert (fusion["name"], fusion["weight_decay"]) == ("fusion", 1e-5)
    assert {id(parameter) for parameter in fusion["params"]} == {id(each) for each in method.fusion.parameters()}
    for group in (students, fusion):
        assert (group["momentum"], group["nesterov"], group["dampening"], group["fused"]) == (0.9, True, 0, True)
        assert torch.equal(group["lr"], torch.tensor(0.1))


def test_every_tensor_is_decayed_once(method):
    optimizer = papers(method)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(trained) == len({id(each) for each in trained}) == len(list(method.parameters()))


def test_a_method_may_set_no_decay_of_zero(tiny_network):
    method = MFEF([tiny_network(), tiny_network()], 3, MFEFSettings(fusion_weight_decay=0.0), (8, 8))
    assert [group["weight_decay"] for group in papers(method).param_groups] == [1e-4, 0.0]


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.1), (149, 0.1), (150, 0.01), (224, 0.01), (225, 0.001), (299, 0.001)]
)
def test_schedule(epoch, rate):
    assert learning_rate_at(epoch, 0.1, (150, 225), 0.1) == pytest.approx(rate, rel=1e-12)


def test_the_rate_is_written_into_the_tensors_that_a_step_reads(method):
    optimizer = papers(method)
    tensors = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.01)
    for group, tensor in zip(optimizer.param_groups, tensors, strict=True):
        assert group["lr"] is tensor
        assert tensor.item() == pytest.approx(0.01)


def fill_gradients(method, value):
    for parameter in method.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True), (0.0, False)])
def test_equals_plain_sgd(method, batch, momentum, nesterov):
    images, labels = batch[0].float(), batch[1]
    twin = copy.deepcopy(method)
    optimizer = make_optimizer(method, TrainSettings(momentum=momentum, nesterov=nesterov))
    fusion = set(twin.fusion.parameters())
    students = [parameter for parameter in twin.parameters() if parameter not in fusion]
    reference = torch.optim.SGD(
        [{"params": students, "weight_decay": 1e-4}, {"params": list(fusion), "weight_decay": 1e-5}],
        lr=0.1,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        fused=False,
        foreach=False,
    )
    for step in range(6):
        if step == 3:
            set_learning_rate(optimizer, 0.01)
            for group in reference.param_groups:
                group["lr"] = 0.01
        optimizer.zero_grad(set_to_none=True)
        sum(method.losses(method(images), labels, torch.tensor(step / 6)).values()).backward()
        for parameter, other in zip(method.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
        for (name, parameter), other in zip(method.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: name + text)


def test_momentum_is_there_from_the_start(method):
    optimizer = papers(method)
    state = optimizer.state_dict()["state"]
    assert len(state) == len(list(method.parameters()))
    for parameter in method.parameters():
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert buffer.shape == parameter.shape and not buffer.any()
    pointers = {
        id(parameter): optimizer.state[parameter]["momentum_buffer"].data_ptr() for parameter in method.parameters()
    }
    fill_gradients(method, 0.5)
    optimizer.step()
    assert list(optimizer.state_dict()["state"]) == list(state)
    for parameter in method.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].data_ptr() == pointers[id(parameter)]
