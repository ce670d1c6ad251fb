"""Online distillation with cheap convolutions: numbers by hand, a whole step, what each term moves."""

import math

import pytest
import torch

from codistill.methods.cohort import Outputs
from codistill.methods.okd_cheap import OKDCheap
from codistill.networks.network import parameter_count

from . import slow

METHOD = OKDCheap
STUDENTS, TAUGHT = [(1.0, 0.0, 0.0), (2.0, 0.5, -1.0)], (3.0, 0.0, -2.0)
# Golden values: T^2 KL of (3, 0, -2) from (2, 0.5, -1) at T = 4, and the cross-entropy of the latter.
DIVERGENCE, CROSS_ENTROPY = 16 * 0.02312004, 0.24131130


@pytest.fixture
def terms(make):
    """The terms of one image of class 0, whose logits are given."""

    def compute(progress: float = 0.0, **settings) -> dict[str, float]:
        logits = tuple(torch.tensor([each], dtype=torch.float64) for each in (*STUDENTS, TAUGHT))
        outputs = Outputs(logits[:2], (), logits[2])
        found = make(**settings).losses(outputs, torch.tensor([0]), torch.tensor(progress))
        return {name: term.item() for name, term in found.items()}

    return compute


def test_terms_by_hand(terms):
    found = terms()
    assert list(found) == ["ce/student0", "ce/student1", "ce/fused", "kl/fused->student0", "kl/fused->student1"]
    assert found["ce/student1"] == pytest.approx(CROSS_ENTROPY, abs=1e-7)
    assert found["ce/fused"] == pytest.approx(math.log(1 + math.exp(-3) + math.exp(-5)))
    assert found["kl/fused->student1"] == pytest.approx(DIVERGENCE, abs=1e-6)
    assert found["kl/fused->student0"] == pytest.approx(16 * slow.divergence(TAUGHT, STUDENTS[0], 4.0))
    assert terms(progress=0.9) == found  # no ramp-up


def test_settings_by_hand(terms):
    assert terms(mean_over_classes=True)["kl/fused->student1"] == pytest.approx(DIVERGENCE / 3, abs=1e-6)
    assert terms(mean_over_classes=True)["ce/student1"] == pytest.approx(CROSS_ENTROPY, abs=1e-7)
    at3 = terms(temperature=3.0)["kl/fused->student1"]
    assert at3 == pytest.approx(0.34763351, abs=1e-7)
    ramped = terms(progress=20 / 300, ramp_up=80 / 300)["kl/fused->student1"]
    assert ramped == pytest.approx(slow.ramp(20) * DIVERGENCE, abs=1e-6)


def fused_by_hand(method, maps):
    """Batch normalisation of the concatenated maps as one layer, ReLU, mean over places, linear."""
    size = maps[0].shape[2:]
    if all(each.shape[2:] == size for each in maps):
        joined = torch.cat(maps, dim=1)
        mean, variance = joined.mean((0, 2, 3), keepdim=True), joined.var((0, 2, 3), unbiased=False, keepdim=True)
        weight, bias = (torch.cat([getattr(each, name) for each in method.fusion.norms]) for name in ("weight", "bias"))
        normed = (joined - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]
        pooled = slow.pooled(normed.clamp(min=0))
    else:
        pairs = zip(maps, method.fusion.norms, strict=True)
        pooled = torch.cat([slow.pooled(slow.batch_norm(each, norm).clamp(min=0)) for each, norm in pairs], dim=1)
    return pooled @ method.fusion.linear.weight.T + method.fusion.linear.bias


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("mean_over_classes", [False, True])
@pytest.mark.parametrize(
    ("shapes", "shared"),
    [([(8, 2)] * 2, 0), ([(8, 2)] * 4, 2), ([(8, 2), (10, 1), (6, 2)], 0)],
    ids=["two", "four-with-a-trunk", "unlike"],
)
def test_a_step_against_a_slow_derivation(make, batch, shapes, shared, detach, mean_over_classes):
    method = make(*shapes, shared_stages=shared, detach_teachers=detach, mean_over_classes=mean_over_classes)
    slow.disturb_norms(method)
    images, labels = batch
    stages, logits = slow.run_students(method, images, [stride for _, stride in shapes])
    fused = fused_by_hand(method, [own[-1] for own in stages])
    target = slow.probabilities(fused.detach() if detach else fused, 4.0)
    loss = slow.ce(fused, labels)
    for each in logits:
        loss = loss + slow.ce(each, labels) + 16 * slow.kl(target, each, 4.0) / (3 if mean_over_classes else 1)
    slow.assert_step_agrees(method, batch, 10, loss)


def test_the_teacher_learns_from_its_students_when_it_is_not_detached(make, batch):
    everything = slow.branches(0, 1) - {"head1"} | {"fusion"}
    method = make(detach_teachers=False)
    assert slow.reached(method, batch, "kl/fused->student0", fusion=method.fusion) == everything
    method = make()
    assert slow.reached(method, batch, "kl/fused->student0", fusion=method.fusion) == slow.branches(0)


def test_nothing_is_shared_unless_it_is_asked_for(make):
    assert make().cohort.shared_stages == 0 and make(shared_stages=2).cohort.shared_stages == 2


def test_parameters_of_the_classifier(make):
    # Two for each channel, and a linear layer: 4 students of 64 channels, 10 classes: 512 + 2,570 by the same rule.
    assert parameter_count(make((8, 2), (10, 1)).fusion) == 2 * 18 + 18 * 3 + 3


def test_the_classifier_alone_is_a_predictor(make, batch):
    method = make((8, 2), (10, 1))
    slow.disturb_norms(method)
    method.eval()
    predictors = method.predictors()
    assert list(predictors) == ["student0", "student1", "ensemble", "fused"]
    assert torch.equal(predictors["fused"](batch[0]), method(batch[0]).fused_logits)
