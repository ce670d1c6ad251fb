import pytest
import torch
import torch.nn.functional as F

from codistill.networks.network import parameter_count
from codistill.networks.probe import probe_shapes
from codistill.networks.resnet_bottleneck import Bottleneck

from .conftest import norm

# For 10 and 100 classes. By formula; the second and the third are printed as 1.14M / 1.17M and 1.70M in papers.
COUNTS = {
    "resnet83-bottleneck": (869_530, 892_660),
    "resnet110-bottleneck": (1_147_738, 1_170_868),
    "resnet164-bottleneck": (1_704_154, 1_727_284),
}
BLOCKS = {"resnet83-bottleneck": 9, "resnet110-bottleneck": 12, "resnet164-bottleneck": 18}


def formula(blocks: int, classes: int) -> int:
    """Count convolutions without bias, each with the two vectors of its batch normalisation, and the head."""

    def layer(before: int, after: int, side: int) -> int:
        return before * after * side * side + 2 * after

    total, before = layer(3, 16, 3), 16
    for width in (16, 32, 64):
        total += layer(before, 4 * width, 1)
        for _ in range(blocks):
            total += layer(before, width, 1) + layer(width, width, 3) + layer(width, 4 * width, 1)
            before = 4 * width
    return total + 256 * classes + classes


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name, on_meta):
    counts = tuple(parameter_count(on_meta(name, classes)) for classes in (10, 100))
    assert counts == COUNTS[name] == tuple(formula(BLOCKS[name], classes) for classes in (10, 100))


@pytest.mark.parametrize("name", COUNTS)
def test_stage_shapes(name, on_meta):
    built = on_meta(name, 10)
    assert probe_shapes(built, (32, 32)) == [(16, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert built.widths == (16, 64, 128, 256)
    assert [len(stage) for stage in built.stages[1:]] == [BLOCKS[name]] * 3
    assert built.spec == name


@pytest.mark.parametrize(("in_channels", "stride"), [(16, 1), (4, 1), (16, 2), (8, 2)])
def test_block_against_the_formula(in_channels, stride, shaken):
    block = shaken(Bottleneck(in_channels, 4, stride))
    x = torch.randn(2, in_channels, 6, 6)
    y = F.relu(norm(block.bn1, F.conv2d(x, block.conv1.weight)))
    y = F.relu(norm(block.bn2, F.conv2d(y, block.conv2.weight, stride=stride, padding=1)))
    y = norm(block.bn3, F.conv2d(y, block.conv3.weight))
    alike = in_channels == 16 and stride == 1
    skipped = x if alike else norm(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight, stride=stride))
    torch.testing.assert_close(block(x), F.relu(y + skipped))
