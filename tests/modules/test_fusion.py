"""Feature fusion: parameter counts by hand, unlike maps, order of the layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.modules import FeatureFusion
from codistill.modules.fusion import convolutional_regressor
from codistill.networks.layers import BatchNormAct2d
from codistill.networks.network import parameter_count


@pytest.mark.parametrize(
    ("widths", "size", "ten", "hundred"),
    [
        ((64, 64), 8, 10_378, 16_228),
        ((64, 64, 64), 8, 15_178, 21_028),
        ((64, 128), 8, 15_178, 21_028),
        ((128, 128), 8, 37_130, 48_740),
        ((132, 132), 8, 39_346, 51_316),
        ((512, 512), 4, 541_706, 541_706 + 90 * 513),
        ((1280, 1280), 4, 3_320_330, 3_320_330 + 90 * 1281),
    ],
)
def test_parameters(widths, size, ten, hundred):
    with torch.device("meta"):
        for num_classes, parameters in ((10, ten), (100, hundred)):
            fusion = FeatureFusion([(width, size, size) for width in widths], num_classes)
            assert parameter_count(fusion) == parameters


def convolutions(module: nn.Module) -> list[tuple[int, int, int, tuple[int, int], tuple[int, int]]]:
    return [
        (layer.in_channels, layer.out_channels, layer.groups, layer.kernel_size, layer.stride)
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d)
    ]


def test_unlike_widths_meet_the_smaller_one_in_the_pointwise_convolution():
    fusion = FeatureFusion([(64, 8, 8), (128, 8, 8)], 10)
    assert convolutions(fusion) == [(192, 192, 192, (3, 3), (1, 1)), (192, 64, 1, (1, 1), (1, 1))]
    assert fusion.head.linear.in_features == 64


def test_unlike_widths_meet_the_smaller_one_each_for_itself():
    fusion = FeatureFusion([(6, 4, 4), (4, 4, 4), (5, 4, 4)], 3, projection="each")
    assert [convolutions(adapter) for adapter in fusion.adapters] == [
        [(6, 4, 1, (1, 1), (1, 1))],
        [],
        [(5, 4, 1, (1, 1), (1, 1))],
    ]
    assert convolutions(fusion.transfer) == [(12, 12, 12, (3, 3), (1, 1)), (12, 4, 1, (1, 1), (1, 1))]
    by_hand = (6 * 4 + 8) + (5 * 4 + 8) + (9 * 12 + 24) + (12 * 4 + 8) + (4 * 3 + 3)
    assert parameter_count(fusion) == by_hand
    maps = [torch.randn(2, width, 4, 4) for width in (6, 4, 5)]
    assert fusion(maps).shape == (2, 3)


def test_equal_widths_need_no_projection():
    equal = [(4, 4, 4), (4, 4, 4)]
    assert parameter_count(FeatureFusion(equal, 3, "each")) == parameter_count(FeatureFusion(equal, 3))


def normalised(feature_map, norm):
    mean = feature_map.mean((0, 2, 3), keepdim=True)
    variance = ((feature_map - mean) ** 2).mean((0, 2, 3), keepdim=True)
    weight, bias = (each[None, :, None, None] for each in (norm.weight, norm.bias))
    return (feature_map - mean) / (variance + norm.eps).sqrt() * weight + bias


def test_agrees_with_a_slow_derivation():
    fusion = FeatureFusion([(3, 4, 5), (4, 4, 5), (2, 4, 5)], 6).double()
    for layer in fusion.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    maps = [torch.randn(3, width, 4, 5, dtype=torch.float64) for width in (3, 4, 2)]
    (depthwise, first_norm), (pointwise, second_norm) = fusion.transfer
    joined = torch.cat(maps, dim=1)
    filtered = [
        F.conv2d(joined[:, channel : channel + 1], depthwise.weight[channel : channel + 1], padding=1)
        for channel in range(9)
    ]
    spatial = normalised(torch.cat(filtered, dim=1), first_norm).relu()
    mixed = torch.einsum("oc,bchw->bohw", pointwise.weight[:, :, 0, 0], spatial)
    pooled = normalised(mixed, second_norm).relu().mean(dim=(2, 3))
    expected = pooled @ fusion.head.linear.weight.T + fusion.head.linear.bias
    torch.testing.assert_close(fusion(maps), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "target", "kernel", "stride"),
    [
        ((8, 8), (4, 4), (3, 3), (2, 2)),  # twice as long
        ((7, 7), (4, 4), (3, 3), (2, 2)),  # twice less one
        ((7, 7), (3, 3), (5, 5), (1, 1)),  # any other length
        ((9, 9), (8, 8), (2, 2), (1, 1)),
        ((2, 2), (1, 1), (3, 3), (2, 2)),
        ((8, 7), (4, 7), (3, 3), (2, 1)),  # one direction only
        ((8, 4), (3, 4), (6, 3), (1, 1)),
    ],
)
def test_convolutional_regressor(size, target, kernel, stride):
    regressor = convolutional_regressor(3, size, target)
    assert convolutions(regressor) == [(3, 3, 1, kernel, stride)]
    assert [type(layer) for layer in regressor] == [nn.Conv2d, BatchNormAct2d]
    assert regressor(torch.randn(2, 3, *size)).shape == (2, 3, *target)


@pytest.mark.parametrize("projection", ["pointwise", "each"])
@pytest.mark.parametrize(
    "shapes",
    [
        [(6, 8, 8), (4, 4, 4)],
        [(4, 4, 4), (6, 7, 7)],
        [(4, 7, 7), (4, 4, 4), (5, 2, 2)],
        [(4, 7, 4), (3, 4, 7)],
        [(4, 3, 3), (3, 7, 5)],
    ],
)
def test_unlike_resolutions_meet_the_smallest_one(shapes, projection):
    fusion = FeatureFusion(shapes, 3, projection)
    height, width = (min(shape[axis] for shape in shapes) for axis in (1, 2))
    maps = [torch.randn(4, *shape, requires_grad=True) for shape in shapes]
    for adapter, feature_map, shape in zip(fusion.adapters, maps, shapes, strict=True):
        adapted = adapter(feature_map)
        assert adapted.shape[2:] == (height, width)
        assert adapted.shape[1] == (shape[0] if projection == "pointwise" else min(each[0] for each in shapes))
    # The mean over the batch of a class does not see the features behind batch normalisation, one image does.
    fusion(maps)[0, 0].backward()
    assert all(feature_map.grad.isfinite().all() and feature_map.grad.any() for feature_map in maps)


@pytest.mark.parametrize("shapes", [[], [(4, 4, 4)]])
def test_fewer_than_two_maps_are_refused(shapes):
    with pytest.raises(UsageError, match=rf"at least 2 students, got {len(shapes)}"):
        FeatureFusion(shapes, 3)


def test_a_wrong_number_of_maps_is_an_error():
    fusion = FeatureFusion([(4, 4, 4), (4, 4, 4)], 3)
    with pytest.raises(ValueError, match="shorter"):
        fusion([torch.randn(2, 4, 4, 4)])


def test_starts_as_the_code_of_ffl_does():
    fusion = FeatureFusion([(64, 8, 8), (64, 8, 8)], 10)
    depthwise, pointwise = fusion.transfer[0][0].weight, fusion.transfer[1][0].weight
    assert depthwise.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.1)
    assert pointwise.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert fusion.transfer[0][1].weight.eq(1).all() and fusion.transfer[0][1].bias.eq(0).all()
