"""Cheap convolutions: shifts by hand, blocks against the formula, parameters, export with operators of ONNX alone."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

import codistill as cd
from codistill.core.errors import UsageError
from codistill.methods.cohort import Cohort
from codistill.networks import network
from codistill.networks.cheap import Shift
from codistill.networks.likeness import alike
from codistill.networks.network import parameter_count
from codistill.networks.resnet import CheapBlock

from .. import tiny
from .conftest import norm

BLOCKS = {
    "depthwise": [864, 2_752, 9_600],
    "shift": [576, 2_176, 8_448],
    "group": [5_184, 20_608, 82_176],
    "standard": [4_672, 18_560, 73_984],
}
WHOLE = {"depthwise": 119_818, "shift": 102_106, "group": 938_458, "standard": 855_770}


@pytest.mark.parametrize("conv", BLOCKS)
def test_parameters_of_blocks(conv, on_meta):
    assert [parameter_count(stage[-1]) for stage in on_meta(f"resnet14:conv={conv}", 10).stages[1:]] == BLOCKS[conv]


@pytest.mark.parametrize("conv", WHOLE)
def test_parameters_of_resnet56(conv, on_meta):
    assert parameter_count(on_meta(f"resnet56:conv={conv}", 10)) == WHOLE[conv]


@pytest.mark.parametrize("groups", [2, 4, 8, 16])
def test_parameters_of_groups(groups, on_meta):
    built = on_meta(f"resnet20:conv=group,groups={groups}", 10)
    assert [parameter_count(stage[-1]) for stage in built.stages[1:]] == [
        2 * (9 * width**2 // groups + width**2 + 2 * width) for width in (16, 32, 64)
    ]


def moved(channels: int, channel: int) -> tuple[int, int]:
    """Where the pixel in the middle of 5x5 goes, (row, column), from the middle."""
    features = torch.zeros(1, channels, 5, 5)
    features[0, channel, 2, 2] = 1.0
    (place,) = Shift(channels)(features).nonzero().tolist()
    assert place[1] == channel
    return place[2] - 2, place[3] - 2


def test_shifts_by_hand():
    # Of 11 channels nine move: three columns for each of three rows; the last two stay.
    rows = [-1, -1, -1, 0, 0, 0, 1, 1, 1, 0, 0]
    columns = [-1, 0, 1, -1, 0, 1, -1, 0, 1, 0, 0]
    assert [moved(11, channel) for channel in range(11)] == list(zip(rows, columns, strict=True))
    assert [moved(20, channel) for channel in (9, 13, 17, 18, 19)] == [(-1, -1), (0, 0), (1, 1), (0, 0), (0, 0)]
    assert {moved(8, channel) for channel in range(8)} == {(0, 0)}


def test_what_comes_in_is_zero():
    features = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3).expand(1, 9, 3, 3)
    shifted = Shift(9)(features)[0]
    assert shifted[0].tolist() == [[5.0, 6.0, 0.0], [8.0, 9.0, 0.0], [0.0, 0.0, 0.0]]
    assert shifted[5].tolist() == [[0.0, 1.0, 2.0], [0.0, 4.0, 5.0], [0.0, 7.0, 8.0]]
    assert torch.equal(shifted[4], features[0, 4])


def test_a_shift_has_nothing_to_train_or_to_save():
    assert parameter_count(Shift(16)) == 0 and Shift(16).state_dict() == {}
    first, second = network("resnet8:conv=shift", 10), network("resnet8:conv=shift", 10)
    assert torch.equal(first.stages[1][0].units[0][0].weight, second.stages[1][0].units[0][0].weight)


@pytest.mark.parametrize(("conv", "groups"), [("depthwise", 1), ("group", 2), ("shift", 1)])
@pytest.mark.parametrize(("before", "stride"), [(16, 1), (8, 2)])
def test_block_against_the_formula(conv, groups, before, stride, shaken):
    block = shaken(CheapBlock(before, 16, stride, "B", conv, groups))
    x = torch.randn(2, before, 6, 6)

    def unit(features, layers, stride):
        spatial, pointwise, normed = layers
        if conv == "shift":
            features = spatial(features)
        else:
            count = features.shape[1] if conv == "depthwise" else groups
            features = F.conv2d(features, spatial.weight, padding=1, groups=count)
        return norm(normed, F.conv2d(features, pointwise.weight, stride=stride)).clamp(min=0)

    expected = unit(unit(x, block.units[0], stride), block.units[1], 1)
    skipped = x
    if before == 8:
        skipped = norm(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight, stride=stride))
    torch.testing.assert_close(block(x), expected + skipped)  # no ReLU behind the addition


def test_unlike_convolutions_share_nothing(on_meta):
    specs = [f"resnet8:conv={each}" for each in ("standard", "depthwise", "shift", "group")]
    specs += ["resnet8:conv=group,groups=2"]
    stages = [on_meta(spec, 10).stages[1:] for spec in specs]
    assert not any(alike(one, other) for index, one in enumerate(stages) for other in stages[:index])
    assert Cohort([on_meta(specs[1], 10), on_meta(specs[2], 10)]).shared_stages == 0
    shared = Cohort([on_meta(specs[1], 10), on_meta(specs[2], 10)], 1)
    assert shared[0].stages[0] is shared[1].stages[0]  # the stem is the same


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("conv=group,groups=3", "network resnet8: option groups is 3; it must be 1, 2, 4, 8 or 16"),
        ("conv=group,groups=0", "option groups is 0; it must be"),
        ("conv=shift,groups=4", "option groups is 4; it is for conv=group, but conv is shift"),
        ("groups=4", "option groups is 4; it is for conv=group, but conv is standard"),
        ("conv=depthwize", "option conv is 'depthwize': did you mean depthwise"),
    ],
)
def test_impossible_options_are_refused(options, line):
    with pytest.raises(UsageError, match=line):
        network(f"resnet8:{options}", 10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two students with shifts and one with depthwise convolutions, trained for an epoch."""
    folder = tmp_path_factory.mktemp("cheap")
    data = cd.dataset("packed", tiny.write_npz(folder / "colours.npz", tiny.data()))
    students = [cd.network(f"resnet8:conv={conv}", 3) for conv in ("shift", "shift", "depthwise")]
    method = cd.OKDCheap(students, 3, image_size=(8, 8))
    return cd.train(method, data, out=folder / "run", settings=tiny.settings(epochs=1), show=False)


def test_a_run_is_opened_by_the_names_of_its_networks(run):
    assert run.summary["networks"] == ["resnet8:conv=shift"] * 2 + ["resnet8:conv=depthwise"]
    method, images = run.load_method(), torch.randn(4, 3, 8, 8)
    again = copy.deepcopy(method)
    again.load_state_dict(method.state_dict())
    assert all(map(torch.equal, method(images).logits, again(images).logits))


def test_exports_have_only_operators_of_onnx(run):
    path = run.export("student0", run.path / "student0.onnx")
    graph = onnx.load(path)
    assert {each.domain for each in graph.graph.node} <= {""} and not graph.functions
    assert "Conv" in {each.op_type for each in graph.graph.node}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    method, data = run.load_method(), run.load_data()
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in data.statistics)
    for batch in (1, 2, 7):
        pixels = np.ascontiguousarray(data.test.images[:batch].transpose(0, 3, 1, 2))
        with torch.no_grad():
            expected = method((torch.from_numpy(pixels) / 255 - mean) / std).logits[0]
        (logits,) = session.run(["logits"], {"images": pixels})
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
