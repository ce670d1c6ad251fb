"""A step against the same step written out by hand."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import codistill as cd
from codistill.data.augment import Augmentation, BatchIndices, DeviceImages, epoch_indices
from codistill.training import step as module
from codistill.training.capture import EagerSteps, make_fleet
from codistill.training.ranks import ALONE
from codistill.training.step import TrainStep

from .. import tiny

CPU = torch.device("cpu")
AUGMENTATION = Augmentation(padding=2)
RATE, DECAY, FUSION_DECAY = 0.05, 0.01, 0.2
KINDS = pytest.mark.parametrize("kind", [cd.MFEF, cd.FFL, cd.Independent], ids=lambda kind: kind.name)


def settings_of(kind: type[cd.Method]) -> dict[str, float]:
    return {} if kind is cd.Independent else {"fusion_weight_decay": FUSION_DECAY}


def images_of(data: cd.Dataset, device: torch.device = CPU) -> DeviceImages:
    return DeviceImages(data.train, data.statistics, device)


def make_step(method: cd.Method, precision: str = "float32", device: torch.device = CPU, **changes: float) -> TrainStep:
    settings = tiny.settings(**{"learning_rate": RATE, "weight_decay": DECAY} | changes)
    return module.make_step(method, images_of(tiny.data(), device), AUGMENTATION, settings, precision)


def batches(count: int, size: int = 6) -> list[BatchIndices]:
    plan = epoch_indices(24, 0, 0, AUGMENTATION, CPU)
    return [plan.part(start, start + size) for start in range(0, count * size, size)]


def by_hand(method: cd.Method, taken: list[BatchIndices], progress: Tensor) -> list[dict[str, float]]:
    """Plain SGD, neither fused nor foreach; two groups, for the fusion has its own weight decay."""
    fusion = [parameter for name, parameter in method.named_parameters() if name.startswith("fusion.")]
    rest = [parameter for name, parameter in method.named_parameters() if not name.startswith("fusion.")]
    groups = [{"params": rest, "weight_decay": DECAY}, {"params": fusion, "weight_decay": FUSION_DECAY}]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]], lr=RATE, momentum=0.9, nesterov=True, foreach=False
    )
    images, seen = images_of(tiny.data()), []
    for batch in taken:
        pixels, labels = images.augmented(batch, AUGMENTATION)
        terms = method.losses(method(pixels.contiguous()), labels, progress)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        seen.append({name: term.item() for name, term in terms.items()})
    return seen


@KINDS
def test_three_steps_equal_those_written_by_hand(kind):
    method = tiny.method(kind, **settings_of(kind)).train()
    other = copy.deepcopy(method)
    start = copy.deepcopy(method.state_dict())
    progress = torch.tensor(0.2)
    step, taken = make_step(method), batches(3)
    for batch in taken:
        step(batch, progress)
    seen = by_hand(other, taken, progress)
    expected = other.state_dict()
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )
        assert not torch.equal(tensor, start[name]), name
    means = step.sums.means()
    assert list(means) == ["loss", *seen[0]]
    for name in seen[0]:
        assert means[name] == pytest.approx(sum(each[name] for each in seen) / 3, rel=1e-4, abs=1e-6)


@KINDS
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_no_host_read(kind, precision):
    step = make_step(tiny.method(kind), precision)
    with tiny.HostReads() as reads:
        for batch in batches(3):
            step(batch, torch.tensor(0.5))
    assert reads.found == []
    with tiny.HostReads() as reads:
        step.sums.means()
    assert reads.found == ["tolist"]


def test_bf16_computes_the_losses_in_float32(monkeypatch):
    method = tiny.method()
    seen = []
    losses = method.losses

    def watched(outputs, labels, progress):
        terms = losses(outputs, labels, progress)
        seen.append((outputs.logits[0].dtype, {term.dtype for term in terms.values()}))
        return terms

    monkeypatch.setattr(method, "losses", watched)
    step = make_step(method, "bf16")
    for batch in batches(2):
        step(batch, torch.tensor(0.5))
    assert seen == [(torch.bfloat16, {torch.float32})] * 2
    assert all(value == value for value in step.sums.means().values())
    floats = {tensor.dtype for tensor in method.state_dict().values() if tensor.is_floating_point()}
    assert floats == {torch.float32}


def test_gradients_are_gone_after_the_step():
    method = tiny.method()
    make_step(method)(batches(1)[0], torch.tensor(0.5))
    assert all(parameter.grad is None for parameter in method.parameters())


def test_after_step_follows_the_update():
    class Watching(cd.Independent):
        """Keeps a moving average, as a method with a teacher of its own past would."""

        weights: list[Tensor]

        def after_step(self) -> None:
            self.weights.append(self.cohort[0].head.linear.weight.detach().clone())

    method = Watching(tiny.own_students(), 3, image_size=(8, 8))
    method.weights = []
    step = make_step(method)
    before = method.cohort[0].head.linear.weight.detach().clone()
    for batch in batches(2):
        step(batch, torch.tensor(0.5))
    assert len(method.weights) == 2
    assert not torch.equal(method.weights[0], before)
    assert torch.equal(method.weights[1], method.cohort[0].head.linear.weight)


@pytest.mark.gpu
def test_a_plain_step_on_a_gpu_equals_the_cpu():
    states = []
    for device in (CPU, torch.device("cuda")):
        method = tiny.method()
        step_there = make_step(method, device=device)
        for batch in batches(3):
            step_there(BatchIndices(*(table.to(device) for table in batch.tables())), torch.tensor(0.5, device=device))
        states.append({name: tensor.cpu() for name, tensor in method.state_dict().items()})
    torch.testing.assert_close(states[1], states[0], rtol=1e-2, atol=1e-3)


def test_a_method_that_cannot_be_captured_runs_plainly_and_is_named(capsys):
    def member(name: str, capturable: bool) -> SimpleNamespace:
        method = SimpleNamespace(name=name, capturable=capturable)
        return SimpleNamespace(device=torch.device("cuda"), method=method, ranks=ALONE)

    members = [member("mine", False), member("mfef", True), member("mine", False)]
    fleet = make_fleet(members)
    assert isinstance(fleet, EagerSteps) and fleet.members == members
    line = "codistill: warning: mine cannot be captured as a CUDA graph: the steps run one by one, which is slower\n"
    assert capsys.readouterr().err == line
