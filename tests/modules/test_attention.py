"""Dual attention against a slow derivation of MFEF's Eqs. (5)-(8), and its limits."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from codistill.core.errors import UsageError
from codistill.modules import ATTENTION, DualAttention
from codistill.networks.network import parameter_count


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


def slow_attention(feature_map, first, second, kernel):
    """Eqs. (5)-(8), place by place: maps [batch, channel, height, width], W = second relu(first .)."""
    batch, channels, height, width = feature_map.shape
    output = np.zeros_like(feature_map)
    pad = kernel.shape[-1] // 2
    for image in range(batch):
        average = np.array([feature_map[image, channel].mean() for channel in range(channels)])
        maximum = np.array([feature_map[image, channel].max() for channel in range(channels)])
        both = second @ np.maximum(first @ average, 0) + second @ np.maximum(first @ maximum, 0)  # Eq. (5)
        weighted = sigmoid(both)[:, None, None] * feature_map[image]  # Eq. (6)
        pooled = np.zeros((2, height + 2 * pad, width + 2 * pad))
        for row in range(height):
            for column in range(width):
                pooled[0, row + pad, column + pad] = weighted[:, row, column].mean()
                pooled[1, row + pad, column + pad] = weighted[:, row, column].max()
        for row in range(height):
            for column in range(width):
                window = pooled[:, row : row + 2 * pad + 1, column : column + 2 * pad + 1]
                weight = sigmoid((window * kernel[0]).sum())  # Eq. (7)
                output[image, :, row, column] = weight * weighted[:, row, column]  # Eq. (8)
    return output


@pytest.mark.parametrize(("channels", "reduction", "kernel_size"), [(6, 2, 7), (6, 3, 3), (5, 16, 1)])
def test_agrees_with_a_slow_derivation(channels, reduction, kernel_size):
    attention = DualAttention(channels, reduction, kernel_size).double()
    feature_map = torch.randn(2, channels, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        output = attention(feature_map)
        weights = (attention.channel[0].weight, attention.channel[2].weight, attention.spatial[0].weight)
    expected = slow_attention(feature_map.numpy(), *(weight.detach().numpy() for weight in weights))
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("channels", "parameters"), [(64, 512), (128, 2_048), (132, 2_112), (512, 32_768), (1280, 204_800)]
)
def test_parameters(channels, parameters):
    with torch.device("meta"):
        assert parameter_count(DualAttention(channels)) == parameters + 98
        cbam = DualAttention(channels, bias=True, norm=True)
        assert parameter_count(cbam) == parameters + channels // 16 + channels + 98 + 2
        assert parameter_count(DualAttention(channels, kernel_size=3)) == parameters + 18


def test_parameters_of_one_part():
    with torch.device("meta"):
        counts = [parameter_count(DualAttention(64, kind=kind)) for kind in ATTENTION]
    assert counts == [512 + 98, 512, 98, 512 + 98]


@pytest.mark.parametrize("kind", ATTENTION)
def test_the_parts_of_each_kind_in_their_order(kind):
    whole = DualAttention(6, 2, 3, bias=True, norm=True).double()
    attention = DualAttention(6, 2, 3, bias=True, norm=True, kind=kind).double()
    nn.init.ones_(whole.spatial[1].weight)  # before anything is learnt, the spatial part is 1/2 everywhere
    attention.load_state_dict({name: whole.state_dict()[name] for name in attention.state_dict()})
    maps, expected = torch.randn(3, 6, 5, 4, dtype=torch.float64), {}
    weighted = maps
    for part in {"cbam": "channel spatial"}.get(kind, kind.replace("-", " ")).split():
        expected[part] = getattr(whole, f"{part}_weights")(weighted)
        weighted = expected[part] * weighted
    torch.testing.assert_close(attention(maps), weighted, rtol=1e-12, atol=1e-12)
    channels, places = attention.maps(maps)
    assert (channels is not None, places is not None) == ("channel" in expected, "spatial" in expected)
    if channels is not None:
        torch.testing.assert_close(channels, expected["channel"][:, :, 0, 0])
    if places is not None:
        torch.testing.assert_close(places, expected["spatial"][:, 0])


def test_hidden_units():
    assert DualAttention(8).channel[0].weight.shape == (1, 8)
    assert DualAttention(64, reduction=4).channel[0].weight.shape == (16, 64)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_weights_lie_between_zero_and_one(scale):
    attention = DualAttention(32).double()
    feature_map = scale * torch.randn(4, 32, 6, 5, dtype=torch.float64)
    channel, spatial = attention.channel_weights(feature_map), attention.spatial_weights(feature_map)
    assert channel.shape == (4, 32, 1, 1)
    assert spatial.shape == (4, 1, 6, 5)
    for weights in (channel, spatial):
        assert ((weights > 0) & (weights < 1)).all()


def test_zero_weights_give_a_quarter_of_the_input():
    attention = DualAttention(8)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    feature_map = torch.randn(2, 8, 4, 4)
    assert torch.equal(attention(feature_map), feature_map / 4)


def test_average_and_maximum_pass_one_perceptron_and_may_be_swapped():
    attention = DualAttention(8, reduction=2).double()
    average, maximum = torch.rand(2, 3, 8, dtype=torch.float64).sort(dim=0).values
    # Four places of which one has the maximum and the others make the mean what it is to be.
    rest = (4 * average - maximum) / 3
    feature_map = torch.stack([rest, maximum, rest, rest], dim=2).view(3, 8, 2, 2)
    swapped = (attention.channel(maximum) + attention.channel(average)).sigmoid()
    torch.testing.assert_close(attention.channel_weights(feature_map)[:, :, 0, 0], swapped)
    constant = average[:, :, None, None].expand(3, 8, 2, 2)
    twice = (2 * attention.channel(average)).sigmoid()
    torch.testing.assert_close(attention.channel_weights(constant)[:, :, 0, 0], twice)


def test_norm_follows_the_spatial_convolution():
    attention = DualAttention(8, norm=True)
    convolution, norm = attention.spatial
    assert isinstance(norm, nn.BatchNorm2d) and norm.momentum == 0.01
    feature_map = torch.randn(4, 8, 5, 5)
    assert attention.spatial_weights(feature_map).eq(0.5).all()  # before it has learnt anything
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    pooled = torch.cat([feature_map.mean(1, keepdim=True), feature_map.amax(1, keepdim=True)], dim=1)
    expected = nn.functional.batch_norm(convolution(pooled), None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(attention.spatial_weights(feature_map), expected.sigmoid())


@pytest.mark.parametrize("kernel_size", [0, 2, 6, -3])
def test_an_even_kernel_is_refused(kernel_size):
    with pytest.raises(UsageError, match=rf"kernel_size is {kernel_size}; it must be odd, for example 7 or 3"):
        DualAttention(8, kernel_size=kernel_size)


@pytest.mark.parametrize("reduction", [0, -1])
def test_a_reduction_below_one_is_refused(reduction):
    with pytest.raises(UsageError, match=rf"reduction is {reduction}; it must be at least 1"):
        DualAttention(8, reduction)


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises((UsageError, TypeCheckError), match=r"kind is 'spacial': did you mean spatial|type-?check"):
        DualAttention(8, kind="spacial")


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_the_gradient_of_a_tied_maximum_goes_to_one_place(value):
    attention = DualAttention(4, reduction=1, bias=True).double()
    for bias in (attention.channel[0].bias, attention.channel[2].bias):
        nn.init.uniform_(bias, 1.0, 2.0)  # alive hidden units whatever the input
    feature_map = torch.full((2, 4, 3, 3), value, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention.channel_weights(feature_map).sum(), feature_map)
    shares = gradient.flatten(2)
    base = shares.median(dim=2, keepdim=True).values
    # Mean and maximum are equal inputs of one perceptron: half of the gradient is spread, half is in one place.
    assert ((shares - base).abs() > 1e-12).sum(dim=2).eq(1).all()
    torch.testing.assert_close(shares.sum(dim=2, keepdim=True), 2 * 9 * base)

    (gradient,) = torch.autograd.grad(attention.spatial_weights(feature_map).sum(), feature_map)
    assert gradient.isfinite().all()
    base = gradient.median(dim=1, keepdim=True).values
    assert ((gradient - base).abs() > 1e-12).sum(dim=1).eq(1).all()
    moved = attention.spatial_weights(feature_map + 1e-6) - attention.spatial_weights(feature_map - 1e-6)
    torch.testing.assert_close(gradient.sum(), moved.sum() / 2e-6, rtol=1e-6, atol=1e-9)


def test_gradcheck():
    attention = DualAttention(4, reduction=2, kernel_size=3).double()
    feature_map = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, feature_map)
