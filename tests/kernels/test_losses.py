"""The fused losses against stock ones, on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill import losses as stock
from codistill.kernels import losses_of

from . import assert_near, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from .loss_cases import NEAR, SMALL, Case, leaves

pytest.importorskip("triton")
# No head axis, one to four heads, two axes of heads; 1 class, powers of two and others.
HEADS = st.sampled_from([(), (1,), (2,), (3,), (4,), (2, 2)])
SHAPES = st.tuples(HEADS, st.integers(1, 7), st.sampled_from([1, 2, 3, 10, 32, 33, 100, 130])).map(
    lambda parts: (*parts[0], *parts[1:])
)


@starts_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture
def no_stock_losses(monkeypatch):
    """Nothing falls back to stock losses unseen."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the stock loss was computed")

    monkeypatch.setattr(stock.F, "log_softmax", fail)


@runs_kernels
def test_the_kernels_are_what_computes(no_stock_losses):
    case = Case(SMALL)
    case.cross_entropy(fused=True)
    case.divergence(fused=True)
    with pytest.raises(AssertionError, match="the stock loss was computed"):
        case.cross_entropy(fused=False)


@runs_kernels
@settings(deadline=None, max_examples=25, derandomize=True)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_cross_entropy_and_its_gradient_are_those_of_float64(shape, seed):
    case = Case(shape, seed=seed)
    assert_near(case.cross_entropy(True), case.cross_entropy(False), NEAR)


@runs_kernels
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shape=SHAPES,
    seed=st.integers(0, 99),
    temperature=st.floats(1.0, 8.0),
    detach=st.booleans(),
    epsilon=st.sampled_from([0.0, 1e-7, 1e-2]),
)
def test_divergence_and_its_gradients_are_those_of_float64(shape, seed, temperature, detach, epsilon):
    case, how = Case(shape, seed=seed), (temperature, detach, epsilon)
    assert_near(case.divergence(True, *how), case.divergence(False, *how), NEAR)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SMALL, (4, 33)])
def test_short_floats_are_widened_and_gradients_rounded_once(dtype, shape):
    case = Case(shape, dtype)
    entropy, divergence = case.cross_entropy(True), case.divergence(True, epsilon=1e-7)
    assert [each.dtype for each in (*entropy, *divergence)] == [torch.float32, dtype, torch.float32, dtype, dtype]
    expected = case.cross_entropy(False), case.divergence(False, epsilon=1e-7)
    for (loss, *gradients), (wanted, *others) in zip((entropy, divergence), expected, strict=True):
        assert_near((loss,), (wanted,), NEAR)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=torch.finfo(dtype).eps, atol=1e-5)


@runs_kernels
def test_each_side_has_its_own_type(no_stock_losses):
    case = Case(SMALL)
    case.logits = case.logits.bfloat16()
    assert [each.dtype for each in case.divergence(True)] == [torch.float32, torch.bfloat16, torch.float32]


@runs_kernels
@pytest.mark.parametrize("classes", [257, 1000, 4096])
def test_many_classes(classes, no_stock_losses, monkeypatch):
    case = Case((2, 2, classes))
    entropy, divergence = case.cross_entropy(True), case.divergence(True)
    monkeypatch.undo()
    assert_near(entropy, case.cross_entropy(False), NEAR)
    assert_near(divergence, case.divergence(False), NEAR)


@runs_kernels
def test_equal_scores_and_equal_sides():
    case = Case(SMALL)
    case.logits = torch.full_like(case.logits, 2.0)
    case.targets = case.logits.clone()
    loss, gradient = case.cross_entropy(True)
    torch.testing.assert_close(loss, torch.full_like(loss, 10.0).log())
    assert_near((loss, gradient), case.cross_entropy(False), NEAR)
    assert all(float(each.abs().max()) < NEAR for each in case.divergence(True))


@runs_kernels
@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_extreme_scores_do_not_overflow(temperature):
    case = Case(SMALL)
    case.logits = 1e4 * case.logits.sign()
    case.targets = 1e4 * case.targets.sign()
    found, expected = case.cross_entropy(True), case.cross_entropy(False)
    assert float(expected[0].max()) > 1000
    assert_near(found, expected, NEAR)
    for how in ({}, {"epsilon": 1e-7}, {"epsilon": 1e-7, "detach": True}):
        assert_near(case.divergence(True, temperature, **how), case.divergence(False, temperature, **how), NEAR)


