"""Gradients of weights on side streams: the same bits, really aside, and safe from each way to get streams wrong."""

import copy

import pytest
import torch
from torch import Tensor, nn

import codistill as cd
from codistill import weight_gradients
from codistill.forward import TrainingForward
from codistill.methods import METHODS
from codistill.weight_gradients import SideStream, WeightGradients

from . import tiny
from .pretended_gpu import GPU, Race, pretended

CUDA = torch.device("cuda")
PROGRESS = torch.tensor(0.3)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
KINDS = {
    **{name: (name, {}) for name in METHODS},
    "dml alternating": ("dml", {"update": "alternating"}),
    "mfef with one student's components for all": ("mfef", {"share_components": True}),
}


@pytest.fixture
def gpu():
    with pretended() as device:
        yield device


def gradients(method: cd.Method, forward: TrainingForward, device: torch.device) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    images = torch.randn(*([len(method.cohort)] if method.views > 1 else []), 6, 3, 8, 8).to(device)
    found: dict[str, Tensor | None] = {}
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for turn in method.turns() or [tuple(method.parameters())]:
        method.zero_grad()
        terms = method.losses(forward(images), LABELS.to(device), PROGRESS.to(device))
        torch.stack(list(terms.values())).sum().backward(inputs=[each for each in turn if each.requires_grad])
        found |= {names[id(each)]: each.grad if each.grad is None else each.grad.cpu() for each in turn}
    return found


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_the_same_bits(gpu, kind, precision):
    name, settings = KINDS[kind]
    method = tiny.method(METHODS[name], students=max(2, METHODS[name].min_students), **settings).train().to(CUDA)
    other = copy.deepcopy(method)
    forward = TrainingForward(method, precision)
    forward.weight_gradients_aside(CUDA)
    for _ in range(2):  # streams and memory of the first time are used again
        found = gradients(method, forward, CUDA)
    expected = gradients(other, TrainingForward(other, precision), CUDA)
    assert found.keys() == expected.keys() and any(each is not None for each in found.values())
    for key, gradient in expected.items():
        there = found[key]
        assert there is None if gradient is None else there is not None and torch.equal(there, gradient), key
    for key, value in other.state_dict().items():
        assert value.dtype == method.state_dict()[key].dtype


class Layers(nn.Module):
    """Convolutions of several kinds."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, (3, 1), 2, groups=2), nn.Conv2d(4, 6, 1, dilation=2)]
        )
        self.twice = twice

    def forward(self, images: Tensor) -> Tensor:
        for convolution in self.convolutions:
            images = convolution(images).relu()
        return images


def backward(layers: Layers, side: WeightGradients | None, images: Tensor) -> list[Tensor | None]:
    weights = [each.weight for each in layers.convolutions]
    layers.zero_grad()
    if side is None:
        layers(images).square().sum().backward()
    else:
        with side.of(weights):
            total = layers(images).square().sum()
        total.backward()
        side.join()
    return [parameter.grad for parameter in layers.parameters()]


def test_strides_groups_dilation_and_biases(gpu):
    layers = Layers().to(CUDA)
    images = torch.randn(5, 3, 9, 8).to(CUDA)
    expected = [each.clone() for each in backward(layers, None, images)]
    found = backward(layers, WeightGradients(CUDA), images)
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(found, expected, strict=True))


def test_work_is_given_to_another_stream_and_no_more_is_in_flight_than_allowed(gpu, monkeypatch):
    monkeypatch.setattr(weight_gradients, "IN_FLIGHT", 2)
    side, given = SideStream(CUDA), []
    values = torch.ones(3).to(CUDA)
    for _ in range(5):
        given += side.compute(lambda: (values * 2 if torch.cuda.current_stream() is side._stream else None,), values)
        assert len(side._in_flight) <= 2
    assert None not in given
    with pytest.raises(Race, match="may not have written yet"):
        given[-1] + 1
    given[1] + 1  # it was waited for when the fourth one came
    side.join()
    assert [each.cpu().tolist() for each in given] == [[2, 2, 2]] * 5


def test_what_others_wait_for_has_priority(gpu):
    side = SideStream(CUDA)
    cohort = tiny.method(students=2).cohort
    cohort.run_branches_on_streams(CUDA)
    assert len(cohort.streams) == 2
    assert all(stream.priority < side._stream.priority for stream in cohort.streams)


def fails(gpu: GPU, match: str) -> None:
    """The backward pass of MFEF, with whatever was broken before, is a race."""
    method = tiny.method(METHODS["mfef"], students=2).train().to(CUDA)
    forward = TrainingForward(method, "bf16")
    forward.weight_gradients_aside(CUDA)
    with pytest.raises(Race, match=match):
        for _ in range(2):
            gradients(method, forward, CUDA)


def test_gradients_that_nobody_waits_for_are_found(gpu, monkeypatch):
    monkeypatch.setattr(WeightGradients, "join", lambda self: None)
    fails(gpu, "may not have written yet")


def test_what_is_read_aside_must_be_held(gpu, monkeypatch):
    whole = SideStream.compute
    monkeypatch.setattr(SideStream, "compute", lambda self, function, *read: whole(self, function))
    fails(gpu, "memory that another stream may still use")


def test_a_weight_that_is_used_twice_must_not_have_its_gradients_aside(gpu, monkeypatch):
    method = tiny.method(METHODS["mfef"], students=2, share_components=True).train().to(CUDA)
    forward = TrainingForward(method, "bf16")
    forward.weight_gradients_aside(CUDA)
    gradients(method, forward, CUDA)
    monkeypatch.setattr(weight_gradients._Uses, "count", property(lambda self: 1, lambda self, value: None))
    with pytest.raises(Race, match="may not have written yet"):
        gradients(method, forward, CUDA)


def test_convolutions_of_other_weights_and_frozen_ones_are_left_alone(gpu):
    layers = Layers().to(CUDA)
    images = torch.randn(5, 3, 9, 8).to(CUDA)
    first, second, _ = (each.weight for each in layers.convolutions)
    second.requires_grad_(False)
    side = WeightGradients(CUDA)
    with side.of([first, second]):
        total = layers(images)
        kinds = {type(node[0]).__name__ for node in total.grad_fn.next_functions}
    assert kinds == {"ConvolutionBackward0"}
    total.sum().backward()
    assert second.grad is None and layers.convolutions[2].weight.grad is not None
