"""Fused kernels in captured steps, on streams of their own: on a GPU, or on one that is not there."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch

import codistill as cd
from codistill.data.augment import Augmentation, DeviceImages, epoch_plan
from codistill.device import set_up_gpu
from codistill.execution import Execution
from codistill.methods import METHODS
from codistill.networks.resnet import basic_resnet
from codistill.optim import make_optimizer
from codistill.step import CapturedFleet, PlainStep

from .. import tiny
from ..pretended_gpu import pretended
from ..pretended_gpu.interpreter import interpreting
from . import INTERPRETED, run_in_the_interpreter, runs_kernels, starts_the_interpreter

pytest.importorskip("triton")
CUDA = torch.device("cuda")


@starts_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture
def gpu() -> Iterator[None]:
    with contextlib.ExitStack() as opened:
        if INTERPRETED:
            opened.enter_context(interpreting(opened.enter_context(pretended())))
        set_up_gpu(CUDA, deterministic=True)
        opened.callback(torch.use_deterministic_algorithms, False)
        yield


def method(name: str) -> cd.Method:
    torch.manual_seed(0)
    return METHODS[name]([basic_resnet(3, (4, 6), 1, "B") for _ in range(2)], 3, image_size=(8, 8))


def member(kind: cd.Method, execution: Execution, images: DeviceImages, precision: str) -> PlainStep:
    trained = copy.deepcopy(kind)
    execution.prepare(trained, CUDA, deterministic=True)
    trained.to(CUDA, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(trained, 0.05, 0.9, True, 1e-4)
    return PlainStep(trained, images, Augmentation(padding=1), optimizer, precision, execution=execution)


@runs_kernels
@pytest.mark.parametrize(("name", "precision", "runs"), [("mfef", "bf16", 1), ("dml", "float32", 2)])
def test_captured_steps_with_overlap_end_as_plain_ones(gpu, name, precision, runs):
    data = tiny.data()
    images = DeviceImages(data.train, data.statistics, CUDA)
    kind, progress = method(name), torch.full((), 0.5, device=CUDA)
    plain = [member(kind, Execution("fused"), images, precision) for _ in range(runs)]
    members = [member(kind, Execution("fused", overlap=True), images, precision) for _ in range(runs)]
    fleet = CapturedFleet(members, warm_up=1)
    plans = [epoch_plan(len(images), seed, 0, Augmentation(padding=1), CUDA) for seed in range(runs)]
    for start in (0, 4, 8):
        batches = [plan.part(start, start + 4) for plan in plans]
        fleet(batches, progress)
        for step, batch in zip(plain, batches, strict=True):
            step(batch, progress)
    torch.cuda.synchronize()
    for one, other in zip(members, plain, strict=True):
        assert one.sums.means() == other.sums.means()
        for key, value in one.method.state_dict().items():
            assert torch.equal(value.cpu(), other.method.state_dict()[key].cpu()), key
