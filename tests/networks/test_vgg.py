import pytest
import torch
import torch.nn.functional as F

from codistill.methods.cohort import Cohort
from codistill.networks import network
from codistill.networks.network import parameter_count
from codistill.networks.probe import probe_shapes

from .conftest import norm

CONVOLUTIONS = {"vgg8": 1, "vgg13": 2}
# For 10 and 100 classes; those for 100 are what papers print as 3.97M and 9.46M.
COUNTS = {"vgg8": (3_918_858, 3_965_028), "vgg13": (9_416_010, 9_462_180)}


def formula(count: int, classes: int) -> int:
    """Count convolutions with biases, each with the two vectors of its batch normalisation, and the head."""
    total, before = 0, 3
    for width in (64, 128, 256, 512, 512):
        for _ in range(count):
            total += 9 * before * width + 3 * width
            before = width
    return total + 513 * classes


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_and_shapes(name, on_meta):
    counts = tuple(parameter_count(on_meta(name, classes)) for classes in (10, 100))
    assert counts == COUNTS[name] == tuple(formula(CONVOLUTIONS[name], classes) for classes in (10, 100))
    shapes = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)]
    assert probe_shapes(on_meta(name, 10), (32, 32)) == shapes
    # Images of 64x64 are halved once more.
    assert probe_shapes(on_meta(name, 10), (64, 64))[3:] == [(512, 8, 8), (512, 4, 4)]
    assert Cohort([on_meta(name, 10) for _ in range(2)]).shared_stages == 4


def test_a_stage_against_the_formula(shaken):
    stage = shaken(network("vgg13", 10)).stages[1]
    _, first, normalise, second, then = stage
    torch.nn.init.normal_(first.bias)
    x = torch.randn(2, 64, 6, 6)
    y = F.max_pool2d(x, 2)
    y = F.relu(norm(normalise, F.conv2d(y, first.weight, first.bias, padding=1)))
    torch.testing.assert_close(stage(x), F.relu(norm(then, F.conv2d(y, second.weight, second.bias, padding=1))))
