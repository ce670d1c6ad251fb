"""Chains of small operations: stock PyTorch is the reference of each, and what runs without a compiler."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

from codistill.modules import MULTISCALE, DualAttention
from codistill.networks.chains import Compiler, compiled_chains
from codistill.networks.layers import BatchNormAct2d, conv_bn_act
from codistill.networks.resnet import BasicBlock
from codistill.training.compiling import compiler, missing_compiler

from ..faults.running import in_child


class Uncompiled(Compiler):
    """Leaves the functions of chains as they are."""

    def __init__(self) -> None:
        super().__init__({})

    def compile(self, function, arguments):
        return function


PLAIN = Uncompiled()
SIZES = [(4, 3, 5, 5), (2, 8, 4, 6), (3, 1, 2, 2), (5, 6, 1, 1)]


def norm(channels: int, act: bool, dtype: torch.dtype = torch.float64) -> BatchNormAct2d:
    made = BatchNormAct2d(channels, act).to(dtype)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias)
    return made


def results(module: nn.Module, *inputs: Tensor, gradient: Tensor) -> list[Tensor]:
    given = [each.clone().requires_grad_() for each in inputs]
    output = module(*given)
    output.backward(gradient)
    parameters = [parameter.grad for parameter in module.parameters()]
    return [output.detach(), *(each.grad for each in given), *parameters, *(each.clone() for each in module.buffers())]


def compare(module: nn.Module, *inputs: Tensor, by: Compiler = PLAIN, **tolerance: float) -> None:
    stock, chained = module, copy.deepcopy(module)
    gradient = torch.randn_like(stock(*(each.clone() for each in inputs)))
    stock = copy.deepcopy(chained)
    expected = results(stock, *inputs, gradient=gradient)
    with compiled_chains(by):
        found = results(chained, *inputs, gradient=gradient)
    assert not by.failed
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_normalisation_addition_and_relu(size, act, shortcut, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    inputs = [torch.randn(size, dtype=torch.float64).to(memory_format=layout) for _ in range(1 + shortcut)]
    compare(norm(size[1], act), *inputs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "norm": True, "kernel_size": 3}, {"kind": "spatial-channel"}, {"kind": "channel"}]
)
def test_dual_attention(channels_last, options):
    module = DualAttention(8, reduction=2, **options).double()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(3, 8, 5, 6, dtype=torch.float64).to(memory_format=layout)
    features[0, :2, :2] = 3.0  # ties: the gradient goes to one place
    compare(module, features, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MULTISCALE)
def test_multi_scale_blocks(name):
    compare(MULTISCALE[name](8).double(), torch.randn(3, 8, 5, 6, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [(4, 4, 1), (4, 6, 2)])
def test_a_block_whose_input_has_a_second_use(channels):
    stem = conv_bn_act(3, 4, 3)
    blocks = nn.Sequential(stem, BasicBlock(*channels, "B"), BasicBlock(channels[1], channels[1], 1, "B")).double()
    added = count_additions(blocks.train())
    compare(blocks, torch.randn(3, 3, 6, 6, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    with compiled_chains(PLAIN):
        assert count_additions(blocks) < added  # those of gradients are in the chains


def count_additions(module: nn.Module) -> int:
    """Count gradient additions: nodes that get a gradient from two others."""
    reached: dict[object, int] = {}
    waiting, seen = [module(torch.randn(3, 3, 6, 6, dtype=torch.float64)).sum().grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, number in node.next_functions:
            reached[following, number] = reached.get((following, number), 0) + 1
            waiting.append(following)
    return sum(count > 1 for (node, _), count in reached.items() if node is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_values_far_from_zero(dtype):
    features = (100 + torch.randn(8, 4, 6, 6, dtype=torch.float64)).to(dtype)
    module = norm(4, act=False, dtype=torch.float32)
    exact = copy.deepcopy(module).double()(features.double())
    with compiled_chains(PLAIN):
        chained = module(features)
    close = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(chained.double(), exact, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_runs_in_evaluation_without_a_compiler_after_a_failure_and_where_it_must(dtype):
    features = torch.randn(4, 3, 5, 5, dtype=dtype)
    module = norm(3, act=True, dtype=torch.float32)
    failed = Compiler({})
    failed.failed = True
    for by, changed in ((None, {}), (failed, {}), (PLAIN, {"momentum": None}), (PLAIN, {"training": False})):
        stock = copy.deepcopy(module)
        for name, value in changed.items():
            setattr(stock, name, value)
        expected = copy.deepcopy(stock)(features)
        with contextlib.nullcontext() if by is None else compiled_chains(by):
            assert torch.equal(stock(features), expected)
            assert stock(features).grad_fn.name() != "_NormActBackward"


def test_chains_are_off_where_a_user_compiles_a_module_himself():
    module = norm(3, act=True, dtype=torch.float32)
    with compiled_chains(PLAIN):
        code = torch.compile(module, backend="eager")
        expected = copy.deepcopy(module)
        with compiled_chains(Uncompiled()):
            output = code(torch.ones(4, 3, 5, 5))
    torch.testing.assert_close(output, expected(torch.ones(4, 3, 5, 5)))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_this_machine(dtype, monkeypatch, tmp_path):
    if missing_compiler(torch.device("cpu")) is not None:
        pytest.skip("no compiler here")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    features = torch.randn(4, 16, 6, 6).to(memory_format=torch.channels_last)

    def both(module: nn.Module, by: Compiler) -> list[Tensor]:
        with compiled_chains(by), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            given = features.clone().requires_grad_()
            output = module(given)
            output.float().square().sum().backward()
        assert not by.failed
        return [output.detach().float(), given.grad, *(parameter.grad for parameter in module.parameters())]

    module = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), BasicBlock(16, 16, 1, "B"), DualAttention(16))
    module.to(memory_format=torch.channels_last).train()

    def compared() -> int:
        first, second = (both(copy.deepcopy(module), each) for each in (PLAIN, compiler("cpu", 1, False)))
        for one, other in zip(first, second, strict=True):
            scale = one.abs().max()
            torch.testing.assert_close(other / scale, one / scale, **close)
        return 0

    # In a fork: where the compiler has run, autograd no longer works in forks, which other tests make.
    assert in_child(compared) == 0
