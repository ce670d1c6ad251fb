import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Cohort
from codistill.networks import network
from codistill.networks.densenet import DenseLayer
from codistill.networks.network import parameter_count
from codistill.networks.probe import probe_shapes

from .conftest import norm

COUNTS = {
    "densenet-40-12": (176_122, 188_092),
    "densenet-40-12-plain": (1_019_722, 1_060_132),
    "densenet-40-12-plain:initial_channels=24": (1_059_298, 1_100_428),
}
SHAPES = {
    "densenet-40-12": [(24, 32, 32), (48, 16, 16), (60, 8, 8), (132, 8, 8)],
    "densenet-40-12-plain": [(16, 32, 32), (160, 16, 16), (304, 8, 8), (448, 8, 8)],
    "densenet-40-12-plain:initial_channels=24": [(24, 32, 32), (168, 16, 16), (312, 8, 8), (456, 8, 8)],
}


@pytest.mark.parametrize("spec", COUNTS)
def test_parameter_counts(spec, on_meta):
    assert tuple(parameter_count(on_meta(spec, num_classes)) for num_classes in (10, 100)) == COUNTS[spec]


@pytest.mark.parametrize("spec", SHAPES)
def test_stage_shapes(spec, on_meta):
    assert probe_shapes(on_meta(spec, 10), (32, 32)) == SHAPES[spec]


def test_stage_counts(on_meta):
    # Layers of the plain form on m channels: 2 m + 9 * 12 m; transitions on m channels: 2 m + m^2.
    built = on_meta("densenet-40-12-plain", 10)
    layers = [sum(110 * channels for channels in range(first, first + 144, 12)) for first in (16, 160, 304)]
    counts = [parameter_count(stage) for stage in built.stages]
    assert counts == [432, layers[0] + 320 + 160**2, layers[1] + 608 + 304**2, layers[2] + 2 * 448]


def test_two_branches_on_one_trunk(on_meta):
    cohort = Cohort([on_meta("densenet-40-12", 100) for _ in range(2)])
    assert cohort.shared_stages == 3
    assert parameter_count(cohort) == 260_336


@pytest.mark.parametrize(
    ("initial_channels", "fix"),
    [("0", "at least 1"), (-16, "at least 1"), ("many", "whole number"), ("", "whole number")],
)
def test_initial_channels_must_be_a_positive_whole_number(initial_channels, fix):
    with pytest.raises(UsageError, match=f"initial_channels is .*{fix}"):
        network("densenet-40-12-plain", 10, initial_channels=initial_channels)


def test_bottleneck_layer_against_the_formula(shaken):
    layer = shaken(DenseLayer(20, bottleneck=True))
    x = torch.randn(2, 20, 5, 5)
    bn1, conv1, bn2, conv2 = layer.growth
    assert conv1.weight.shape == (48, 20, 1, 1)
    y = F.conv2d(F.relu(norm(bn1, x)), conv1.weight)
    y = F.conv2d(F.relu(norm(bn2, y)), conv2.weight, padding=1)
    torch.testing.assert_close(layer(x), torch.cat([x, y], dim=1))


def test_plain_layer_against_the_formula(shaken):
    layer = shaken(DenseLayer(20, bottleneck=False))
    x = torch.randn(2, 20, 5, 5)
    bn, conv = layer.growth
    y = F.conv2d(F.relu(norm(bn, x)), conv.weight, padding=1)
    torch.testing.assert_close(layer(x), torch.cat([x, y], dim=1))


def test_transitions_normalise_narrow_and_average(shaken):
    built = shaken(network("densenet-40-12", 10))
    features = built.stages[0](torch.randn(2, 3, 32, 32))
    for stage in built.stages[1:-1]:
        *layers, bn, conv, _ = stage
        assert len(layers) == 6
        x = features
        for layer in layers:
            x = layer(x)
        narrowed = F.conv2d(F.relu(norm(bn, x)), conv.weight)
        features = stage(features)
        torch.testing.assert_close(features, F.avg_pool2d(narrowed, 2))


def test_the_feature_map_is_behind_the_final_normalisation_and_relu(shaken):
    built = shaken(network("densenet-40-12", 10))
    *layers, normalisation = built.stages[-1]
    assert all(isinstance(layer, DenseLayer) for layer in layers)
    assert isinstance(normalisation, nn.BatchNorm2d)
    assert normalisation.act
    assert built.feature_map(torch.randn(2, 3, 32, 32)).min() == 0
