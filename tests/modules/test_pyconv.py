"""Pyramidal convolution: against the formula, what each level sees, uneven widths."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.modules import PyConv
from codistill.modules.pyconv import Pyramid, level_widths

from .seeing import field_of, positive, sees


def test_against_the_formula():
    block, x = PyConv(64).double(), torch.randn(2, 64, 4, 5, dtype=torch.float64)
    outputs = []
    for level, kernel, groups in zip(block.pyramid.levels, (3, 5, 7, 9), (1, 4, 8, 16), strict=True):
        assert level.weight.shape == (16, 64 // groups, kernel, kernel) and level.bias is None
        of_group = [
            F.conv2d(part, weight, padding=kernel // 2)
            for part, weight in zip(x.chunk(groups, dim=1), level.weight.chunk(groups), strict=True)
        ]
        outputs.append(torch.cat(of_group, dim=1))
    joined = torch.cat(outputs, dim=1)
    mean, variance = joined.mean((0, 2, 3), keepdim=True), joined.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = ((joined - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_receptive_fields():
    block = positive(PyConv(16))
    assert [field_of(block, 16, slice(start, start + 4)) for start in (0, 4, 8, 12)] == [3, 5, 7, 9]


@pytest.mark.parametrize(("level", "groups"), [(0, 1), (1, 4), (2, 8), (3, 16)])
def test_the_first_level_sees_all_channels_and_the_others_those_of_their_group(level, groups):
    width, share = 64 // groups, 16 // groups
    inputs = [slice(start, start + width) for start in range(0, 64, width)]
    outputs = [slice(start, start + share) for start in range(16 * level, 16 * (level + 1), share)]
    block = positive(PyConv(64))
    assert sees(block, inputs, outputs) == [[one == other for other in range(groups)] for one in range(groups)]


@pytest.mark.parametrize(
    ("channels", "levels", "widths", "groups"),
    [
        (132, 4, [36, 32, 32, 32], [1, 4, 4, 4]),
        (128, 4, [32, 32, 32, 32], [1, 4, 8, 16]),
        (64, 3, [16, 16, 32], [1, 4, 8]),
        (64, 2, [32, 32], [1, 4]),
        (64, 1, [64], [1]),
        (8, 4, [2, 2, 2, 2], [1, 2, 2, 2]),
        (9, 4, [3, 2, 2, 2], [1, 1, 1, 1]),
        (40, 4, [16, 8, 8, 8], [1, 4, 8, 8]),
    ],
)
def test_widths_and_groups(channels, levels, widths, groups):
    assert level_widths(channels, levels) == widths
    assert [level.groups for level in Pyramid(channels, levels).levels] == groups


@pytest.mark.parametrize("channels", range(4, 70))
def test_widths_add_up(channels):
    for levels in (1, 2, 3, 4):
        widths = level_widths(channels, levels)
        assert sum(widths) == channels and min(widths) >= 1 and len(widths) == levels


def test_convolutions_start_as_the_paper_line_does():
    for level, kernel in zip(Pyramid(512).levels, (3, 5, 7, 9), strict=True):
        assert isinstance(level, nn.Conv2d)
        assert level.weight.std().item() == pytest.approx((2 / (kernel**2 * 128)) ** 0.5, rel=0.03)


@pytest.mark.parametrize("levels", [0, 5, -1])
def test_other_numbers_of_levels_are_refused(levels):
    with pytest.raises(UsageError, match=rf"^pyramid: levels is {levels}; it must be from 1 to 4$"):
        PyConv(64, levels)


def test_too_few_channels_are_refused():
    with pytest.raises(UsageError, match="4 levels need at least 4 channels, got 3"):
        PyConv(3)
