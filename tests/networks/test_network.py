"""The entry point, its errors, and the helpers that the families share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.networks import NETWORKS, Network, PooledLinear, network, network_from
from codistill.networks.layers import BatchNormAct2d, conv, initialise
from codistill.networks.probe import probe_shapes


def test_options_by_keyword_join_the_spec_and_win():
    assert network("resnet20", 10, shortcut="A").spec == "resnet20:shortcut=A"
    assert network("resnet20:shortcut=B", 10, shortcut="A").spec == "resnet20:shortcut=A"


@pytest.mark.parametrize(
    ("spec", "num_classes", "says"),
    [
        ("resnet21", 10, r"unknown network 'resnet21': did you mean .*\bresnet20\b.*\?"),
        ("wrn-16-4", 10, r"did you mean wrn-16-2"),
        ("densenet", 10, r"did you mean .*densenet-40-12"),
        ("mobilenet-v2", 10, r"did you mean mobilenetv2"),
        ("?", 10, r"choose from densenet-40-12, .*resnet110, .*wrn-40-2"),
        ("resnet20:shortcuts=A", 10, r"unknown option 'shortcuts': did you mean shortcut\?"),
        ("resnet20:num_classes=3", 10, r"unknown option 'num_classes'"),
        ("wrn-16-2:shortcut=A", 10, r"unknown option 'shortcut': it has no options"),
        ("resnet20:A", 10, r"name:key=value"),
        ("resnet20", 1, r"at least 2 classes, got 1"),
    ],
)
def test_what_cannot_be_built_says_why(spec, num_classes, says):
    with pytest.raises(UsageError, match=says):
        network(spec, num_classes)


def test_every_entry_has_a_docstring():
    assert all(build.__doc__ for build in NETWORKS.values())


def test_images_that_are_too_small_are_refused():
    with pytest.raises(UsageError, match="densenet-40-12: stage 2 cannot take 2x2 images"):
        probe_shapes(network("densenet-40-12", 10), (2, 2))


def test_probe_shapes_leaves_the_network_alone():
    built = network("resnet20", 10)
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    assert probe_shapes(built, (32, 48)) == [(16, 32, 48), (16, 32, 48), (32, 16, 24), (64, 8, 12)]
    assert built.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())


def test_initialise_uses_the_fan_out():
    layers = nn.Sequential(conv(64, 128, 3), conv(256, 256, 3, groups=256), nn.Conv2d(8, 8, 1), BatchNormAct2d(4))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(7.0)
    initialise(layers)
    # 9 * 128 and, for the depthwise one, 9 * 256 as FFL's code counts it; the sample has 73 728 and 2 304 numbers.
    assert layers[0].weight.std().item() == pytest.approx((2 / 1152) ** 0.5, rel=0.02)
    assert layers[1].weight.std().item() == pytest.approx((2 / 2304) ** 0.5, rel=0.06)
    assert layers[0].weight.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert torch.equal(layers[2].bias, torch.zeros(8))
    assert torch.equal(layers[3].weight, torch.ones(4))
    assert torch.equal(layers[3].bias, torch.zeros(4))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_conv_has_no_bias_and_keeps_the_size_at_stride_1(kernel_size):
    layer = conv(4, 8, kernel_size, groups=2)
    assert layer.bias is None
    assert layer.weight.shape == (8, 2, kernel_size, kernel_size)
    assert layer(torch.randn(1, 4, 7, 9)).shape == (1, 8, 7, 9)
    assert conv(4, 8, kernel_size, stride=2)(torch.randn(1, 4, 7, 8)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_batch_norm_act_is_norm_then_shortcut_then_relu(act, added):
    layer = BatchNormAct2d(3, act)
    features, shortcut = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5) if added else None
    before = features.clone(), None if shortcut is None else shortcut.clone()
    expected = F.batch_norm(features, None, None, training=True)
    expected = expected if shortcut is None else expected + shortcut
    torch.testing.assert_close(layer(features, shortcut), expected.relu() if act else expected)
    assert torch.equal(features, before[0]) and (shortcut is None or torch.equal(shortcut, before[1]))
    assert layer.num_batches_tracked == 1


def test_stages_that_differ_in_an_activation_are_not_shared():
    assert repr(BatchNormAct2d(3)) != repr(BatchNormAct2d(3, act=False))


def test_pooled_linear_is_the_mean_then_the_classifier():
    head = PooledLinear(2, 3)
    feature_map = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]]])
    torch.testing.assert_close(head(feature_map), head.linear(torch.tensor([[3.0, 1.0]])))


def test_stages_and_widths_must_agree_in_number():
    with pytest.raises(UsageError, match="1 stages, but 2 widths"):
        Network([nn.Identity()], PooledLinear(3, 2), (3, 3))


def test_a_function_that_returns_no_network_is_one_line(monkeypatch):
    monkeypatch.setitem(NETWORKS._entries, "plain", lambda num_classes: nn.Linear(4, num_classes))
    with pytest.raises(UsageError, match=r"network plain: its function returns a Linear, .* codistill.network_from"):
        network("plain", 3)


def test_one_network_for_several_and_a_class_for_a_network_are_one_line():
    with pytest.raises(UsageError, match="dml: students is one network: hand in a list of networks"):
        METHODS["dml"](network("resnet8", 3), num_classes=3)
    with pytest.raises(UsageError, match=r"network_from: <class .*Linear'> is no torch.nn.Module: hand in a network"):
        network_from(nn.Linear)
