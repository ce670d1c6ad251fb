"""The losses against numbers worked by hand, and their limits and invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codistill.methods.cohort import Outputs
from codistill.methods.ffl import FusionSettings, fusion_terms
from codistill.methods.losses import (
    cross_entropy,
    mean_logits,
    mixture_logits,
    ramp_up,
    soft_cross_entropy,
    soft_target_kl,
    squared_distance,
)

# Three classes, the label is 0; worked by hand from MFEF's equations.
Z1 = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
Z2 = torch.tensor([[1.0, 1.5, 0.0]], dtype=torch.float64)
ZF = torch.tensor([[3.0, 0.0, -2.0]], dtype=torch.float64)
ZA = torch.tensor([[1.5, 1.0, -0.5]], dtype=torch.float64)
LABEL = torch.tensor([0])


def epoch(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Progress at an epoch of 300."""
    return torch.tensor(number / 300, dtype=dtype)


def close(value: Tensor, expected: float, digits: int = 8) -> bool:
    return abs(value.item() - expected) <= 0.51 * 10**-digits


@pytest.mark.parametrize(
    ("number", "weight", "digits"),
    [
        (0, 0.0067379470, 10),
        (10, 0.021750, 6),
        (20, 0.0600546679, 10),
        (40, 0.2865047969, 10),
        (60, 0.731616, 6),
        (79, 0.9992190551, 10),
    ],
)
def test_ramp_up(number, weight, digits):
    assert close(ramp_up(epoch(number), 80 / 300), weight, digits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ramp_up_ends_at_exactly_one(dtype):
    assert [ramp_up(epoch(number, dtype), 80 / 300).item() for number in (80, 81, 150, 299)] == [1.0] * 4
    assert ramp_up(epoch(79, dtype), 80 / 300).item() < 1


@pytest.mark.parametrize(("number", "epochs"), [(10, 75), (20, 150), (400, 3000)])
def test_ramp_up_keeps_its_share_of_other_lengths(number, epochs):
    assert close(ramp_up(torch.tensor(number / epochs, dtype=torch.float64), 80 / 300), 0.2865047969, 10)


def test_ramp_up_without_length_is_one_at_once():
    assert ramp_up(torch.tensor(0.0), 0.0).item() == 1.0


@pytest.mark.parametrize(("logits", "value"), [(Z1, 0.24131130), (Z2, 1.10413061), (ZF, 0.05498524)])
def test_cross_entropy(logits, value):
    assert close(cross_entropy(logits, LABEL), value)


@pytest.mark.parametrize(
    ("logits", "target", "value"), [(Z1, ZF, 0.0386259454), (Z2, ZF, 0.1839143007), (ZF, ZA, 0.1004554777)]
)
def test_soft_target_kl_at_temperature_three(logits, target, value):
    assert close(soft_target_kl(logits, target, 3.0), 9 * value, 8)
    assert close(soft_target_kl(logits, target, 3.0) / 9, value, 10)


@pytest.mark.parametrize(("logits", "target", "value"), [(Z1, Z2, 0.47418277), (Z2, Z1, 0.43401338)])
def test_soft_target_kl_of_mutual_learning(logits, target, value):
    assert close(soft_target_kl(logits, target, 1.0), value)


def test_mean_logits():
    assert torch.equal(mean_logits([Z1, Z2]), ZA)


@pytest.mark.parametrize(("epsilon", "value"), [(0.0, 2.90696151), (1e-7, 2.90696916)])
def test_sum_of_the_distillation_terms(epsilon, value):
    terms = fusion_terms(Outputs((Z1, Z2), (), ZF), LABEL, epoch(80), FusionSettings(target_epsilon=epsilon))
    assert close(sum(term for name, term in terms.items() if name.startswith("kl/")), value)


@pytest.mark.parametrize(("number", "total"), [(0, 1.42001409), (20, 1.57500375), (80, 4.30738865), (299, 4.30738865)])
def test_total(number, total):
    terms = fusion_terms(Outputs((Z1, Z2), (), ZF), LABEL, epoch(number), FusionSettings())
    assert list(terms) == [
        *("ce/student0", "ce/student1", "ce/fused"),
        *("kl/fused->student0", "kl/fused->student1", "kl/ensemble->fused"),
    ]
    assert close(sum(terms.values()), total)
    assert close(terms["ce/student0"] + terms["ce/student1"] + terms["ce/fused"], 1.40042714)
    ramp = ramp_up(epoch(number), 80 / 300)
    assert torch.allclose(terms["kl/fused->student0"], ramp * 9 * 0.0386259454)
    assert torch.allclose(terms["kl/fused->student1"], ramp * 9 * 0.1839143007)
    assert torch.allclose(terms["kl/ensemble->fused"], ramp * 9 * 0.1004554777)


def test_losses_are_means_over_the_batch():
    logits, targets, labels = torch.cat([Z1, Z2]), torch.cat([ZF, ZA]), torch.tensor([0, 2])
    expected = (cross_entropy(Z1, labels[:1]) + cross_entropy(Z2, labels[1:])) / 2
    assert torch.isclose(cross_entropy(logits, labels), expected)
    expected = (soft_target_kl(Z1, ZF, 3.0) + soft_target_kl(Z2, ZA, 3.0)) / 2
    assert torch.isclose(soft_target_kl(logits, targets, 3.0), expected)


@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
def test_soft_target_kl_agrees_with_torch(epsilon):
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = F.kl_div((logits / 3).log_softmax(1), (targets / 3).softmax(1) + epsilon, reduction="batchmean")
    assert torch.isclose(soft_target_kl(logits, targets, 3.0, epsilon=epsilon), 9 * expected, rtol=1e-12)


def test_soft_target_kl_of_equal_predictions_is_zero():
    logits = torch.randn(5, 7, dtype=torch.float64)
    assert soft_target_kl(logits, logits + 4.0, 3.0).abs() < 1e-14


def test_soft_target_kl_of_different_predictions_is_positive():
    logits, targets = torch.randn(2, 50, 7, dtype=torch.float64)
    assert all(soft_target_kl(a[None], b[None], 2.0) > 0 for a, b in zip(logits, targets, strict=True))


def test_soft_target_kl_does_not_see_a_constant_on_the_logits():
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    shifted = soft_target_kl(logits + torch.randn(5, 1), targets - torch.randn(5, 1), 3.0)
    assert torch.isclose(shifted, soft_target_kl(logits, targets, 3.0), rtol=1e-12)


def test_soft_target_kl_in_the_limit_of_a_high_temperature():
    # T^2 KL -> half the variance over the classes of the difference of the logits (Hinton et al., section 2.1).
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    limit = 0.5 * (targets - logits).var(dim=1, unbiased=False).mean()
    assert torch.isclose(soft_target_kl(logits, targets, 1e4), limit, rtol=1e-3)


def test_the_target_gets_a_gradient_only_when_it_is_not_detached():
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    logits, targets = logits.requires_grad_(), targets.requires_grad_()
    soft_target_kl(logits, targets, 3.0).backward()
    assert targets.grad is None
    assert logits.grad.any()
    soft_target_kl(logits, targets, 3.0, detach=False).backward()
    assert targets.grad.any()


def test_gradient_of_soft_target_kl():
    # d/dlogits of T^2 KL is T (softmax(logits / T) - softmax(targets / T)) / batch.
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_target_kl(logits, targets, 3.0), logits)
    torch.testing.assert_close(gradient, 3 * ((logits / 3).softmax(1) - (targets / 3).softmax(1)) / 5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
def test_gradcheck(epsilon):
    logits, targets = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    inputs = (logits.clone().requires_grad_(), targets.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: soft_target_kl(a, b, 3.0, False, epsilon), inputs)
    assert torch.autograd.gradcheck(lambda a, b: mixture_logits([a, b], 3.0), inputs)


def test_soft_target_kl_stays_finite_with_sure_predictions():
    logits = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    value = soft_target_kl(logits, -logits.detach(), 1.0)
    value.backward()
    assert torch.allclose(value, torch.tensor(600.0))
    assert logits.grad.isfinite().all()


def test_mixture_logits_have_the_mean_of_the_softened_probabilities():
    members = torch.randn(3, 5, 7, dtype=torch.float64)
    mixture = mixture_logits(list(members), 3.0)
    torch.testing.assert_close((mixture / 3).softmax(1), (members / 3).softmax(2).mean(0))
    torch.testing.assert_close((mixture / 3).exp().sum(1), torch.ones(5, dtype=torch.float64))


def test_mixture_and_mean_differ():
    # softmax(Z1) and softmax(Z2) by hand: their mean for class 0 is (.7856 + .3315) / 2.
    mixture = mixture_logits([Z1, Z2], 1.0).softmax(1)[0, 0]
    assert math.isclose(mixture, (math.exp(-0.2413113) + math.exp(-1.10413061)) / 2, abs_tol=1e-7)
    assert not torch.isclose(mixture, ZA.softmax(1)[0, 0], atol=1e-3)


def test_groups_do_not_depend_on_the_order():
    members = list(torch.randn(3, 5, 7, dtype=torch.float64))
    torch.testing.assert_close(mean_logits(members[::-1]), mean_logits(members))
    torch.testing.assert_close(mixture_logits(members[::-1], 3.0), mixture_logits(members, 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_is_computed(dtype):
    logits, targets = torch.randn(2, 5, 7).to(dtype)
    labels = torch.tensor([0, 1, 2, 3, 4])
    for value, wide in [
        (cross_entropy(logits, labels), cross_entropy(logits.float(), labels)),
        (soft_target_kl(logits, targets, 3.0), soft_target_kl(logits.float(), targets.float(), 3.0)),
        (mean_logits([logits, targets]), mean_logits([logits.float(), targets.float()])),
        (mixture_logits([logits, targets], 3.0), mixture_logits([logits.float(), targets.float()], 3.0)),
    ]:
        assert value.dtype == torch.float32
        assert torch.equal(value, wide)


def test_soft_cross_entropy_by_hand():
    # At T = 3 the target is (3/4, 1/4) and the prediction (9/10, 1/10); the second image has both at (1/2, 1/2).
    target = torch.tensor([[3 * math.log(3), 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    logits = torch.tensor([[3 * math.log(9), 0.0], [4.0, 4.0]], dtype=torch.float64, requires_grad=True)
    value = soft_cross_entropy(logits, target, 3.0)
    expected = (-0.75 * math.log(0.9) - 0.25 * math.log(0.1) + math.log(2)) / 2
    assert value.item() == pytest.approx(expected, abs=1e-12)
    value.backward()
    assert target.grad is None
    # (softmax(logits / T) - target) / T, over two images
    torch.testing.assert_close(logits.grad, torch.tensor([[0.15, -0.15], [0.0, 0.0]], dtype=torch.float64) / 6)


def test_squared_distance_by_hand():
    values = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]], requires_grad=True)
    target = torch.zeros(2, 2, 2, requires_grad=True)
    assert squared_distance(values, target).item() == pytest.approx((5 + 9) / 2)
    squared_distance(values, target).backward()
    assert target.grad is None
    assert torch.equal(values.grad, values.detach())
    squared_distance(values, target, detach=False).backward()
    assert torch.equal(target.grad, -values.detach())
    assert squared_distance(values.bfloat16(), target.bfloat16()).dtype == torch.float32
