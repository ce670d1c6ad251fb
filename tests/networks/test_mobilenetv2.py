import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Cohort
from codistill.networks import network
from codistill.networks.mobilenetv2 import InvertedResidual
from codistill.networks.network import parameter_count
from codistill.networks.probe import probe_shapes

from .conftest import norm

POINTS = ("head", "last-block")
TRUNK_SHAPES = [(32, 32, 32), (16, 32, 32), (24, 32, 32), (32, 16, 16), (64, 8, 8), (96, 8, 8)]


@pytest.mark.parametrize("point", POINTS)
def test_counts_and_split(point, on_meta):
    built = on_meta(f"mobilenetv2:feature_point={point}", 10)
    assert parameter_count(built) == 2_296_922
    assert parameter_count(on_meta(f"mobilenetv2:feature_point={point}", 100)) == 2_296_922 + 90 * 1281
    assert parameter_count(built.stages[:-1]) == 550_928
    assert parameter_count(built.stages[-1]) + parameter_count(built.head) == 1_745_994


def test_the_shortcuts_that_the_paper_lacks(on_meta):
    blocks = [layer for layer in on_meta("mobilenetv2", 10).modules() if isinstance(layer, InvertedResidual)]
    widened = [block.shortcut for block in blocks if isinstance(block.shortcut, nn.Sequential)]
    assert len(blocks) == 17
    assert len(widened) == 4
    assert sum(map(parameter_count, widened)) == 59_152
    assert 2_296_922 - 59_152 == 2_237_770


@pytest.mark.parametrize("point", POINTS)
def test_two_branches_on_one_trunk(point, on_meta):
    cohort = Cohort([on_meta(f"mobilenetv2:feature_point={point}", 10) for _ in range(2)])
    assert parameter_count(cohort) == 4_042_916


def test_stage_shapes(on_meta):
    assert probe_shapes(on_meta("mobilenetv2", 10), (32, 32)) == [*TRUNK_SHAPES, (1280, 4, 4)]
    assert probe_shapes(on_meta("mobilenetv2:feature_point=last-block", 10), (32, 32)) == [*TRUNK_SHAPES, (320, 4, 4)]


def test_both_feature_points_are_one_network(shaken):
    images = torch.randn(2, 3, 32, 32)
    logits = []
    for point in POINTS:
        torch.manual_seed(3)
        built = shaken(network(f"mobilenetv2:feature_point={point}", 10))
        with torch.no_grad():
            logits.append(built(images))
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("point", "fix"),
    [("Head", "mean head"), ("last_block", "mean last-block"), ("320", "choose from head, last-block")],
)
def test_unknown_feature_points_are_refused(point, fix):
    with pytest.raises(UsageError, match=f"feature_point is '{point}': .*{fix}"):
        network(f"mobilenetv2:feature_point={point}", 10)


@pytest.mark.parametrize(("in_channels", "stride"), [(8, 1), (4, 1), (4, 2), (8, 2)])
def test_block_against_the_formula(in_channels, stride, shaken):
    block = shaken(InvertedResidual(in_channels, 8, 6, stride))
    hidden = 6 * in_channels
    x = torch.randn(2, in_channels, 6, 6)
    y = F.relu(norm(block.bn1, F.conv2d(x, block.conv1.weight)))
    y = F.relu(norm(block.bn2, F.conv2d(y, block.conv2.weight, stride=stride, padding=1, groups=hidden)))
    y = norm(block.bn3, F.conv2d(y, block.conv3.weight))
    if stride == 1 and in_channels == 8:
        y = y + x
    elif stride == 1:
        y = y + norm(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight))
    torch.testing.assert_close(block(x), y)
    assert (y < 0).any()
