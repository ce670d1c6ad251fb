"""The accounting of a step against the tables that it was derived from by hand, and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import codistill as cd
from codistill.roofline import MACHINES, machine_of, roofline

from . import tiny

# Batch 128, 10 classes: parameters, MFLOP forward, kB an image (floor, fused, eager), kernels (likewise), additive ms.
TABLE = {
    "resnet20": (272_474, 81.6, (3_158, 6_795, 8_565), (74, 166, 366), 0.63),
    "resnet32": (466_906, 138.2, (4_993, 10_695, 13_611), (111, 253, 563), 0.97),
    "resnet56": (855_770, 251.5, (8_663, 18_493, 23_704), (185, 427, 957), 1.65),
    "resnet110": (1_730_714, 506.3, (16_921, 36_041, 46_412), (353, 819, 1846), 3.20),
    "wrn-16-2": (691_674, 202.2, (4_567, 9_449, 11_383), (58, 124, 262), 0.68),
    "wrn-40-2": (2_243_546, 655.2, (11_907, 25_965, 31_568), (132, 308, 656), 1.81),
    "densenet-40-12-plain": (1_019_722, 529.6, (33_185, 74_308, 95_790), (133, 371, 708), 3.96),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    parameters, mflop, kilobytes, kernels, milliseconds = TABLE[name]
    work = roofline(cd.network(name, 10))
    assert work.parameters == parameters
    assert work.forward_flop / 1e6 == pytest.approx(mflop, rel=1e-3)
    assert [moved / 1e3 for moved in work.bytes_per_image] == pytest.approx(kilobytes, rel=5e-3)
    assert list(work.kernels) == pytest.approx(kernels, rel=1e-2)
    assert work.milliseconds(128, MACHINES["H100"]) == pytest.approx(milliseconds, rel=1e-2)


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-2", "densenet-40-12", "mobilenetv2", "resnet20:shortcut=A"])
def test_operations_are_those_of_torchs_counter(name):
    network = cd.network(name, 10).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(4, 3, 32, 32, device="meta"))
    assert roofline(network).forward_flop == counter.get_total_flops() / 4


def students(count: int, name: str = "resnet20") -> list[cd.Network]:
    return [cd.network(name, 10) for _ in range(count)]


def test_a_shared_trunk_counts_once():
    alone = roofline(cd.network("resnet20", 10))
    shared = roofline(cd.Independent(students(2), 10, cd.Independent.Settings(shared_stages=3)))
    apart = roofline(cd.Independent(students(2), 10, cd.Independent.Settings(shared_stages=0)))
    assert apart.forward_flop == 2 * alone.forward_flop
    assert apart.parameters == 2 * alone.parameters
    assert apart.bytes_per_image.fused == 2 * alone.bytes_per_image.fused
    # The step's own kernels (augmentation, optimiser) come once.
    assert alone.kernels.fused < apart.kernels.fused < 2 * alone.kernels.fused
    branch = cd.network("resnet20", 10).stages[3]
    with FlopCounterMode(display=False) as counter:
        branch.to("meta")(torch.empty(1, 32, 16, 16, device="meta"))
    assert shared.forward_flop == alone.forward_flop + counter.get_total_flops() + 2 * 64 * 10
    for level in ("floor", "fused", "eager"):
        costs = [getattr(each.bytes_per_image, level) for each in (alone, shared, apart)]
        assert costs == sorted(costs) and len(set(costs)) == 3


def test_modules_of_a_method_count():
    plain, mfef = roofline(cd.FFL(students(2), 10)), roofline(cd.MFEF(students(2), 10))
    assert mfef.forward_flop > plain.forward_flop
    assert mfef.kernels.floor > plain.kernels.floor and mfef.kernels.eager > plain.kernels.eager
    assert mfef.milliseconds(128, MACHINES["H100"]) > plain.milliseconds(128, MACHINES["H100"])


def test_a_view_for_each_student():
    method = cd.KDCL([tiny.network(3), tiny.network(3)], 3, cd.KDCL.Settings(shared_stages=0), image_size=(8, 8))
    one, two = roofline(method, (8, 8)), roofline(method, (8, 8), views=2)
    assert method.views == 2 and one.kernels == two.kernels and one.forward_flop == two.forward_flop


def test_the_network_stays_as_it_is():
    network = cd.network("resnet20", 10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.eval()
    roofline(network)
    assert not network.training and network.head.linear.weight.device.type == "cpu"
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_floor_grows_with_the_batch_and_falls_with_the_bandwidth():
    work = roofline(cd.network("resnet20", 10))
    h100, h200 = MACHINES["H100"], MACHINES["H200"]
    launches = 1000 * work.kernels.fused * h100.kernel_seconds
    small, large = work.milliseconds(128, h100), work.milliseconds(256, h100)
    weights = 1000 * work.parameters * 28 / h100.bytes_per_second
    assert large - launches - weights == pytest.approx(2 * (small - launches - weights))
    assert launches < work.milliseconds(128, h200) < small
    assert machine_of("NVIDIA H100 80GB HBM3") is h100 and machine_of("NVIDIA H200") is h200
    assert machine_of("NVIDIA A100-SXM4-80GB") is None
