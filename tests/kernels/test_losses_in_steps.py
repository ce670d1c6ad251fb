"""Where the fused losses compute, in training steps and captured graphs, and where stock ones do."""

import pytest
import torch
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
from . import (
    DEVICE,
    INTERPRETED,
    compiled_sizes,
    compiles,
    needs_a_gpu,
    run_in_the_interpreter,
    runs_kernels,
    starts_the_interpreter,
)
from .loss_cases import SMALL, Case

pytest.importorskip("triton")


@starts_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


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


@runs_kernels
def test_bits_repeat_and_nothing_is_read_by_the_host():
    case = Case(SMALL, torch.bfloat16)
    first = (*case.cross_entropy(True), *case.divergence(True))
    with tiny.HostReads() as reads:
        again = (*case.cross_entropy(True), *case.divergence(True))
    if not INTERPRETED:  # which reads everything
        assert reads.found == []
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@needs_a_gpu
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


@compiles
def test_the_kernels_compile_for_an_h100_where_there_is_none(tmp_path):
    sizes = compiled_sizes(COMPILED_FOR_AN_H100, tmp_path)
    assert len(sizes) == 8 and min(sizes) > 1000
