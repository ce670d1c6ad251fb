"""What all multi-scale blocks must do: shapes, numbers of parameters, any batch, export, half precision."""

import re
import typing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from codistill.deploy.formats import write_onnx
from codistill.methods.mfef import MFEFSettings
from codistill.modules import ATTENTION, MULTISCALE, DualAttention, PyConv, Res2Net
from codistill.networks.network import parameter_count
from codistill.networks.probe import forward_flop

NAMES = list(MULTISCALE)
# Weights of convolutions and linear layers with their biases, worked from the formulas; and of batch normalisation.
COUNTS = {
    ("res2net", 64): (6_912, 96),
    ("res2net", 128): (27_648, 192),
    ("res2net", 132): (29_403, 198),
    ("res2net", 256): (110_592, 384),
    ("res2net", 512): (442_368, 768),
    ("res2net", 1280): (2_764_800, 1_920),
    ("pyconv", 64): (27_072, 128),
    ("pyconv", 128): (108_288, 256),
    ("pyconv", 132): (206_448, 264),
    ("pyconv", 256): (433_152, 512),
    ("pyconv", 512): (1_732_608, 1_024),
    ("pyconv", 1280): (10_828_800, 2_560),
    ("psa", 64): (27_121, 128),
    ("psa", 128): (108_450, 256),
    # As pyconv's; the two linear layers are as wide as the widest scale: 36 * 2 + 2 + 2 * 36 + 36.
    ("psa", 132): (206_448 + 182, 264),
    ("psa", 256): (433_732, 512),
    ("psa", 512): (1_734_792, 1_024),
    ("psa", 1280): (10_841_940, 2_560),
    ("aspp", 64): (34_816, 288),
    ("aspp", 128): (139_264, 576),
    ("aspp", 132): (148_104, 594),
    ("aspp", 256): (557_056, 1_152),
    ("aspp", 512): (2_228_224, 2_304),
    ("aspp", 1280): (13_926_400, 5_760),
    ("hs", 64): (14_544, 136),
    ("hs", 132): (62_577, 282),
}


@pytest.mark.parametrize(("name", "channels"), COUNTS)
def test_parameters(name, channels):
    with torch.device("meta"):
        block = MULTISCALE[name](channels)
    norms = sum(parameter_count(layer) for layer in block.modules() if isinstance(layer, nn.BatchNorm2d))
    assert (parameter_count(block) - norms, norms) == COUNTS[name, channels]


def test_parameters_of_options():
    with torch.device("meta"):
        counts = [parameter_count(PyConv(64, levels)) - 128 for levels in (1, 2, 3, 4)]
        residual = parameter_count(Res2Net(64, residual=True)) - parameter_count(Res2Net(64))
    assert counts == [36_864, 31_232, 28_160, 27_072]
    assert residual == 2 * 64**2 + 4 * 64


@pytest.mark.parametrize("channels", [64, 128, 132, 256, 512, 1280])
@pytest.mark.parametrize("name", NAMES)
def test_the_output_has_the_shape_of_the_input(name, channels):
    with torch.device("meta"):
        block = MULTISCALE[name](channels)
        for size in ((1, 1), (1, 2), (3, 3), (4, 4), (8, 8), (16, 16), (5, 9)) if channels == 64 else ((1, 1), (5, 9)):
            maps = torch.empty(2, channels, *size)
            assert block(maps).shape == maps.shape


@pytest.mark.parametrize("name", NAMES)
def test_narrow_maps(name):
    for channels in (8, 12, 16, 20):
        maps = torch.randn(2, channels, 4, 4)
        assert MULTISCALE[name](channels)(maps).shape == maps.shape


@pytest.mark.parametrize("size", [(2, 1), (4, 4), (8, 8)])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_image_in_training(name, size):
    block, maps = MULTISCALE[name](16), torch.randn(1, 16, *size)
    before = [each.clone() for each in block.buffers()]
    output = block.train()(maps)
    output.square().sum().backward()
    assert output.isfinite().all() and all(each.grad.isfinite().all() for each in block.parameters())
    assert any(not torch.equal(*pair) for pair in zip(before, block.buffers(), strict=True))  # it was in training
    with torch.no_grad():
        assert block.eval()(maps).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name):
    block, maps = MULTISCALE[name](16).double().eval(), torch.randn(7, 16, 4, 4, dtype=torch.float64)
    together = block(maps)
    for images in ([0], [3, 5]):
        torch.testing.assert_close(block(maps[images]), together[images], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    block, maps = MULTISCALE[name](16), torch.randn(4, 16, 4, 4)
    expected = block(maps)
    with torch.autocast("cpu", dtype):
        output = block(maps)
        output.float().square().mean().backward()
    assert output.isfinite().all() and all(each.grad.isfinite().all() for each in block.parameters())
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_neither_input_nor_gradient_is_written_to(name):
    block, maps = MULTISCALE[name](16), torch.randn(2, 16, 4, 4, requires_grad=True)
    before = maps.detach().clone()
    block(maps).sum().backward()
    assert torch.equal(maps, before) and maps.grad.any()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """All blocks and kinds of attention beside MFEF's in a row, as ONNX; and what they compute in PyTorch."""
    torch.manual_seed(0)
    blocks = [kind(16) for name, kind in MULTISCALE.items() if name != "hs"]
    attention = [DualAttention(16, norm=True, kind=kind) for kind in ("channel", "spatial-channel")]
    module = nn.Sequential(nn.Conv2d(3, 16, 1), *blocks, *attention, nn.Flatten(), nn.Linear(256, 3)).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.running_mean, std=0.1)
    path = tmp_path_factory.mktemp("onnx") / "blocks.onnx"
    card = {"image_size": [4, 4], "mean": [0.0] * 3, "std": [1.0] * 3}
    write_onnx(module, card, path)
    return module, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_export_to_onnx(exported, batch):
    module, session = exported
    pixels = np.random.default_rng(batch).integers(0, 256, (batch, 3, 4, 4), dtype=np.uint8)
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels) / 255).numpy()
    (logits,) = session.run(["logits"], {"images": pixels})
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_settings_name_every_block_and_every_attention():
    hints = typing.get_type_hints(MFEFSettings)
    assert typing.get_args(hints["multiscale"]) == (*MULTISCALE, "none")
    assert typing.get_args(hints["attention"]) == (*ATTENTION, "none")


def test_operations_by_hand():
    # Two for each weight and place; of PSA's linear layers for each scale, of ASPP's pooled branch once.
    by_hand = {"res2net": 64 * 6_912, "pyconv": 64 * 27_072, "hs": 64 * 14_544}
    by_hand |= {"psa": 64 * 27_072 + 4 * 2 * 16, "aspp": 64 * (34_816 - 16 * 64) + 16 * 64}
    for name, count in by_hand.items():
        assert forward_flop(MULTISCALE[name](64), (8, 8), channels=64) == 2 * count


def test_the_table_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "multiscale.md").read_text()
    widths = [int(each) for each in re.search(r"\| block \|(.*)\| operations", page)[1].split("|")]
    rows = re.findall(r"^\| `(\w+)` \|((?: [\d,]+ \|)+)$", page, re.MULTILINE)
    assert [name for name, _ in rows] == NAMES and widths == [64, 128, 132, 256, 512, 1280]
    for name, cells in rows:
        *counts, flops = (int(each.replace(",", "")) for each in cells.strip("| ").split("|"))
        with torch.device("meta"):
            assert counts == [parameter_count(MULTISCALE[name](width)) for width in widths]
        assert flops == forward_flop(MULTISCALE[name](64), (8, 8), channels=64)
