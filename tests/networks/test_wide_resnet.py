import pytest
import torch
import torch.nn.functional as F

from codistill.methods.cohort import Cohort
from codistill.networks import network
from codistill.networks.network import parameter_count
from codistill.networks.probe import probe_shapes
from codistill.networks.wide_resnet import PreActivationBlock

from .conftest import norm

COUNTS = {
    "wrn-16-1": (175_066, 180_916),
    "wrn-40-1": (563_930, 569_780),
    "wrn-16-2": (691_674, 703_284),
    "wrn-40-2": (2_243_546, 2_255_156),
}
# The last one includes the final batch normalisation.
STAGES = {
    "wrn-16-2": [432, 32_992, 131_520, 525_184 + 256],
    "wrn-40-2": [432, 107_232, 427_456, 1_706_880 + 256],
}
TWO_BRANCHES = {"wrn-16-2": 1_241_624, "wrn-40-2": 3_975_192}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name, on_meta):
    assert tuple(parameter_count(on_meta(name, num_classes)) for num_classes in (10, 100)) == COUNTS[name]


@pytest.mark.parametrize("name", STAGES)
def test_stage_counts(name, on_meta):
    assert [parameter_count(stage) for stage in on_meta(name, 10).stages] == STAGES[name]


@pytest.mark.parametrize("name", TWO_BRANCHES)
def test_two_branches_on_one_trunk(name, on_meta):
    cohort = Cohort([on_meta(name, 100) for _ in range(2)])
    assert cohort.shared_stages == 3
    assert parameter_count(cohort) == TWO_BRANCHES[name]


@pytest.mark.parametrize("name", COUNTS)
def test_stage_shapes(name, on_meta):
    width = 16 * int(name[-1])
    shapes = [(16, 32, 32), (width, 32, 32), (2 * width, 16, 16), (4 * width, 8, 8)]
    assert probe_shapes(on_meta(name, 10), (32, 32)) == shapes


def test_the_feature_map_is_behind_the_final_normalisation_and_relu(shaken):
    built = shaken(network("wrn-16-2", 10))
    images = torch.randn(2, 3, 32, 32)
    blocks, final = built.stages[-1]
    with torch.no_grad():
        raw = blocks(built.stages[2](built.stages[1](built.stages[0](images))))
        assert (raw < 0).any()
        torch.testing.assert_close(built.feature_map(images), F.relu(norm(final, raw)))


@pytest.mark.parametrize(("in_channels", "stride"), [(8, 1), (4, 1), (4, 2)])
def test_block_against_the_formula(in_channels, stride, shaken):
    block = shaken(PreActivationBlock(in_channels, 8, stride))
    x = torch.randn(2, in_channels, 6, 6)
    o1 = F.relu(norm(block.bn1, x))
    y = F.conv2d(o1, block.conv1.weight, stride=stride, padding=1)
    z = F.conv2d(F.relu(norm(block.bn2, y)), block.conv2.weight, padding=1)
    skipped = x if in_channels == 8 else F.conv2d(o1, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), z + skipped)
