"""Multi-scale extraction: widths from a table worked by hand, identities, receptive fields."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from codistill.core.errors import UsageError
from codistill.modules import MultiScaleExtraction
from codistill.modules.multiscale import group_widths
from codistill.networks.network import parameter_count


def exported_widths(module: MultiScaleExtraction) -> list[int]:
    """Widths of what reaches the output, from what each convolution gets beside its own group."""
    first, *groups = module.group_widths
    carried = [width - group for width, group in zip(module.conv_widths[1:], groups[1:], strict=True)]
    halves = [width - kept for width, kept in zip(module.conv_widths, carried, strict=False)]
    return [first, *halves, module.conv_widths[-1]]


@pytest.mark.parametrize(
    ("channels", "groups", "widths", "exported", "conv", "norm"),
    [
        (64, 2, [32], [32, 32], 9_216, 64),
        (64, 4, [16, 24, 28], [16, 8, 12, 28], 14_544, 136),
        (64, 5, [13, 20, 23, 24], [13, 6, 10, 11, 24], 15_066, 160),
        (64, 8, [8, 12, 14, 15, 16, 16, 16], [8, 4, 6, 7, 7, 8, 8, 16], 12_573, 194),
        (128, 4, [32, 48, 56], [32, 16, 24, 56], 58_176, 272),
        (132, 4, [33, 50, 58], [33, 16, 25, 58], 62_577, 282),
        (448, 4, [112, 168, 196], [112, 56, 84, 196], 712_656, 952),
        (512, 4, [128, 192, 224], [128, 64, 96, 224], 930_816, 1_088),
        (1280, 4, [320, 480, 560], [320, 160, 240, 560], 5_817_600, 2_720),
    ],
)
def test_widths_and_parameters(channels, groups, widths, exported, conv, norm):
    with torch.device("meta"):
        module = MultiScaleExtraction(channels, groups)
    assert list(module.conv_widths) == widths
    assert exported_widths(module) == exported
    assert sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Conv2d)) == conv
    assert parameter_count(module) == conv + norm


def test_exporting_the_first_half_of_odd_groups():
    with torch.device("meta"):
        module = MultiScaleExtraction(132, 4, exported="first")
    assert list(module.conv_widths) == [33, 49, 57]
    assert exported_widths(module) == [33, 17, 25, 57]
    assert parameter_count(module) == 60_651 + 2 * (33 + 49 + 57)


def test_depthwise_parameters():
    module = MultiScaleExtraction(64, 4, depthwise=True)
    assert parameter_count(module) == 9 * (16 + 24 + 28) + 136
    assert module(torch.randn(2, 64, 4, 4)).shape == (2, 64, 4, 4)


def test_group_widths():
    assert group_widths(64, 5) == [13, 13, 13, 13, 12]
    assert group_widths(9, 4) == [3, 2, 2, 2]
    assert group_widths(132, 4) == [33] * 4


def is_workable(channels: int, groups: int) -> bool:
    """With two groups nothing is divided; with more, the second one must have two channels at least."""
    if groups < 2 or channels < groups:
        return False
    return groups == 2 or len(range(1, channels, groups)) >= 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 12), st.sampled_from(["first", "second"]), st.booleans())
def test_the_output_has_the_channels_of_the_input(channels, groups, exported, depthwise):
    if not is_workable(channels, groups):
        with pytest.raises(UsageError, match="multi-scale extraction"):
            MultiScaleExtraction(channels, groups, exported, depthwise)
        return
    module = MultiScaleExtraction(channels, groups, exported, depthwise).eval()
    feature_map = torch.randn(2, channels, 3, 4)
    output = module(feature_map)
    assert output.shape == feature_map.shape
    first = module.group_widths[0]
    assert torch.equal(output[:, :first], feature_map[:, :first])
    assert (output[:, first:] >= 0).all()
    assert sum(exported_widths(module)) == sum(module.group_widths) == channels


@pytest.mark.parametrize(("channels", "groups"), [(64, 1), (64, 0), (64, -1), (3, 4), (4, 4), (5, 4), (3, 3), (1, 2)])
def test_impossible_splits_are_refused(channels, groups):
    with pytest.raises(UsageError, match=rf"^multi-scale extraction: .*{channels} channels.*: use "):
        MultiScaleExtraction(channels, groups)


@pytest.mark.parametrize("channels", range(2, 20))
def test_the_mend_for_an_impossible_split_works(channels):
    with pytest.raises(UsageError, match=rf"(use at most|to) {max(2, channels // 2)} groups"):
        MultiScaleExtraction(channels, channels + 1)
    MultiScaleExtraction(channels, max(2, channels // 2))


def as_identity(module: MultiScaleExtraction) -> MultiScaleExtraction:
    for transform in module.transforms:
        nn.init.dirac_(transform[0].weight, transform[0].groups)
        transform[1].eps = 0.0
        transform[1].act = False
    return module.eval()


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    ("channels", "exported", "order"),
    [
        # Groups (0 1) (2 3) (4 5) (6 7). Second: 2 3 -> 3 out; 4 5 2 -> 2 out; 6 7 4 5 out. First: 2; 4 5; 6 7 3 out.
        (8, "second", [0, 1, 3, 2, 6, 7, 4, 5]),
        (8, "first", [0, 1, 2, 4, 5, 6, 7, 3]),
        # Groups (0 1 2) (3 4 5) (6 7) (8 9). Second: 3 4 5 -> 5; 6 7 3 4 -> 3 4; 8 9 6 7. First: 3 4; 6 7; 8 9 5.
        (10, "second", [0, 1, 2, 5, 3, 4, 8, 9, 6, 7]),
        (10, "first", [0, 1, 2, 3, 4, 6, 7, 8, 9, 5]),
    ],
)
def test_identity_convolutions_permute_the_channels(channels, exported, order, depthwise):
    module = as_identity(MultiScaleExtraction(channels, 4, exported, depthwise))
    feature_map = torch.randn(2, channels, 3, 3)
    assert torch.equal(module(feature_map), feature_map[:, order])


@pytest.mark.parametrize("exported", ["first", "second"])
@pytest.mark.parametrize(("channels", "groups"), [(64, 4), (64, 5), (64, 8), (132, 4), (7, 2), (13, 3)])
def test_identity_convolutions_lose_no_channel(channels, groups, exported):
    module = as_identity(MultiScaleExtraction(channels, groups, exported))
    numbers = torch.arange(channels, dtype=torch.float32).view(1, channels, 1, 1).expand(1, channels, 2, 2)
    assert module(numbers)[0, :, 0, 0].sort().values.tolist() == list(range(channels))


def test_each_transform_is_convolution_norm_and_relu():
    module = MultiScaleExtraction(8, 2)
    feature_map = torch.randn(3, 8, 5, 5)
    conv, norm = module.transforms[0]
    convolved = nn.functional.conv2d(feature_map[:, 4:], conv.weight, padding=1)
    mean, variance = convolved.mean((0, 2, 3)), convolved.var((0, 2, 3), unbiased=False)
    expected = (convolved - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()
    torch.testing.assert_close(module(feature_map), torch.cat([feature_map[:, :4], expected.relu()], dim=1))


@pytest.mark.parametrize("exported", ["first", "second"])
def test_receptive_fields_grow_by_two_pixels_a_group(exported):
    module = MultiScaleExtraction(16, 4, exported).double().eval()
    for transform in module.transforms:
        transform[0].weight.data.abs_()  # so that no ReLU stops a gradient
    ends = torch.tensor([0, *exported_widths(module)]).cumsum(0).tolist()
    for group, (start, end) in enumerate(itertools.pairwise(ends)):
        feature_map = torch.rand(1, 16, 11, 11, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(feature_map)[0, start:end, 5, 5].sum(), feature_map)
        seen = gradient[0].abs().sum(0) > 0
        field = torch.zeros(11, 11, dtype=torch.bool)
        field[5 - group : 6 + group, 5 - group : 6 + group] = True
        assert torch.equal(seen, field), f"group {group} sees {int(seen.sum()) ** 0.5} pixels"


def test_either_half_makes_the_same_functions_when_the_halves_are_even():
    second, first = (MultiScaleExtraction(16, 4, exported).double().eval() for exported in ("second", "first"))
    assert second.conv_widths == first.conv_widths == (4, 6, 7)
    first.load_state_dict(second.state_dict())
    for module in (second, first):
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                torch.manual_seed(1)
                nn.init.normal_(layer.weight), nn.init.normal_(layer.bias), nn.init.normal_(layer.running_mean)
    for transform in first.transforms[:2]:  # swap the halves of what is divided
        half = transform[0].out_channels // 2
        for tensor in (transform[0].weight, *transform[1].parameters(), transform[1].running_mean):
            tensor.data = torch.cat([tensor[half:], tensor[:half]]).data
    feature_map = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    expected, swapped = second(feature_map), first(feature_map)
    torch.testing.assert_close(swapped, expected, rtol=1e-12, atol=1e-12)
    second.exported = "first"
    assert not torch.allclose(second(feature_map), expected)


def test_convolutions_start_as_the_paper_line_does():
    module = MultiScaleExtraction(512, 4)
    weight = module.transforms[0][0].weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
