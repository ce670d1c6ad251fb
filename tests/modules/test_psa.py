"""Pyramid split attention: against the formula, bounds of its weights, uneven scales."""

import math

import pytest
import torch
from torch import nn

from codistill.core.errors import UsageError
from codistill.modules import PSA

from .seeing import field_of, positive


def test_against_the_formula():
    block, x = PSA(64).double(), torch.randn(3, 64, 4, 4, dtype=torch.float64)
    first, _, second, _ = block.attention
    scales = [level(x) for level in block.pyramid.levels]
    attention = []
    for scale in scales:
        hidden = (scale.mean((2, 3)) @ first.weight.T + first.bias).clamp(min=0)
        attention.append(1 / (1 + torch.exp(-(hidden @ second.weight.T + second.bias))))
    total = sum(each.exp() for each in attention)
    joined = torch.cat(
        [(each.exp() / total)[:, :, None, None] * scale for each, scale in zip(attention, scales, strict=True)], dim=1
    )
    mean, variance = joined.mean((0, 2, 3), keepdim=True), joined.var((0, 2, 3), unbiased=False, keepdim=True)
    expected = ((joined - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


def test_no_scale_is_switched_off():
    block = PSA(64)
    low, high = 1 / (1 + 3 * math.e), math.e / (math.e + 3)
    assert (low, high) == (pytest.approx(0.1092, abs=5e-5), pytest.approx(0.4754, abs=5e-5))
    for layer, weight, bias in ((block.attention[0], 1.0, 0.0), (block.attention[2], 10.0, -50.0)):
        nn.init.constant_(layer.weight, weight), nn.init.constant_(layer.bias, bias)
    on, off = torch.full((1, 16, 4, 4), 10.0), torch.zeros(1, 16, 4, 4)
    alone, against = block.scale_weights([on, off, off, off]), block.scale_weights([off, on, on, on])
    torch.testing.assert_close(alone[0, 0], torch.full((16,), high))
    torch.testing.assert_close(against[0, 0], torch.full((16,), low))
    torch.testing.assert_close(alone.sum(dim=1), torch.ones(1, 16))


def test_channels_that_a_scale_lacks_take_no_part():
    block = PSA(132).double()
    scales = block.pyramid(torch.randn(2, 132, 4, 4, dtype=torch.float64))
    assert [each.shape[1] for each in scales] == [36, 32, 32, 32]
    weights = block.scale_weights(scales)
    assert weights[:, 0, 32:].eq(1).all() and weights[:, 1:, 32:].eq(0).all()
    assert ((weights[..., :32] > 0.1) & (weights[..., :32] < 0.5)).all()


def test_receptive_fields_of_its_convolutions():
    block = positive(PSA(16))
    parts = [slice(start, start + 4) for start in (0, 4, 8, 12)]
    assert [field_of(lambda maps: torch.cat(block.pyramid(maps), dim=1), 16, part) for part in parts] == [3, 5, 7, 9]


def test_hidden_units():
    assert [PSA(channels).attention[0].out_features for channels in (8, 64, 128, 256)] == [1, 1, 2, 4]
    assert PSA(64, reduction=4).attention[0].out_features == 4


def test_constants_are_no_weights():
    block = PSA(132)
    assert "absent" not in block.state_dict() and isinstance(block, nn.Module)
    with pytest.raises(UsageError, match="4 levels need at least 4 channels, got 3"):
        PSA(3)