@runs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_visible_in_their_head_alone(bad, dtype):
    case = Case(SMALL, dtype)
    case.logits[1, 2, 3] = bad
    for loss, gradient, *_ in (case.cross_entropy(True), case.divergence(True), case.divergence(True, epsilon=1e-7)):
        assert loss.isfinite().tolist() == [True, False, True]
        assert not gradient[1, 2].isfinite().any()
        assert gradient[[0, 2]].isfinite().all()
    case = Case(SMALL, dtype)
    case.targets[2, 0, 0] = bad
    for loss, *gradients in (case.divergence(True), case.divergence(True, epsilon=1e-7)):
        assert loss.isfinite().tolist() == [True, True, False]
        assert all(not each[2, 0].isfinite().any() and each[:2].isfinite().all() for each in gradients)


@runs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
def test_minus_infinity_is_what_it_is_in_stock_losses():
    case = Case(SMALL)
    case.labels[2] = 3
    case.logits[1, 2, 3] = case.logits[0, 1, (int(case.labels[1]) + 1) % 10] = float("-inf")
    case.logits[2, 4] = float("-inf")
    for one, other in zip(case.cross_entropy(True), case.cross_entropy(False), strict=True):
        torch.testing.assert_close(one.double(), other, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert case.divergence(True)[0].isfinite().tolist() == case.divergence(False)[0].isfinite().tolist() == [False] * 3


@runs_kernels
def test_a_label_that_is_no_class_is_seen():
    for label in (-1, 10, 40):
        case = Case(SMALL)
        case.labels[2] = label
        assert case.cross_entropy(True)[0].isnan().all()


@runs_kernels
def test_any_layout_is_taken(no_stock_losses):
    case = Case(SMALL)
    expected = (*case.cross_entropy(True), *case.divergence(True))
    case.logits, case.targets = (
        each.transpose(0, 2).contiguous().transpose(0, 2) for each in (case.logits, case.targets)
    )
    case.labels = torch.stack([case.labels, case.labels], dim=1)[:, 0]
    assert not case.logits.is_contiguous() and not case.targets.is_contiguous() and not case.labels.is_contiguous()
    found = (*case.cross_entropy(True), *case.divergence(True))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@runs_kernels
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("expanded", [True, False])
def test_a_target_that_all_heads_have_in_common(detach, expanded):
    from codistill.kernels.losses import FUSED

    case = Case(SMALL)
    shared = case.targets[0].clone()
    case.targets = shared.expand(SMALL).contiguous()
    loss, gradient, *targets_gradient = case.divergence(True, detach=detach)
    logits, shared = case.logits.clone().requires_grad_(), shared.requires_grad_()
    found = FUSED.soft_target_kl(logits, shared.expand(SMALL) if expanded else shared, 3.0, detach, 0.0)
    wanted = [logits] if detach else [logits, shared]
    gradients = torch.autograd.grad(found, wanted, case.gradient)
    assert torch.equal(found, loss) and torch.equal(gradients[0], gradient)
    if not detach:
        torch.testing.assert_close(gradients[1], targets_gradient[0].sum(dim=0))


@runs_kernels
def test_behind_detach_the_target_gets_no_gradient():
    case = Case(SMALL)
    logits, targets = leaves(True, case.logits, case.targets)
    with losses_of("fused"):
        stock.soft_target_kl(logits, targets, 3.0).sum().backward()
    assert targets.grad is None and logits.grad is not None
    with losses_of("fused"):
        assert not stock.soft_target_kl(logits.detach(), targets, 3.0).requires_grad
        # The other way round: only the target learns.
        stock.soft_target_kl(logits.detach(), targets, 3.0, detach=False).sum().backward()
    expected = torch.autograd.grad(stock.soft_target_kl(logits.detach(), targets, 3.0, False).sum(), targets)
    torch.testing.assert_close(targets.grad, expected[0], rtol=1e-4, atol=1e-6)
