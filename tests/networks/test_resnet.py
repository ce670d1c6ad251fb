import re

import pytest
import torch
import torch.nn.functional as F

from codistill.core.errors import UsageError
from codistill.methods.cohort import Cohort
from codistill.networks import network
from codistill.networks.network import parameter_count
from codistill.networks.probe import probe_shapes
from codistill.networks.resnet import BasicBlock, PaddedShortcut

from .conftest import norm

# Shortcut B for 10 and 100 classes, A for 10 and 100 classes; by formula, cross-checked in the literature.
COUNTS = {
    "resnet8": (78_042, 83_892, 75_290, 81_140),
    "resnet14": (175_258, 181_108, 172_506, 178_356),
    "resnet20": (272_474, 278_324, 269_722, 275_572),
    "resnet32": (466_906, 472_756, 464_154, 470_004),
    "resnet44": (661_338, 667_188, 658_586, 664_436),
    "resnet56": (855_770, 861_620, 853_018, 858_868),
    "resnet110": (1_730_714, 1_736_564, 1_727_962, 1_733_812),
}
STAGES = {
    "resnet20": [464, 14_016, 51_648, 205_696],
    "resnet32": [464, 23_360, 88_768, 353_664],
    "resnet56": [464, 42_048, 163_008, 649_600],
    "resnet110": [464, 84_096, 330_048, 1_315_456],
}
BRANCHES = [
    ("resnet20", 2, 100, 490_520),
    ("resnet32", 2, 100, 832_920),
    ("resnet56", 2, 100, 1_517_720),
    ("resnet110", 2, 100, 3_058_520),
    ("resnet20", 2, 10, 478_820),
    ("resnet32", 2, 10, 821_220),
    ("resnet56", 2, 10, 1_506_020),
    ("resnet110", 2, 10, 3_046_820),
    ("resnet32", 3, 100, 1_193_084),
    ("resnet56", 3, 100, 2_173_820),
]


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name, on_meta):
    forms = [(name, 10), (name, 100), (f"{name}:shortcut=A", 10), (f"{name}:shortcut=A", 100)]
    assert tuple(parameter_count(on_meta(*form)) for form in forms) == COUNTS[name]
    assert parameter_count(on_meta(f"{name}:shortcut=B", 10)) == COUNTS[name][0]


@pytest.mark.parametrize("name", STAGES)
def test_stage_counts(name, on_meta):
    counts = [parameter_count(stage) for stage in on_meta(name, 10).stages]
    assert counts == STAGES[name]
    # Without the 1x1 convolutions 16->32 and 32->64 and their batch normalisations.
    without = [parameter_count(stage) for stage in on_meta(f"{name}:shortcut=A", 10).stages]
    assert without == [counts[0], counts[1], counts[2] - 16 * 32 - 64, counts[3] - 32 * 64 - 128]


@pytest.mark.parametrize(("name", "branches", "num_classes", "count"), BRANCHES)
def test_branches_on_one_trunk(name, branches, num_classes, count, on_meta):
    cohort = Cohort([on_meta(name, num_classes) for _ in range(branches)])
    assert cohort.shared_stages == 3
    assert parameter_count(cohort) == count


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("name", COUNTS)
def test_stage_shapes(name, shortcut, on_meta):
    built = on_meta(f"{name}:shortcut={shortcut}", 10)
    assert probe_shapes(built, (32, 32)) == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    if name in ("resnet8", "resnet110"):
        assert probe_shapes(built, (27, 33)) == [(16, 27, 33), (16, 27, 33), (32, 14, 17), (64, 7, 9)]


@pytest.mark.parametrize(
    ("shortcut", "hint"), [("C", "choose from A, B"), ("a", "did you mean A?"), ("", "choose from")]
)
def test_unknown_shortcuts_are_refused(shortcut, hint):
    with pytest.raises(UsageError, match=f"resnet20: option shortcut is '{shortcut}': {re.escape(hint)}"):
        network(f"resnet20:shortcut={shortcut}", 10)


def test_shortcut_a_subsamples_and_pads_both_sides():
    features = torch.arange(1.0, 19.0).reshape(1, 2, 3, 3)
    padded = PaddedShortcut(2, 4, 2)(features)
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    assert padded.tolist() == [[zeros, [[1.0, 3.0], [7.0, 9.0]], [[10.0, 12.0], [16.0, 18.0]], zeros]]
    # An odd number of new channels: the larger half behind.
    assert PaddedShortcut(2, 5, 1)(features).flatten(2).any(dim=2).tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize(
    ("in_channels", "stride", "shortcut"), [(8, 1, "A"), (8, 1, "B"), (4, 2, "A"), (4, 2, "B"), (4, 1, "B")]
)
def test_block_against_the_formula(in_channels, stride, shortcut, shaken):
    block = shaken(BasicBlock(in_channels, 8, stride, shortcut))
    x = torch.randn(2, in_channels, 6, 6)
    y = F.relu(norm(block.bn1, F.conv2d(x, block.conv1.weight, stride=stride, padding=1)))
    y = norm(block.bn2, F.conv2d(y, block.conv2.weight, padding=1))
    if in_channels == 8:
        skipped = x
    elif shortcut == "A":
        zeros = torch.zeros(2, 2, 3, 3)
        skipped = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
    else:
        skipped = norm(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight, stride=stride))
    torch.testing.assert_close(block(x), F.relu(y + skipped))


def test_resnet18_counts_shapes_and_split(on_meta):
    built = on_meta("resnet18", 10)
    assert parameter_count(built) == 11_173_962
    assert parameter_count(on_meta("resnet18", 100)) == 11_173_962 + 90 * 513
    assert parameter_count(built.stages[:-1]) == 2_775_104
    assert parameter_count(built.stages[-1]) + parameter_count(built.head) == 8_398_858
    shapes = [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert probe_shapes(built, (32, 32)) == shapes
    assert parameter_count(Cohort([on_meta("resnet18", 10) for _ in range(2)])) == 19_572_820


@pytest.mark.parametrize(("name", "count"), [("resnet8x4", 1_233_540), ("resnet32x4", 7_433_860)])
def test_four_times_as_wide(name, count, on_meta):
    assert parameter_count(on_meta(name, 100)) == count == parameter_count(on_meta(name, 10)) + 90 * 257
    assert probe_shapes(on_meta(name, 10), (32, 32)) == [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
