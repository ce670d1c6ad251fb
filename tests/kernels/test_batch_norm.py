"""The fused batch normalisation against stock layers, on a GPU where there is one, else in Triton's interpreter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import codistill as cd
from codistill.errors import UsageError
from codistill.kernels import install_fused, use_fused
from codistill.networks import network
from codistill.networks.network import Layers, conv_bn, initialise
from codistill.networks.resnet import BasicBlock

from .. import tiny
from . import (
    DEVICE,
    INTERPRETED,
    assert_near,
    compiled_sizes,
    compiles,
    needs_a_gpu,
    run_in_the_interpreter,
    runs_kernels,
    starts_the_interpreter,
)

pytest.importorskip("triton")
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)).filter(
    lambda shape: shape[0] * shape[2] * shape[3] > 1
)


@starts_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


class Case:
    """Random activations, parameters and statistics of one shape, and a gradient for the result.

    Values are about 10 with a deviation of 2: a mean far from 0 is where careless variances go wrong.
    """

    def __init__(
        self, shape: tuple[int, ...], skipped: bool, activated: bool, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        channels = shape[1]
        self.activated = activated
        self.features = (random(*shape) * 2 + 10).to(dtype).contiguous(memory_format=torch.channels_last)
        self.skipped = random(*shape).to(dtype).contiguous(memory_format=torch.channels_last) if skipped else None
        self.gradient = random(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
        self.weight, self.bias = random(channels), random(channels)
        self.mean, self.var = random(channels), random(channels) ** 2

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        given = (self.features, self.weight, self.bias, self.skipped)
        return [each.to(DEVICE, dtype, copy=True).requires_grad_() for each in given if each is not None]

    def fused(self) -> tuple[Tensor, ...]:
        """Result, mean, variance, gradients of features, weight, bias and shortcut."""
        from codistill.kernels.batch_norm import batch_norm_relu

        inputs = self.inputs()
        running = [each.to(DEVICE, copy=True) for each in (self.mean, self.var)]
        skipped = inputs[3] if self.skipped is not None else None
        result = batch_norm_relu(*inputs[:3], *running, skipped, self.activated, momentum=0.3, eps=1e-3)
        return (result.detach(), *running, *torch.autograd.grad(result, inputs, self.gradient.to(DEVICE)))

    def stock(self) -> tuple[Tensor, ...]:
        """The same in float64."""
        inputs = self.inputs(torch.float64)
        mean, var = (each.to(DEVICE, torch.float64) for each in (self.mean, self.var))
        result = F.batch_norm(inputs[0], mean, var, inputs[1], inputs[2], True, momentum=0.3, eps=1e-3)
        result = result + inputs[3] if self.skipped is not None else result
        result = F.relu(result) if self.activated else result
        return (
            result.detach(),
            mean,
            var,
            *torch.autograd.grad(result, inputs, self.gradient.to(DEVICE).double()),
        )


@runs_kernels
@settings(deadline=None, max_examples=8, derandomize=True)
@given(shape=SHAPES, skipped=st.booleans(), activated=st.booleans(), seed=st.integers(0, 99))
def test_values_statistics_and_gradients_are_those_of_float64(shape, skipped, activated, seed):
    case = Case(shape, skipped, activated, seed=seed)
    assert_near(case.fused(), case.stock(), 2e-5)


@runs_kernels
@pytest.mark.parametrize(("skipped", "activated"), [(True, True), (False, True), (True, False), (False, False)])
def test_several_parts_blocks_and_tiles(monkeypatch, skipped, activated):
    from codistill.kernels import batch_norm_tiling

    # Three parts of two tiles each, the last one not full; two blocks of channels, the last one not full.
    monkeypatch.setattr(batch_norm_tiling, "MAX_PARTS", 3)
    monkeypatch.setattr(batch_norm_tiling, "MIN_TILE", 64 * 8)
    monkeypatch.setattr(batch_norm_tiling, "MAX_TILE", 64 * 8)
    case = Case((5, 70, 3, 3), skipped, activated)
    tiling = batch_norm_tiling.Tiling.of(case.features)
    assert tiling.grid == (3, 2) and tiling.part_rows == 2 * tiling.block_rows == 16
    assert_near(case.fused(), case.stock(), 2e-5)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_rounded_once(dtype):
    case = Case((4, 16, 8, 8), skipped=True, activated=True, dtype=dtype)
    found, expected = case.fused(), case.stock()
    assert [each.dtype for each in found] == [
        dtype,
        *(torch.float32,) * 2,
        dtype,
        *(torch.float32,) * 2,
        dtype,
    ]
    torch.testing.assert_close(found[0], expected[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)
    # Where rounding makes 0 of a small value its gradient is lost, as in stock layers.
    assert_near(found[1:3], expected[1:3], 1e-5)
    assert_near(found[3:], expected[3:], 4 * torch.finfo(dtype).eps)


@runs_kernels
def test_bits_repeat():
    case = Case((3, 40, 5, 5), skipped=True, activated=True)
    first = case.fused()
    for _ in range(2):
        for one, other in zip(case.fused(), first, strict=True):
            assert torch.equal(one, other)


@runs_kernels
def test_variance_survives_a_mean_ten_thousand_times_as_large():
    case = Case((8, 4, 8, 8), skipped=False, activated=False)
    case.features = case.features + 20_000
    # The inputs themselves have a spacing of 2e-3 here.
    assert_near(case.fused()[:1], case.stock()[:1], 2e-3)


@runs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_infinity_stay_visible():
    for bad in (float("nan"), float("inf")):
        case = Case((4, 3, 4, 4), skipped=True, activated=True)
        case.features[1, 2, 0, 0] = bad
        result, mean, *_ = case.fused()
        assert not result[:, 2].isfinite().any() and result[:, :2].isfinite().all()
        assert mean.isfinite().tolist() == [True, True, False]


@runs_kernels
def test_any_layout_and_unlike_types_are_taken():
    case = Case((3, 6, 5, 4), skipped=True, activated=True)
    expected = case.fused()
    case.features, case.gradient = case.features.contiguous(), case.gradient.contiguous()
    case.skipped = case.skipped.double()
    for one, other in zip(case.fused(), expected, strict=True):
        assert torch.equal(one.to(other.dtype), other)


@runs_kernels
def test_what_the_kernels_do_not_know_is_refused():
    from codistill.kernels.batch_norm import batch_norm_relu

    case = Case((1, 5, 1, 1), skipped=False, activated=True)
    running = (case.mean, case.var)
    before = case.mean.clone()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_relu(case.features, case.weight, case.bias, *running)
    with pytest.raises(TypeError, match=r"not torch.float64 with torch.float32"):
        batch_norm_relu(case.features.double(), case.weight, case.bias, *running)
    assert torch.equal(case.mean, before)


@runs_kernels
def test_a_network_trains_as_with_stock_layers_and_nothing_is_read_by_the_host():
    def build() -> Layers:
        torch.manual_seed(0)
        block = Layers(*conv_bn(4, 4, 3), nn.ReLU(), *conv_bn(4, 4, 3))
        initialise(block)
        return block.to(DEVICE, memory_format=torch.channels_last).train()

    stock, fused = build(), build()
    names = list(fused.state_dict())
    assert install_fused(fused) == 2
    images = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    results = []
    with tiny.HostReads() as reads:
        for block in (stock, fused):
            result = block(images, images)
            result.square().mean().backward()
            results.append(result.detach())
    if not INTERPRETED:  # which reads everything
        assert reads.found == []
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert list(fused.state_dict()) == names
    torch.testing.assert_close(fused.state_dict(), stock.state_dict(), rtol=1e-4, atol=1e-5)
    for one, other in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    # Evaluation is that of stock layers, to the bit.
    fused.load_state_dict(stock.state_dict())
    assert torch.equal(fused.eval()(images, images), stock.eval()(images, images))


class Additions(TorchDispatchMode):
    """Count the additions of maps, which autograd makes where a map has two gradients."""

    count = 0

    def __torch_dispatch__(self, operator, types, given=(), named=None):
        if operator in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and given[0].dim() == 4:
            self.count += 1
        return operator(*given, **(named or {}))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("skipped", "activated"), [(True, True), (False, True), (True, False), (False, False)])
def test_gradients_of_layers_and_shortcut_are_added_to_the_bits_of_autograd(skipped, activated, dtype):
    from codistill.kernels.batch_norm import batch_norm_relu

    case = Case((4, 5, 6, 3), skipped, activated, dtype)
    gradients, additions = [], []
    for together in (True, False):
        inputs, running = case.inputs(), [each.to(DEVICE, copy=True) for each in (case.mean, case.var)]
        first = batch_norm_relu(*inputs[:3], *running, inputs[3] if skipped else None, activated)
        layers, shortcut = first * 1.5, first if together else first.view_as(first)
        result = batch_norm_relu(layers, *inputs[1:3], *running, shortcut)
        with Additions() as counted:
            gradients.append(torch.autograd.grad(result, inputs, case.gradient.to(DEVICE)))
        additions.append(counted.count)
    assert additions == [0, 1]
    if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter cuts off instead of rounding
        assert_near(*gradients, 4 * torch.finfo(dtype).eps)
        return
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@runs_kernels
def test_a_map_with_one_gradient_or_changed_before_it_is_a_shortcut():
    from codistill.kernels.batch_norm import batch_norm_relu

    case = Case((3, 4, 5, 2), skipped=True, activated=True)

    def gradients(change, layers, shortcut) -> tuple[Tensor, ...]:
        inputs, running = case.inputs(), [each.to(DEVICE, copy=True) for each in (case.mean, case.var)]
        first = change(batch_norm_relu(*inputs[:3], *running, inputs[3], activated=False))
        result = batch_norm_relu(layers(first), *inputs[1:3], *running, shortcut(first))
        return torch.autograd.grad(result, inputs, case.gradient.to(DEVICE))

    def same(each: Tensor) -> Tensor:
        return each

    constant = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for change, layers in ((same, lambda each: constant), (lambda each: each.mul_(3), lambda each: each * 1.5)):
        found, expected = gradients(change, layers, same), gradients(change, layers, lambda each: each.view_as(each))
        for one, other in zip(found, expected, strict=True):
            assert other.abs().max() > 0 and torch.equal(one, other)


@runs_kernels
def test_blocks_train_as_with_stock_layers_and_leave_no_gradients_for_autograd_to_add():
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        blocks = nn.Sequential(Layers(*conv_bn(3, 4, 3), nn.ReLU()), *(BasicBlock(4, 4, 1, "B") for _ in range(2)))
        initialise(blocks)
        return blocks.to(DEVICE, memory_format=torch.channels_last).train()

    stock, fused = build(), build()
    install_fused(fused)
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results, additions = [], []
    for blocks in (stock, fused):
        results.append(blocks(images.contiguous(memory_format=torch.channels_last)))
        loss = results[-1].square().mean()
        with Additions() as counted:
            loss.backward()
        additions.append(counted.count)
    assert additions == [2, 0]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet20", "resnet83-bottleneck", "wrn-16-2", "densenet-40-12", "mobilenetv2"])
def test_every_normalisation_of_a_network_is_within_reach(name):
    built = network(name, 3)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in built.modules())
    assert install_fused(built) == norms


def test_what_cannot_be_fused_is_said():
    with pytest.raises(UsageError, match="kernels fused: they need a CUDA device, not cpu: use --kernels stock"):
        use_fused(network("resnet20", 3), torch.device("cpu"))


@pytest.mark.parametrize(
    "kind", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=lambda kind: next(iter(kind))
)
def test_a_normalisation_that_the_kernels_do_not_know_stays_stock(kind):
    layers = Layers(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, **kind), nn.ReLU()).to(DEVICE)
    images = torch.randn(4, 3, 5, 5).to(DEVICE)
    expected = copy.deepcopy(layers)(images)
    assert install_fused(layers) == 0
    assert torch.equal(layers(images), expected)


@needs_a_gpu
def test_a_captured_graph_repeats_the_bits_of_the_plain_calls():
    from codistill.kernels.batch_norm import batch_norm_relu

    case = Case((16, 16, 8, 8), skipped=True, activated=True)
    expected = case.fused()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        inputs, gradient = case.inputs(), case.gradient.to(DEVICE)
        running = [each.to(DEVICE, copy=True) for each in (case.mean, case.var)]
        start = [each.clone() for each in running]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = batch_norm_relu(*inputs[:3], *running, inputs[3], True, momentum=0.3, eps=1e-3)
            gradients = torch.autograd.grad(result, inputs, gradient)
        for _ in range(2):
            for each, value in zip(running, start, strict=True):
                each.copy_(value)
            graph.replay()
    torch.cuda.synchronize()
    for one, other in zip((result, *running, *gradients), expected, strict=True):
        assert torch.equal(one, other)


COMPILED_FOR_AN_H100 = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from codistill.kernels import batch_norm_passes

NUMBERS = {"rows": "i32", "channels": "i32", "part_rows": "i32", "momentum": "fp32", "eps": "fp32"}
MAPS = ("features", "skipped", "result", "gradient", "added", "skipped_gradient", "feature_gradient")
SIZES = {"BLOCK_PARTS": 128, "BLOCK_ROWS": 64, "BLOCK_CHANNELS": 16}
for name, skipped in (
    ("part_statistics", True), ("normalise", True), ("part_gradients", True), ("input_gradient", True),
    ("part_gradients", False), ("input_gradient", False),
):
    kernel = getattr(batch_norm_passes, name)
    constants = {each: SIZES.get(each, skipped if each == "HAS_SKIPPED" else True)
                 for each in kernel.arg_names if each.isupper()}
    types = {each: "constexpr" if each in constants else NUMBERS.get(each, "*bf16" if each in MAPS else "*fp32")
             for each in kernel.arg_names}
    print(len(compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


@compiles
def test_the_kernels_compile_for_an_h100_where_there_is_none(tmp_path):
    sizes = compiled_sizes(COMPILED_FOR_AN_H100, tmp_path)
    assert len(sizes) == 6 and min(sizes) > 1000


@starts_the_interpreter
def test_on_a_cpu_a_method_that_was_trained_with_fused_kernels_computes_as_with_stock_ones():
    method = tiny.method(cd.MFEF, students=2).train()
    stock = copy.deepcopy(method)
    install_fused(method)
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(method(images).fused_logits, stock(images).fused_logits)
    layers = Layers(*conv_bn(3, 4, 3), nn.ReLU())
    expected = copy.deepcopy(layers)(images)
    assert install_fused(layers) == 1
    assert torch.equal(layers(images), expected)
