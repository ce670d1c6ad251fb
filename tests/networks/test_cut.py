"""Networks of somebody else's, cut into stages and a head: what they compute, hold and are called stays."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import codistill as cd
from codistill.core.errors import UsageError
from codistill.methods.cohort import Cohort
from codistill.networks.cut import map_of_tokens, tokens_of_map
from codistill.networks.likeness import alike


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Common(nn.Module):
    """As most code on the web has it: functions between the submodules, and pooling in forward."""

    def __init__(self, classes: int = 5, drop: float = 0.5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 6, 1), Block(6, 6, 1))
        self.layer2 = nn.Sequential(Block(6, 8, 2), Block(8, 8, 1))
        self.layer3 = nn.Sequential(Block(8, 10, 2))
        self.scale = nn.Parameter(torch.ones(10))
        self.fc = nn.Linear(10, classes)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1) * self.scale
        return self.fc(F.dropout(x, self.drop, self.training))


def images(batch: int = 3, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size)


@pytest.mark.parametrize("stages", [(), ("bn1", "layer2.0", "layer3"), ("layer3",)])
@pytest.mark.parametrize("training", [False, True])
def test_the_parts_compute_what_the_whole_does(stages, training):
    module = Common()
    built, batch = cd.network_from(module, stages), images()
    twin = copy.deepcopy(built).train(training)
    whole = copy.deepcopy(module).train(training)
    torch.manual_seed(1)
    wanted = whole(batch)
    torch.manual_seed(1)
    assert torch.equal(twin(batch), wanted)
    torch.manual_seed(2)
    assert torch.equal(whole(batch), wanted) is not training  # the dropout draws, in training alone
    assert [each.shape[1] for each in twin_maps(twin, batch)] == list(built.widths)


def twin_maps(built: cd.Network, batch: Tensor) -> list[Tensor]:
    maps = [batch]
    for stage in built.stages:
        maps.append(stage(maps[-1]))
    return maps[1:]


def test_stages_end_where_the_resolution_changes_or_where_they_are_named():
    module = Common()
    found = cd.network_from(module)
    assert found.widths == (6, 8, 10)
    assert next(iter(found.stages[0].state_dict())) == "conv1.weight"
    assert [*found.head.state_dict()] == ["scale", "fc.weight", "fc.bias"]
    named = cd.network_from(module, ["bn1", "layer1.0", "layer2", "layer3.0"])
    assert named.widths == (4, 6, 8, 10)
    assert {name.partition(".")[0] for name in named.stages[2].state_dict()} == {"layer1", "layer2"}


def test_names_and_weights_are_those_of_the_module():
    module = Common()
    built = cd.network_from(module)
    assert {*map(id, built.parameters())} == {*map(id, module.parameters())}
    state = built.original_state_dict()
    assert state.keys() == module.state_dict().keys()
    other = Common()
    other.load_state_dict(state)
    batch = images()
    assert torch.equal(other.eval()(batch), built.eval()(batch))
    assert built.spec == ""


def test_the_module_is_left_as_it_was():
    module = Common().train()
    module.layer2.eval()
    before, drawn = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    cd.network_from(module)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    assert module.training and not module.layer2.training and not module.layer2[0].training


def test_equal_ones_share_a_trunk_and_others_do_not():
    first, second, other = (cd.network_from(Common(drop=drop), ["layer1", "layer3"]) for drop in (0.5, 0.5, 0.1))
    assert alike(first.stages, second.stages)
    assert Cohort([first, second]).shared_stages == 1
    assert first.stages[0] is second.stages[0]
    named = cd.network_from(Common(), ["layer2", "layer3"])
    assert not alike(first.stages, named.stages)
    assert Cohort([other, named]).shared_stages == 0


def test_a_head_that_writes_to_its_input_gets_a_copy():
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.fc = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.features(x), inplace=True).mean((2, 3)))

    built = cd.network_from(Dense(), ["features"])
    feature_map = built.feature_map(images())
    before = feature_map.clone()
    built.head(feature_map)
    assert torch.equal(feature_map, before)


class Branching(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.unused, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> object:
        x = self.a(x)
        y = self.c(self.b(x))
        x = y + x if self.how == "skips" else y
        if self.how == "values" and x.sum() > 0:
            x = -x
        logits = self.fc(x.mean((2, 3)))
        if self.how == "auxiliary" and self.training:
            return logits, logits
        return {"logits": logits} if self.how == "table" else logits


@pytest.mark.parametrize(
    ("how", "stages", "says"),
    [
        ("skips", ["b"], r"stage 'b': more than its result passes on to what follows; choose from a, fc"),
        ("plain", ["b", "a"], "stages b, a are not in the order of the forward pass"),
        ("plain", ["b", "b"], "stages b, b are not in the order"),
        ("plain", ["unused"], "stage 'unused': its forward does not call it"),
        ("plain", ["unuse"], r"stage 'unuse': did you mean unused\?"),
        ("values", ["a"], "its forward cannot be traced: "),
        ("auxiliary", ["a"], "its forward takes another way in evaluation than in training"),
        ("table", ["a"], "it returns a immutable_dict, not logits alone"),
    ],
)
def test_what_cannot_be_cut_says_why_and_what_to_do(how, stages, says):
    with pytest.raises(UsageError, match=rf"^Branching cannot be cut.*{says}.*: make a Network"):
        cd.network_from(Branching(how), stages)


def test_images_that_it_cannot_take_are_named():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    with pytest.raises(UsageError, match=r"Sequential cannot be cut .*: it cannot take 128x128 images"):
        cd.network_from(module)
    assert cd.network_from(module, image_size=(8, 8)).widths == (4,)


def test_a_module_without_maps_is_refused():
    with pytest.raises(UsageError, match="its forward does not pass maps from submodule to submodule"):
        cd.network_from(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 2)), image_size=(4, 4))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("centred", [False, True])
def test_a_map_of_tokens_has_the_class_token_as_its_mean(prefix, height, width, centred):
    tokens = torch.randn(2, prefix + height * width, 5, dtype=torch.float64)
    centred = centred and prefix > 0
    feature_map = map_of_tokens(tokens, prefix, height, width, centred)
    assert feature_map.shape == (2, 5, height, width)
    back = tokens_of_map(feature_map, prefix)
    if centred:
        torch.testing.assert_close(feature_map.mean((2, 3)), tokens[:, 0])
        torch.testing.assert_close(back[:, 0], tokens[:, 0])
    else:
        assert torch.equal(back[:, prefix:], tokens[:, prefix:])
    # Row after row, as the patches are.
    row = feature_map[:, :, 0].transpose(1, 2)
    expected = tokens[:, prefix : prefix + width]
    torch.testing.assert_close(row - row.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True))
