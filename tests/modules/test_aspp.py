"""Atrous spatial pyramid pooling: against the formula, what each branch sees."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.modules import ASPP

from .seeing import SIDE, field_of, positive


def normed(features: Tensor) -> Tensor:
    mean, variance = features.mean((0, 2, 3), keepdim=True), features.var((0, 2, 3), unbiased=False, keepdim=True)
    return ((features - mean) / (variance + 1e-5).sqrt()).clamp(min=0)


def test_against_the_formula():
    block, x = ASPP(8).double(), torch.randn(3, 8, 6, 5, dtype=torch.float64)
    branches = [normed(F.conv2d(x, block.local[0].weight))]
    for dilation, branch in zip((1, 2, 3), block.dilated, strict=True):
        branches.append(normed(F.conv2d(x, branch[0].weight, padding=dilation, dilation=dilation)))
    pooled = F.conv2d(x.sum((2, 3), keepdim=True) / 30, block.mean.weight)
    # The statistics over images alone are those over images and places.
    branches.append(normed(pooled).expand(3, 2, 6, 5))
    expected = normed(F.conv2d(torch.cat(branches, dim=1), block.project[0].weight))
    torch.testing.assert_close(block(x), expected, rtol=1e-8, atol=1e-8)


def test_the_mean_of_a_single_image_is_its_own_statistic():
    block, x = ASPP(8), torch.randn(1, 8, 4, 4)
    nn.init.constant_(block.mean_norm.bias, 0.5)
    seen = []
    block.mean_norm.register_forward_hook(lambda module, given, output: seen.append(output))
    block.train()(x)
    assert seen[0].eq(0.5).all()


def test_receptive_fields():
    block = positive(ASPP(16))
    branches = [block.local, *block.dilated]
    assert [field_of(branch, 16) for branch in branches] == [1, 3, 5, 7]
    assert field_of(block, 16) == SIDE  # the mean sees all places


def test_more_dilations():
    block = ASPP(16, dilations=(1, 6))
    assert block(torch.randn(2, 16, 4, 4)).shape == (2, 16, 4, 4)
    assert block.project[0].in_channels == 4 * 4
    # On a map of 4 pixels, one of 6 leaves the centre.
    wide, x = block.dilated[1][0], torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(wide(x), F.conv2d(x, wide.weight[:, :, 1:2, 1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dilations", [(), (0,), (1, -2)])
def test_impossible_dilations_are_refused(dilations):
    with pytest.raises(UsageError, match=r"^aspp: dilations are .*; name at least one, each at least 1"):
        ASPP(16, dilations)
