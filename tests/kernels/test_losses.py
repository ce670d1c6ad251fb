"""The fused losses against stock ones, on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import codistill as cd
from codistill import losses as stock
from codistill.data.augment import Augmentation, Batch, DeviceImages, epoch_plan
from codistill.execution import Execution
from codistill.kernels import losses_of
from codistill.losses import LossKernels, computed_by
from codistill.optim import make_optimizer
from codistill.step import PlainStep
from codistill.teacher import Taught

from .. import tiny

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
runs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETED, reason="runs in a process of its own, see the test of the interpreter"
)
# No head axis, one to four heads, two axes of heads; 1 class, powers of two and others.
HEADS = st.sampled_from([(), (1,), (2,), (3,), (4,), (2, 2)])
SHAPES = st.tuples(HEADS, st.integers(1, 7), st.sampled_from([1, 2, 3, 10, 32, 33, 100, 130])).map(
    lambda parts: (*parts[0], *parts[1:])
)
SMALL = (3, 5, 10)
# A GPU's exp and log are approximate, and the factor T^2 is up to 64.
NEAR = 2e-5 if INTERPRETED else 1e-4


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="runs here")
def test_in_the_interpreter():
    # The interpreter has to be chosen before Triton is imported, and would be in the way of everything else.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


class Case:
    """Random logits of n heads, targets and labels, and a gradient for each head's loss."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 3.0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.logits = (random(*shape) * size).to(DEVICE, dtype)
        self.targets = (random(*shape) * size).to(DEVICE, dtype)
        self.labels = torch.randint(shape[-1], shape[-2:-1], generator=generator).to(DEVICE)
        self.gradient = random(*shape[:-2]).to(DEVICE)

    def cross_entropy(self, fused: bool) -> tuple[Tensor, ...]:
        """Loss and gradient of the logits; stock ones in float64."""
        (logits,) = leaves(fused, self.logits)
        with losses_of("fused" if fused else "stock"):
            loss = stock.cross_entropy(logits, self.labels)
        return loss.detach(), *torch.autograd.grad(loss, logits, self.gradient.to(loss.dtype))

    def divergence(
        self, fused: bool, temperature: float = 3.0, detach: bool = False, epsilon: float = 0.0
    ) -> tuple[Tensor, ...]:
        """Loss and gradients of logits and, unless it is detached, target; stock ones in float64."""
        logits, targets = leaves(fused, self.logits, self.targets)
        with losses_of("fused" if fused else "stock"):
            loss = stock.soft_target_kl(logits, targets, temperature, detach, epsilon)
        gradients = torch.autograd.grad(loss, [logits, targets], self.gradient.to(loss.dtype), allow_unused=True)
        assert (gradients[1] is None) is detach
        return loss.detach(), *(each for each in gradients if each is not None)


def leaves(fused: bool, *tensors: Tensor) -> list[Tensor]:
    return [each.to(each.dtype if fused else torch.float64, copy=True).requires_grad_() for each in tensors]


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], *tolerances: float) -> None:
    """Compare with what differs at most by a tolerance times the largest value, at least 1; the last one repeats."""
    tolerances += tolerances[-1:] * (len(expected) - len(tolerances))
    assert len(found) == len(expected)
    for one, other, tolerance in zip(found, expected, tolerances, strict=True):
        assert one.shape == other.shape
        assert bool(one.isfinite().all())
        size = other.abs().max().clamp_min(1.0)
        assert float(((one.double() - other).abs().max() / size).item()) < tolerance


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


@runs_kernels
def test_bits_repeat_and_nothing_is_read_by_the_host():
    case = Case(SMALL, torch.bfloat16)
    first = (*case.cross_entropy(True), *case.divergence(True))
    with tiny.HostReads() as reads:
        again = (*case.cross_entropy(True), *case.divergence(True))
    if not INTERPRETED:  # which reads everything
        assert reads.found == []
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@runs_kernels
def test_what_the_kernels_do_not_know_is_left_to_stock_losses():
    from codistill.kernels import losses as fused

    many, none, integers = torch.zeros(1, 1, 4097), torch.zeros(2, 0, 3), torch.zeros(1, 2, 3, dtype=torch.int32)
    case = Case((2, 4, 3))
    for logits in (case.logits.double(), *(each.to(DEVICE) for each in (many, none, integers))):
        assert not fused.takes(logits) and not fused.takes(case.logits, logits)
        for call in (
            lambda logits=logits: fused.cross_entropy(logits, case.labels),
            lambda logits=logits: fused.soft_target_kl(case.logits, logits, 3.0),
        ):
            with pytest.raises(TypeError, match="fused losses take float32, bfloat16 or float16 on CUDA"):
                call()
    assert fused.takes(case.logits)
    with losses_of("fused"):
        assert stock.cross_entropy(case.logits.double(), case.labels).dtype == torch.float64
        assert stock.soft_target_kl(case.logits, case.targets.double(), 3.0).dtype == torch.float64
        doubled = case.logits.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda logits: stock.cross_entropy(logits, case.labels), doubled)


