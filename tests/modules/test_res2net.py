"""Res2Net's hierarchy: against the formula, what each group sees, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.modules import Res2Net

from .seeing import field_of, positive, sees


def transformed(transform: nn.Sequential, features: torch.Tensor) -> torch.Tensor:
    convolved = F.conv2d(features, transform[0].weight, padding=1)
    mean, variance = convolved.mean((0, 2, 3), keepdim=True), convolved.var((0, 2, 3), unbiased=False, keepdim=True)
    return ((convolved - mean) / (variance + 1e-5).sqrt()).clamp(min=0)


def test_against_the_formula():
    block, x = Res2Net(12).double(), torch.randn(3, 12, 5, 4, dtype=torch.float64)
    y1 = transformed(block.transforms[0], x[:, :3])
    y2 = transformed(block.transforms[1], x[:, 3:6] + y1)
    y3 = transformed(block.transforms[2], x[:, 6:9] + y2)
    torch.testing.assert_close(block(x), torch.cat([y1, y2, y3, x[:, 9:]], dim=1), rtol=1e-10, atol=1e-10)


def test_two_groups_and_the_residual_block():
    block, x = Res2Net(8, groups=2, residual=True).double().eval(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    scale = (1 + 1e-5) ** -0.5
    before = (scale * F.conv2d(x, block.before[0].weight)).clamp(min=0)
    first = (scale * F.conv2d(before[:, :4], block.transforms[0][0].weight, padding=1)).clamp(min=0)
    after = scale * F.conv2d(torch.cat([first, before[:, 4:]], dim=1), block.after[0].weight)
    torch.testing.assert_close(block(x), (after + x).clamp(min=0), rtol=1e-10, atol=1e-10)


GROUPS = [slice(start, start + 4) for start in (0, 4, 8, 12)]


def test_receptive_fields():
    block = positive(Res2Net(16))
    assert [field_of(block, 16, group) for group in GROUPS] == [3, 5, 7, 1]


def test_groups_see_those_before_them_and_the_last_one_itself():
    assert sees(positive(Res2Net(16)), GROUPS, GROUPS) == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [False, False, False, True],
    ]


@pytest.mark.parametrize(
    ("channels", "groups", "line"),
    [
        (10, 4, "10 channels do not divide into 4 equal groups: use 2, 5, 10"),
        (64, 1, "64 channels do not divide into 1 equal groups: use 2, 4, 8"),
        (7, 4, "use 7"),
        (1, 4, "use wider feature maps"),
    ],
)
def test_groups_that_do_not_divide_the_channels_are_refused(channels, groups, line):
    with pytest.raises(UsageError, match=f"^res2net: .*{line}"):
        Res2Net(channels, groups)
