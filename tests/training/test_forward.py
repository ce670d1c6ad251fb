"""The training forward pass against the same method under plain autocast."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import codistill as cd
from codistill.bench.measurement import OperatorCount
from codistill.core.device import autocast
from codistill.methods import METHODS
from codistill.training.forward import TrainingForward

from .. import tiny

CPU = torch.device("cpu")
PROGRESS = torch.tensor(0.3)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
KINDS = {
    **{name: (name, {}) for name in METHODS},
    "dml alternating": ("dml", {"update": "alternating"}),
    "mfef with one student's components for all": ("mfef", {"share_components": True}),
}
# They apply a layer more than once in a pass.
REPEATED = ("okddip", "okdph", "mfef with one student's components for all")


def images(method: cd.Method) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*([method.views] if method.views > 1 else []), 6, 3, 8, 8)


def gradients(method: cd.Method, forward) -> dict[str, Tensor | None]:
    """Gradients of each turn's total for its parameters, named."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    found: dict[str, Tensor | None] = {}
    for turn in method.alternating_updates() or [tuple(method.parameters())]:
        method.zero_grad()
        total = torch.stack(list(method.losses(forward(images(method)), LABELS, PROGRESS).values())).sum()
        total.backward(inputs=[each for each in turn if each.requires_grad])
        found |= {names[id(each)]: each.grad for each in turn}
    return found


def by_autocast(method: cd.Method):
    def forward(pixels: Tensor):
        with autocast(CPU, "bf16"):
            return method(pixels)

    return forward


def build(kind: str) -> cd.Method:
    name, settings = KINDS[kind]
    return tiny.method(METHODS[name], students=max(2, METHODS[name].min_students), **settings).train()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_statistics_and_gradients_are_those_of_autocast(kind):
    method = build(kind)
    other = copy.deepcopy(method)
    with torch.no_grad():
        expected, found = by_autocast(other)(images(other)), TrainingForward(method, "bf16")(images(method))
    assert all(map(torch.equal, found.logits, expected.logits))
    assert list(method.state_dict()) == list(other.state_dict())
    for name, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) or (kind in REPEATED and "num_batches" in name), name
    expected, found = gradients(other, by_autocast(other)), gradients(method, TrainingForward(method, "bf16"))
    assert found.keys() == expected.keys() and any(each is not None for each in found.values())
    for name, gradient in found.items():
        if expected[name] is None:
            assert gradient is None, name
        elif kind in REPEATED:
            assert gradient.dtype == torch.float32
            assert (gradient - expected[name]).norm() <= 0.01 * expected[name].norm(), name
        else:
            assert torch.equal(gradient, expected[name]), name
    for name, parameter in method.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32, name


class Small(TorchDispatchMode):
    """Count casts of single weights, and counters that are raised alone."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.weights = {each.data_ptr() for each in of.parameters()}
        self.casts, self.counts = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.casts += func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights
        self.counts += func is torch.ops.aten.add_.Tensor and args[0].dtype == torch.int64
        return result


def test_weights_are_cast_and_batches_counted_together():
    method = tiny.method()
    norms = [each for each in method.modules() if isinstance(each, nn.BatchNorm2d)]
    found = []
    for forward in (by_autocast(method), TrainingForward(method, "bf16")):
        with Small(method) as small, OperatorCount() as count:
            gradients(method, forward)
        found.append((small.casts, small.counts, count.operators))
    (casts, counts, usual), (ours_cast, ours_counted, ours) = found
    assert counts == len(norms) and casts > 20
    assert (ours_cast, ours_counted) == (0, 0)
    # Each weight's gradient was cast back, too; now it is two casts and a count in all.
    assert usual - ours == 2 * casts + counts - 3


def test_what_is_not_trained_does_not_count_and_what_needs_its_count_keeps_it():
    method = tiny.method().train()
    norms = [each for each in method.modules() if isinstance(each, nn.BatchNorm2d)]
    norms[0].eval()
    norms[1].momentum = None
    expected = [0, 1] + [1] * (len(norms) - 2)
    TrainingForward(method, "float32")(images(method))
    assert [int(norm.num_batches_tracked) for norm in norms] == expected
    assert norms[1].running_mean.all()


def test_a_forward_pass_that_fails_leaves_the_method_whole():
    method = tiny.method().train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    forward = TrainingForward(method, "bf16")
    with pytest.raises(Exception, match="channels"):
        forward(torch.zeros(6, 5, 8, 8))
    assert before.keys() == method.state_dict().keys()
    assert all(torch.equal(value, method.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_is_not_trained_gets_no_gradient_computed(precision):
    method = tiny.method(cd.Independent).train()
    frozen = method.cohort[0]
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    outputs = TrainingForward(method, precision)(images(method))
    assert [each.requires_grad for each in outputs.logits] == [False, True]
