"""What every network must do; a new family is covered by registering it."""

import pytest
import torch
import torch.nn.functional as F

from codistill.methods.cohort import Cohort
from codistill.networks import NETWORKS, network
from codistill.networks.layers import initialise
from codistill.networks.likeness import alike
from codistill.networks.network import parameter_count

from .. import tiny

NAMES = [name for name in NETWORKS if "*" not in name]
CHEAP = ["resnet8:conv=depthwise", "resnet8:conv=group,groups=4", "resnet8:conv=shift"]
OPTIONS = [
    "resnet20:shortcut=A",
    "densenet-40-12-plain:initial_channels=24",
    "mobilenetv2:feature_point=last-block",
    *CHEAP,
]
# One network for each kind of block: what computes runs on these, shapes of all are checked on the meta device.
KINDS = ["resnet20:shortcut=A", "resnet20:shortcut=B", "wrn-16-2", "densenet-40-12", "vgg8", *OPTIONS[1:]]

LONG = {"densenet-40-12-plain:initial_channels=24": pytest.mark.slow}  # to trace; densenet-40-12 has all its kinds


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32)


def test_the_families_are_registered():
    assert set(NAMES) >= {
        *("resnet20", "resnet32", "resnet56", "resnet110", "wrn-16-2", "wrn-40-2"),
        *("densenet-40-12", "densenet-40-12-plain", "mobilenetv2", "resnet18"),
    }


@pytest.mark.parametrize("spec", [*NAMES, *OPTIONS])
def test_logits_and_widths(spec, on_meta):
    built = on_meta(spec, 100)
    # The meta device has no numbers: a host read or a shape that depends on data would raise here.
    features, widths = torch.empty(2, 3, 32, 32, device="meta"), []
    for stage in built.stages:
        features = stage(features)
        widths.append(features.shape[1])
    assert built.head(features).shape == (2, 100)
    assert built.widths == tuple(widths)
    assert built.spec == spec


@pytest.mark.parametrize("spec", KINDS)
def test_the_feature_map_is_the_input_of_the_head(spec):
    built = network(spec, 10).eval()
    seen = []
    built.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = images()
    with torch.no_grad():
        logits = built(batch)
        feature_map = built.feature_map(batch)
        assert torch.equal(seen[0], feature_map)
        assert torch.equal(built.head(feature_map), logits)
        low = built.stages[0](batch)
        assert torch.equal(built.feature_map(low, first_stage=1), feature_map)
    assert feature_map.shape[1] == built.widths[-1]


@pytest.mark.parametrize("spec", KINDS)
def test_every_parameter_gets_a_finite_gradient(spec):
    built = network(spec, 10)
    F.cross_entropy(built(images()), torch.tensor([0, 1])).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("spec", KINDS)
def test_state_dict_round_trip(spec, shaken):
    built, other = shaken(network(spec, 10)), network(spec, 10).eval()
    batch = images()
    with torch.no_grad():
        assert not torch.equal(built(batch), other(batch))
        other.load_state_dict(built.state_dict())
        assert torch.equal(built(batch), other(batch))


@pytest.mark.parametrize("spec", KINDS)
def test_weights_are_fresh_and_repeat_under_a_seed(spec):
    torch.manual_seed(1)
    first, second = network(spec, 10), network(spec, 10)
    torch.manual_seed(1)
    again = network(spec, 10)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        if parameter.ndim > 1:
            assert not torch.equal(parameter, second.get_parameter(name)), name


@pytest.mark.parametrize("name", sorted({spec.partition(":")[0] for spec in KINDS}))
def test_families_leave_the_weights_to_initialise(name):
    torch.manual_seed(1)
    bare = NETWORKS[name](num_classes=10)
    initialise(bare)
    torch.manual_seed(1)
    assert all(map(torch.equal, bare.state_dict().values(), network(name, 10).state_dict().values()))


@pytest.mark.parametrize("spec", KINDS)
def test_the_spec_rebuilds_the_network(spec, on_meta):
    built = on_meta(spec, 10)
    rebuilt = on_meta(built.spec, 10)
    assert alike(rebuilt.stages, built.stages)
    assert repr(rebuilt.head) == repr(built.head)
    assert rebuilt.widths == built.widths


@pytest.mark.parametrize("spec", KINDS)
def test_two_branches_share_the_trunk_and_no_storage_else(spec):
    cohort = Cohort([network(spec, 10) for _ in range(2)])
    first, second = cohort[0], cohort[1]
    assert cohort.shared_stages == len(first.stages) - 1
    for index in range(cohort.shared_stages):
        assert first.stages[index] is second.stages[index]
    private = [[*student.stages[-1].parameters(), *student.head.parameters()] for student in (first, second)]
    storages = [{parameter.untyped_storage().data_ptr() for parameter in parameters} for parameters in private]
    assert len(storages[0]) == len(private[0])
    assert not storages[0] & storages[1]
    alone = network(spec, 10)
    branch = parameter_count(alone.stages[-1]) + parameter_count(alone.head)
    assert parameter_count(cohort) == parameter_count(alone) + branch


@pytest.mark.parametrize("spec", KINDS)
def test_stages_do_not_write_to_their_input(spec):
    built = network(spec, 10)
    features = images()
    for stage in built.stages:
        before = features.clone()
        output = stage(features)
        assert torch.equal(features, before)
        features = output.detach()
    before = features.clone()
    built.head(features)
    assert torch.equal(features, before)


@pytest.mark.parametrize("spec", KINDS)
def test_relu_in_place_changes_no_gradient(spec, monkeypatch):
    cohort = Cohort([network(spec, 10) for _ in range(2)])
    batch = images()

    def gradients() -> list[torch.Tensor]:
        maps = tiny.feature_maps(cohort, batch)
        logits = [cohort[index].head(feature_map) for index, feature_map in enumerate(maps)]
        loss = sum(logits).square().mean() + maps[0].mean() * maps[1].square().mean()
        return list(torch.autograd.grad(loss, list(cohort.parameters())))

    in_place = gradients()
    relu = F.relu
    monkeypatch.setattr(F, "relu", lambda features, inplace: relu(features))
    assert all(map(torch.equal, in_place, gradients()))


@pytest.mark.parametrize("spec", [pytest.param(each, marks=LONG.get(each, ())) for each in KINDS])
def test_exports_as_one_graph_for_any_batch_size(spec, shaken):
    built = shaken(network(spec, 10))
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(built, (images(2),), dynamic_shapes=(batch,)).module()
    larger = images(3)
    with torch.no_grad():
        torch.testing.assert_close(exported(larger), built(larger))
