"""The fused dual attention against stock layers, on a GPU where there is one, else in Triton's interpreter."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codistill.forward import TrainingForward
from codistill.kernels import install_fused
from codistill.modules import DualAttention
from codistill.modules import attention as stock_attention
from codistill.networks.network import Layers

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
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))


@starts_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


class Case:
    """Attention with random weights of usual size, a map, and a gradient for the result."""

    def __init__(
        self,
        shape: tuple[int, ...],
        reduction: int = 4,
        kernel: int = 7,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.attention = DualAttention(shape[1], reduction, kernel, bias)
        for weight in self.attention.parameters():
            values = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
            weight.data = values.to(DEVICE, weight_dtype)
        self.features, self.gradient = (
            torch.randn(shape, generator=generator).to(DEVICE, dtype, memory_format=torch.channels_last)
            for _ in range(2)
        )

    def run(self, fused: bool) -> tuple[Tensor, ...]:
        """Give result and gradients of map and weights: of the kernels, or of stock layers in float64."""
        attention, features = copy.deepcopy(self.attention), self.features.clone()
        if fused:
            assert install_fused(attention) == 1 and attention.attend is not DualAttention.attend
        else:
            attention, features = attention.double(), features.double()
        result = attention(features.requires_grad_())
        inputs = [features, *attention.parameters()]
        return (result.detach(), *torch.autograd.grad(result, inputs, self.gradient.to(result.dtype)))


@runs_kernels
@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    shape=SHAPES,
    reduction=st.integers(1, 16),
    kernel=st.sampled_from([1, 3, 5, 7]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_float64(shape, reduction, kernel, bias, seed):
    case = Case(shape, reduction, kernel, bias, seed=seed)
    assert_near(case.run(fused=True), case.run(fused=False), 1e-5)


@runs_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "reduction", "kernel"),
    [((3, 10, 7, 5), 4, 7), ((2, 8, 1, 1), 8, 3), ((2, 64, 8, 8), 16, 7), ((1, 1, 3, 1), 1, 1), ((2, 6, 16, 15), 6, 7)],
    ids=["odd map", "one place", "as trained", "one channel", "several chunks"],
)
def test_shapes_that_are_powers_of_two_and_others(shape, reduction, kernel, bias):
    case = Case(shape, reduction, kernel, bias)
    assert_near(case.run(fused=True), case.run(fused=False), 1e-5)


@runs_kernels
def test_more_images_than_a_program_adds_up_at_a_time(monkeypatch):
    from codistill.kernels import attention

    monkeypatch.setattr(attention, "SUMMED_IMAGES", 4)
    case = Case((9, 4, 2, 3))
    assert_near(case.run(fused=True), case.run(fused=False), 1e-5)


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_short_floats_are_rounded_once(dtype, weight_dtype):
    case = Case((4, 32, 8, 8), bias=True, dtype=dtype, weight_dtype=weight_dtype)
    found, expected = case.run(fused=True), case.run(fused=False)
    assert [each.dtype for each in found] == [dtype] * 2 + [weight_dtype] * 5
    for one, other in zip(found, expected, strict=True):
        exact = 1e-5 * float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=torch.finfo(one.dtype).eps, atol=exact)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_type_is_that_of_stock_layers_in_autocast(dtype):
    case = Case((2, 8, 4, 4), dtype=dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        stock = stock_attention.attended(case.features, case.attention)
        assert install_fused(case.attention) == 1
        fused = case.attention(case.features)
    assert fused.dtype == stock.dtype == dtype
    torch.testing.assert_close(fused, stock, rtol=0.02, atol=0.02)


@runs_kernels
def test_the_gradient_of_a_maximum_goes_to_the_first_of_equals():
    # All values are equal, so all that the places and channels have of their own is the maxima's gradient.
    case = Case((1, 6, 3, 4), kernel=1, bias=True)
    case.features = torch.full_like(case.features, 0.5)
    case.gradient = torch.ones_like(case.gradient)
    for weight in case.attention.channel.parameters():
        weight.data.fill_(0.25)
    found, expected = case.run(fused=True), case.run(fused=False)
    assert_near(found, expected, 1e-6)
    places = found[1][0].flatten(1)
    assert (places[:, 0] != places[:, 1]).all() and (places[:, 1:] == places[:, 1:2]).all()
    assert (places[0] != places[1]).all() and torch.equal(places[1], places[5])


@runs_kernels
def test_bits_repeat():
    case = Case((3, 20, 5, 5), bias=True)
    first = case.run(fused=True)
    for _ in range(2):
        assert all(map(torch.equal, case.run(fused=True), first))


@runs_kernels
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_infinity_stay_visible_and_in_their_image():
    for bad in (float("nan"), float("inf"), float("-inf")):
        case = Case((3, 5, 3, 3))
        case.features[1, 2, 1, 0] = bad
        found, expected = case.run(fused=True), case.run(fused=False)
        assert torch.equal(found[0].isnan(), expected[0].isnan()) and found[0][1].isnan().any()
        assert_near(found[0][[0, 2]].split(1), expected[0][[0, 2]].split(1), 1e-5)
        assert all(each.isnan().any() for each in found[2:])
    case = Case((2, 5, 3, 3))
    case.attention.channel[0].weight.data[0, 0] = float("nan")
    assert all(each.isnan().any() for each in case.run(fused=True))


@runs_kernels
def test_any_layout_is_taken_and_gradients_lie_as_weights_do():
    from codistill.kernels.attention import dual_attention

    case = Case((3, 6, 5, 4), kernel=3)
    expected = case.run(fused=True)
    # An optimizer, and the cast of all gradients together, would copy what lies otherwise.
    for layout in (torch.channels_last, torch.contiguous_format):
        case.attention.to(memory_format=layout)
        case.features, case.gradient = case.features.contiguous(), case.gradient.contiguous()
        found = case.run(fused=True)
        assert_near(found, expected, 1e-6)
        assert [each.stride() for each in found[2:]] == [each.stride() for each in case.attention.parameters()]
    # Every second element of larger tensors.
    weights = [torch.stack([each.detach()] * 2, -1)[..., 0].requires_grad_() for each in case.attention.parameters()]
    assert not any(each.is_contiguous() for each in weights)
    result = dual_attention(case.features, *weights)
    gradients = torch.autograd.grad(result, weights, case.gradient)
    assert_near((result, *gradients), (expected[0], *expected[2:]), 1e-6)


@runs_kernels
def test_what_the_kernels_do_not_know_is_refused():
    from codistill.kernels.attention import dual_attention

    case = Case((1, 8, 4, 4))
    weights = [each.detach() for each in case.attention.parameters()]
    with pytest.raises(TypeError, match=r"not torch.float64 with torch.float32"):
        dual_attention(case.features.double(), *weights)
    with pytest.raises(TypeError, match=r"with torch.bfloat16, torch.float32"):
        dual_attention(case.features, weights[0].bfloat16(), *weights[1:])
    with pytest.raises(ValueError, match=r"too large for fused attention: Sizes\(channels=8, .* height=17, width=16"):
        dual_attention(torch.zeros(1, 8, 17, 16, device=DEVICE), *weights)


@runs_kernels
@pytest.mark.parametrize(
    ("shape", "norm", "training"),
    [
        ((1, 8, 17, 16), False, True),
        ((1, 270, 6, 6), False, True),
        ((2, 8, 3, 3), True, True),
        ((2, 8, 3, 3), False, False),
    ],
    ids=["places", "channels", "norm", "evaluation"],
)
def test_what_stays_stock_does_so_to_the_bit(shape, norm, training):
    from codistill.kernels.attention import attended

    torch.manual_seed(0)
    attention = DualAttention(shape[1], norm=norm).to(DEVICE).train(training)
    features = torch.randn(shape).to(DEVICE)
    expected = copy.deepcopy(attention)(features)
    attention.attend = attended
    assert torch.equal(attention(features), expected)


def test_what_is_installed_is_counted():
    assert install_fused(nn.Sequential(DualAttention(4), DualAttention(4, norm=True))) == 1
    assert install_fused(nn.Sequential(DualAttention(4), Layers(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))) == 2
    assert install_fused(DualAttention(4, norm=True)) == 0


@runs_kernels
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_of_mfef_is_that_of_stock_layers_and_nothing_is_read_by_the_host(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which stock convolutions would use
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    labels, progress = torch.arange(6, device=DEVICE) % 3, torch.tensor(1.0, device=DEVICE)
    methods, terms = [tiny.method().to(DEVICE, memory_format=torch.channels_last).train() for _ in range(2)], []
    stock, fused = methods
    names = list(fused.state_dict())
    attentions = [each for each in fused.modules() if isinstance(each, DualAttention)]
    assert install_fused(fused) > len(attentions) == 2
    with tiny.HostReads() as reads:
        for method in methods:
            losses = method.losses(TrainingForward(method, precision)(images), labels, progress)
            torch.stack(list(losses.values())).sum().backward()
            terms.append(losses)
    if not INTERPRETED:  # which reads everything
        assert reads.found == []
    tolerance = 1e-4 if precision == "float32" else 0.05
    torch.testing.assert_close(terms[1], terms[0], rtol=tolerance, atol=tolerance)
    assert list(fused.state_dict()) == names
    pairs = zip(fused.named_parameters(), stock.parameters(), strict=True)
    for (name, one), other in pairs:
        assert one.grad.dtype == torch.float32
        distance = float((one.grad - other.grad).norm() / other.grad.norm().clamp_min(1e-3))
        assert distance < (1e-3 if precision == "float32" else 0.3), name
    # Evaluation is that of stock layers, to the bit.
    fused.load_state_dict(stock.state_dict())
    evaluated = [method.eval()(images).logits[0] for method in methods]
    assert torch.equal(*evaluated)


@needs_a_gpu
def test_a_captured_graph_repeats_the_bits_of_the_plain_calls():
    case = Case((128, 64, 8, 8), dtype=torch.bfloat16)
    expected = case.run(fused=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = case.run(fused=True)
        for _ in range(2):
            graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))


COMPILED_FOR_AN_H100 = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from codistill.kernels import attention_gradients, attention_passes
from codistill.kernels.attention import Sizes

MAPS = ("features", "result", "gradient", "feature_gradient")
SUMS = ("channel_gates", "spatial", "partial")
NUMBERS = ("images", "numbers", "channels", "hidden", "height", "width", "plane_stride", "row_stride", "column_stride")
blocks = Sizes(channels=128, hidden=8, height=8, width=8, kernel=7).blocks
warps = blocks.pop("num_warps")
blocks |= {"HAS_BIAS": True, "BLOCK_KERNEL": 64, "BLOCK_IMAGES": 128, "BLOCK_NUMBERS": 32}
# A number that is 1 is compiled in.
for ones in ((), ("hidden", "width", "column_stride", "images")):
    for kernel in (attention_passes.attend, attention_gradients.attend_backward, attention_passes.sum_over_images):
        constants = {each: blocks.get(each, 1) for each in kernel.arg_names if each.isupper() or each in ones}
        types = {each: "i32" if each in NUMBERS else "*bf16" if each in MAPS else "*fp32" if each in SUMS else "*bf16"
                 for each in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, types, constants)
        print(len(compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["cubin"]))
"""


@compiles
def test_the_kernels_compile_for_an_h100_where_there_is_none(tmp_path):
    sizes = compiled_sizes(COMPILED_FOR_AN_H100, tmp_path)
    assert len(sizes) == 6 and min(sizes) > 1000