def made(name: str) -> cd.Method:
    torch.manual_seed(0)
    kinds = {"mfef": cd.MFEF, "dml": cd.DML, "kd": cd.KD, "one": cd.ONE, "okddip": cd.OKDDip}
    settings = {"ramp_up": 0.0} if name != "kd" else {}
    if name in ("one", "okddip"):
        settings["target_epsilon"] = 1e-7
    method = tiny.method(kinds[name], students=3, **settings)
    return Taught(method, tiny.network(3)) if name == "kd" else method


@runs_kernels
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["mfef", "dml", "kd", "one", "okddip"])
def test_a_training_step_is_that_of_stock_losses(name, precision, monkeypatch):
    augmentation, data = Augmentation(padding=2), tiny.data()
    states, means, calls = [], [], []
    for kernels in ("stock", "fused"):
        method = made(name).to(DEVICE).train()
        optimizer = make_optimizer(method, 0.05, 0.9, True, 0.01)
        images = DeviceImages(data.train, data.statistics, DEVICE)
        step = PlainStep(method, images, augmentation, optimizer, precision, execution=Execution(kernels))
        plan = epoch_plan(24, 0, 0, augmentation, DEVICE, method.views)
        if kernels == "fused":
            monkeypatch.setattr(stock.F, "log_softmax", watched(stock.F.log_softmax, calls))
        step(Batch(*(table[..., :6] for table in plan)), torch.tensor(0.5, device=DEVICE))
        states.append(method.state_dict())
        means.append(step.sums.means())
    # OKDDip's own mixtures are stock.
    assert bool(calls) is (name == "okddip")
    assert means[1] == pytest.approx(means[0], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-5 if precision == "float32" else 1e-3)


def watched(function, calls):
    def call(*arguments, **named):
        calls.append(function)
        return function(*arguments, **named)

    return call


def test_the_switch_holds_within_its_block_alone():
    case = Case((2, 4, 3))
    seen = []

    def took(*logits: Tensor) -> bool:
        seen.append(len(logits))
        return logits[0].dtype == torch.float32

    mark = torch.full((2,), 7.0)
    kernels = LossKernels(took, lambda logits, labels: mark, lambda *arguments: mark + len(arguments))
    with computed_by(kernels):
        assert torch.equal(stock.cross_entropy(case.logits, case.labels).cpu(), mark)
        assert torch.equal(stock.soft_target_kl(case.logits, case.targets, 3.0).cpu(), mark + 5)
        assert stock.cross_entropy(case.logits.double(), case.labels).dtype == torch.float64
        with losses_of("stock"):
            assert not torch.equal(stock.cross_entropy(case.logits, case.labels).cpu(), mark)
        assert torch.equal(stock.cross_entropy(case.logits, case.labels).cpu(), mark)
        assert seen == [1, 2, 1, 1]
        with pytest.raises(KeyError), computed_by(None):
            raise KeyError
        assert torch.equal(stock.cross_entropy(case.logits, case.labels).cpu(), mark)
    assert not torch.equal(stock.cross_entropy(case.logits, case.labels).cpu(), mark)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes a CPU's tensors")
def test_a_cpu_has_stock_losses():
    case = Case((2, 4, 3))
    logits, labels, targets = case.logits.cpu(), case.labels.cpu(), case.targets.cpu()
    with losses_of("fused"):
        found = stock.cross_entropy(logits, labels), stock.soft_target_kl(logits, targets, 3.0)
    expected = stock.cross_entropy(logits, labels), stock.soft_target_kl(logits, targets, 3.0)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.gpu(real=True)
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
def test_a_captured_graph_repeats_the_bits_of_the_plain_calls():
    case = Case((3, 128, 100), torch.bfloat16)

    def compute() -> tuple[Tensor, ...]:
        return *case.cross_entropy(True), *case.divergence(True, epsilon=1e-7), *case.divergence(True, detach=True)

    expected = compute()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = compute()
        for _ in range(2):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# The sizes of 1, which Triton makes constants of, are a batch of 1 and a single row of labels or targets.
COMPILED_FOR_AN_H100 = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from codistill.kernels import losses_passes

NUMBERS = {"classes": "i32", "label_rows": "i32", "target_rows": "i32", "batch": "i32", "labels": "*i64"}
NUMBERS |= {"temperature": "fp32", "epsilon": "fp32", "scale": "fp32"}
MAPS = ("logits", "targets", "logits_gradient", "targets_gradient")
for ones in ({}, {"label_rows": 1, "target_rows": 1, "batch": 1, "classes": 1}):
    for name in ("cross_entropy_rows", "cross_entropy_gradient", "divergence_rows", "divergence_gradients"):
        kernel = getattr(losses_passes, name)
        constants = {each: {"BLOCK_CLASSES": 128}.get(each, True) for each in kernel.arg_names if each.isupper()}
        constants |= {each: value for each, value in ones.items() if each in kernel.arg_names}
        types = {each: "constexpr" if each in constants else NUMBERS.get(each, "*bf16" if each in MAPS else "*fp32")
                 for each in kernel.arg_names}
        compiled = compile(ASTSource(kernel, types, constants), GPUTarget("cuda", 90, 32), {"num_warps": 1})
        print(len(compiled.asm["cubin"]))
"""


@pytest.mark.skipif(INTERPRETED, reason="compiles, outside the interpreter")
def test_the_kernels_compile_for_an_h100_where_there_is_none(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILED_FOR_AN_H100]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 8 and all(int(size) > 1000 for size in done.stdout.split())
