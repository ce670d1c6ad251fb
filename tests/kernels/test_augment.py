"""The fused augmentation against the stock one, to the same bits, on a GPU or else in Triton's interpreter."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codistill.data import Split
from codistill.data.augment import Augmentation, Batch, DeviceImages, epoch_plan
from codistill.execution import Execution
from codistill.optim import make_optimizer
from codistill.step import PlainStep

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

pytest.importorskip("triton")
# Products that a fused multiplication and addition would round differently, and a shift that is not 0.
STATISTICS = ((0.3, 0.5, 0.6), (0.2, 0.25, 0.3))
MODES = st.sampled_from(["zeros", "reflect"])


@starts_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def images_of(count: int, height: int, width: int) -> DeviceImages:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8), rng.integers(0, 9, count))
    return DeviceImages(split, STATISTICS, DEVICE)


def every_offset(padding: int, images: int) -> Batch:
    """Each offset with and without a flip; the images in turn."""
    steps = range(2 * padding + 1)
    top, left, mirror = map(torch.tensor, zip(*itertools.product(steps, steps, (False, True)), strict=True))
    return on_device(Batch(torch.arange(len(top)) % images, top, left, mirror))


def on_device(batch: Batch) -> Batch:
    return Batch(*(table.to(DEVICE) for table in batch))


def assert_same(images: DeviceImages, batch: Batch, augmentation: Augmentation) -> None:
    from codistill.kernels.augment import augmented

    found, expected = augmented(images, batch, augmentation), images.augmented(batch, augmentation)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        assert bits(one).equal(bits(other))


def bits(values: Tensor) -> Tensor:
    """Tell -0 from 0."""
    return values.view(torch.int32) if values.is_floating_point() else values


@runs_kernels
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (9, 5)])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_every_offset_gives_the_bits_of_the_stock_function(size, padding, mode):
    assert_same(images_of(7, *size), every_offset(padding, 7), Augmentation(padding=padding, padding_mode=mode))


@runs_kernels
@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(padding_mode="reflect", flip=False)])
def test_images_that_take_several_programs(augmentation):
    # 32 x 32: three full ones. The other: two, the second one not full.
    for size in ((32, 32), (19, 27)):
        assert_same(
            images_of(9, *size), on_device(epoch_plan(9, 1, 0, augmentation, torch.device("cpu"))), augmentation
        )


@runs_kernels
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    count=st.integers(1, 9),
    padding=st.integers(0, 24),
    mode=MODES,
    data=st.data(),
)
def test_any_tables_of_any_shape(size, count, padding, mode, data):
    def table(largest: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(st.integers(0, largest), min_size=count, max_size=count)))

    tables = (table(4), table(2 * padding), table(2 * padding), table(1).bool())
    assert_same(images_of(5, *size), on_device(Batch(*tables)), Augmentation(padding=padding, padding_mode=mode))


@runs_kernels
def test_parts_of_tables_and_tables_with_gaps():
    images, augmentation = images_of(12, 6, 7), Augmentation(padding=2)
    plan = on_device(epoch_plan(12, 0, 0, augmentation, torch.device("cpu")))
    assert_same(images, plan.part(3, 8), augmentation)
    assert_same(images, Batch(*(table[1::3] for table in plan)), augmentation)


@runs_kernels
def test_every_pixel_value_at_once():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    split = Split(np.repeat(values, 3, axis=3), np.array([4]))
    statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    nothing = Batch(*(torch.zeros(1, dtype=kind) for kind in (torch.int64,) * 3 + (torch.bool,)))
    assert_same(DeviceImages(split, statistics, DEVICE), on_device(nothing), Augmentation(padding=0))


@runs_kernels
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a CPU gives memory only once it is written")
def test_more_than_two_gibibytes_of_images():
    count = 2**31 // (32 * 32 * 3) + 5
    pixels = np.zeros((count, 32, 32, 3), np.uint8)
    pixels[-1] = np.random.default_rng(0).integers(1, 256, (32, 32, 3))
    images = DeviceImages(Split(pixels, np.arange(count)), STATISTICS, DEVICE)
    batch = Batch(torch.tensor([count - 1, 0]), torch.tensor([1, 2]), torch.tensor([3, 0]), torch.tensor([True, False]))
    assert_same(images, batch, Augmentation(padding=2))


@runs_kernels
@pytest.mark.parametrize("views", [1, 2])
def test_a_step_sees_the_images_and_labels_of_stock_kernels(monkeypatch, views):
    seen = {}
    for kernels in ("stock", "fused"):
        method, data = tiny.method().to(DEVICE).train(), tiny.data()
        images, augmentation = DeviceImages(data.train, data.statistics, DEVICE), Augmentation(padding=2)
        step = PlainStep(
            method, images, augmentation, make_optimizer(method, 0.1, 0.9, True, 0.0), execution=Execution(kernels)
        )
        taken = seen.setdefault(kernels, [])
        # The loss is of no interest here, and the tiny method takes one view.
        losses = {"ce": next(method.parameters()).sum()}
        monkeypatch.setattr(step, "terms", lambda *given, taken=taken, losses=losses: taken.extend(given[:2]) or losses)
        if kernels == "fused":
            monkeypatch.setattr(DeviceImages, "augmented", None)
        plan = on_device(epoch_plan(24, 0, 0, augmentation, torch.device("cpu"), views))
        step(plan.part(5, 16), torch.tensor(0.5, device=DEVICE))
    assert seen["fused"][0].shape == (*((views,) if views > 1 else ()), 11, 3, 8, 8) and len(seen["fused"][1]) == 11
    for one, other in zip(seen["fused"], seen["stock"], strict=True):
        assert bits(one).equal(bits(other)) and one.stride() == other.stride()


@runs_kernels
@pytest.mark.skipif(INTERPRETED, reason="the interpreter reads everything")
def test_nothing_is_read_by_the_host():
    from codistill.kernels.augment import augmented

    images, augmentation = images_of(12, 6, 7), Augmentation(padding=2)
    plan = on_device(epoch_plan(12, 0, 0, augmentation, torch.device("cpu")))
    with tiny.HostReads() as reads:
        augmented(images, plan, augmentation)
    assert reads.found == []


@needs_a_gpu
def test_a_captured_graph_follows_its_tables():
    from codistill.kernels.augment import augmented

    images, augmentation = images_of(12, 6, 7), Augmentation(padding=2)
    plan = on_device(epoch_plan(12, 0, 0, augmentation, torch.device("cpu")))
    augmented(images, plan.part(1, 5), augmentation)  # compiles, for tables wherever they lie
    static = Batch(*(table.clone() for table in plan.part(0, 4)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = augmented(images, static, augmentation)
    for start in (8, 3):
        for table, new in zip(static, plan.part(start, start + 4), strict=True):
            table.copy_(new)
        graph.replay()
        for one, other in zip(found, images.augmented(static, augmentation), strict=True):
            assert bits(one).equal(bits(other))


COMPILED_FOR_AN_H100 = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from codistill.kernels.augment import crop

POINTERS = {"images": "*u8", "mirror_in": "*u8", "scale": "*fp32", "shift": "*fp32", "result": "*fp32"}
for reflected, fused in ((False, False), (True, False), (False, True)):
    constants = {"HEIGHT": 32, "WIDTH": 32, "PADDING": 4, "REFLECTED": reflected, "BLOCK_VALUES": 1024}
    types = {each: "constexpr" if each in constants else POINTERS.get(each, "*i64") for each in crop.arg_names}
    source = ASTSource(crop, types, constants)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fused})
    print(len(built.asm["cubin"]), built.asm["ptx"].count("fma.rn.f32"))
"""


@compiles
def test_the_kernel_compiles_for_an_h100_and_does_not_fuse_what_stock_kernels_round_twice(tmp_path):
    numbers = compiled_sizes(COMPILED_FOR_AN_H100, tmp_path)
    sizes, fused = numbers[::2], numbers[1::2]
    assert len(sizes) == 3 and min(sizes) > 1000
    # It is the option that makes the difference.
    assert fused[:2] == [0, 0] and fused[2]
