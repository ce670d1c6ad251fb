"""AB: boundaries by hand, maps before the ReLU, connectors, a whole step against a slow derivation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import codistill as cd
from codistill.core.errors import UsageError
from codistill.methods.ab import AB, boundary_distance
from codistill.methods.cohort import Outputs
from codistill.networks.chains import compiled_chains
from codistill.networks.layers import sums_kept
from codistill.networks.probe import activations
from codistill.training.compiling import Compiler

from . import slow

METHOD = AB
TERM = "boundary/teacher->student0"
NOW = torch.tensor(0.5)


def of(*values: float) -> torch.Tensor:
    return torch.tensor([[[list(values)]]])


def test_boundaries_by_hand(taught):
    own, other = of(0.5, -2.0, 0.3), of(-1.0, 1.0, 2.0)
    assert boundary_distance(own, other, 1.0).item() == pytest.approx(2.25 + 9 + 0.49)
    # Beyond the margin on the teacher's side nothing is missed; a teacher's 0 is not active.
    assert boundary_distance(of(1.5, -1.5, -0.5), of(2.0, -1.0, 0.0), 1.0).item() == pytest.approx(0.25)
    outputs = Outputs((torch.zeros(1, 3),), (own,), stage_maps=((own, own),), teacher_maps=(other, other))
    terms = taught((8, 2)).initial_losses(outputs, torch.tensor([0]))
    assert list(terms) == [TERM]  # the deepest pair has weight 1, the one before it a half
    assert terms[TERM].item() == pytest.approx(1.5 * 0.03522)


def test_the_second_form_without_temperature_squared(taught, batch):
    # --method.ce-weight 0 --method.kl-weight 1/9: KD alone, T = 3, without T^2.
    method = taught((8, 2), ce_weight=0.0, kl_weight=1 / 9)
    outputs = Outputs((torch.tensor([[2, 0.5, -1]]),), (), teacher_logits=torch.tensor([[3.0, 0, -2]]))
    terms = method.losses(outputs, torch.tensor([0]), NOW)
    assert terms["ce/student0"] == 0
    assert terms["kl/teacher->student0"].item() == pytest.approx(0.03862595, abs=1e-7)


def by_hand(method, batch, last_strides, teacher_stride):
    images, _ = batch
    taught = slow.stage_sums(method.taught_by.network, images, (1, 1, teacher_stride), trained=False)
    loss = torch.zeros((), dtype=torch.float64)
    for index, (student, last) in enumerate(zip(method.cohort, last_strides, strict=True)):
        own = slow.stage_sums(student, images, (1, 1, last))
        for number, weight in ((1, 0.5), (2, 1.0)):
            layer, mine = method.connectors[index][number - 1], own[number]
            if isinstance(layer, nn.Sequential):
                conv, norm = layer
                mine = slow.batch_norm(F.conv2d(mine, conv.weight, stride=conv.stride, padding=conv.padding), norm)
            for s, t in zip(mine.flatten(), taught[number].flatten(), strict=True):
                if t <= 0 and s > -1:
                    loss = loss + 0.003 * weight * (s + 1) ** 2 / len(images)
                if t > 0 and s <= 1:
                    loss = loss + 0.003 * weight * (s - 1) ** 2 / len(images)
    return loss


@pytest.mark.parametrize(("shapes", "teacher"), [([(8, 2)], (8, 2)), ([(5, 1)], (8, 2))])
def test_an_initial_step_against_a_slow_derivation(taught, batch, shapes, teacher):
    method = taught(*shapes, teacher=teacher)
    batch = batch[0][:2], batch[1][:2]
    method.initialising = True
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch, [last for _, last in shapes], teacher[1]))


def test_then_the_labels_alone_train_without_the_teacher(taught, batch, monkeypatch):
    method = taught((8, 2))
    monkeypatch.setattr(method.taught_by.network, "stages", None)  # it does not run
    _, logits = slow.run_students(method, batch[0], [2])
    slow.assert_step_agrees(method, batch, 10, slow.ce(logits[0], batch[1]))
    assert method.initial_epochs(270) == 30


def test_which_modules_the_term_reaches(taught, batch):
    method = taught((5, 2), (8, 2), initial_share=0.0)
    between = {"connector0": method.connectors[0]}
    assert slow.reached(method, batch, TERM, **between) == {"branch0", "connector0"}


def test_connectors_are_there_between_unlike_shapes_alone(taught):
    method = taught((8, 2), (5, 2))
    assert [[type(each) for each in connectors] for connectors in method.connectors] == [
        [nn.Identity, nn.Identity],
        [nn.Identity, nn.Sequential],
    ]
    result = method.connectors[1][1](torch.randn(2, 5, 4, 4).double())
    assert result.shape == (2, 8, 4, 4) and result.min() < 0  # no ReLU


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_views_and_a_trunk(taught, batch, shared):
    method = taught((8, 2), (8, 2), views_per_student=True, shared_stages=shared, initial_share=0.0)
    views = torch.stack([batch[0], batch[0].flip(3)])
    outputs = method(views)
    for index, view in enumerate(views):
        expected = slow.stage_sums(method.taught_by.network, view, (1, 1, 2), trained=False)
        for number in (1, 2):
            torch.testing.assert_close(outputs.teacher_maps[number - 1][index], expected[number])
        if not shared:  # the statistics of a trunk are those of all views
            own = slow.stage_sums(method.cohort[index], view, (1, 1, 2))
            torch.testing.assert_close(outputs.stage_maps[index], (own[1], own[2]))
    if shared == 2:  # the trunk's map before its ReLU, each student's own view of it
        for own, feature_map in zip(outputs.stage_maps, method.cohort.trunk(views), strict=True):
            torch.testing.assert_close(own[0].clamp(min=0), feature_map)


# Maps before the ReLU of a stage.


def kept(network: cd.Network, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The maps of all stages and, where there are some, those before their ReLU."""
    norms = [each for each in activations(network, (32, 32)) if each is not None]
    maps = [images]
    with sums_kept(norms):
        for stage in network.stages:
            maps.append(stage(maps[-1]))
        network.head(maps[-1])
        return maps[1:], [norm.sum for norm in norms]


@pytest.mark.parametrize("name", ["resnet8", "resnet8:shortcut=A", "vgg8", "resnet83-bottleneck"])
def test_before_the_last_relu_of_a_stage(name):
    network = cd.network(name, 3).train()
    maps, sums = kept(network, torch.randn(2, 3, 32, 32))
    assert len(sums) == len(maps)
    for feature_map, each in zip(maps, sums, strict=True):
        assert each.min() < 0
        torch.testing.assert_close(each.clamp(min=0), feature_map)


@pytest.mark.parametrize("name", ["wrn-16-1", "densenet-40-12"])
def test_before_the_first_relu_after_a_stage(name):
    network = cd.network(name, 3).eval()
    slow.disturb_norms(network)
    maps, sums = kept(network, torch.randn(2, 3, 32, 32))
    norms = activations(network, (32, 32))
    assert len(sums) == len(maps)
    for feature_map, each, norm in zip(maps[:-1], sums[:-1], norms[:-1], strict=True):
        torch.testing.assert_close(each, slow.batch_norm(feature_map, norm, trained=False))
    torch.testing.assert_close(sums[-1].clamp(min=0), maps[-1])


def test_what_is_kept_changes_nothing(batch):
    network = cd.network("resnet8", 3).eval()
    images = torch.randn(2, 3, 32, 32)
    before, states = network(images), [dict(vars(each)) for each in network.modules()]
    maps, _ = kept(network, images)
    assert torch.equal(network.head(maps[-1]), before) and torch.equal(network(images), before)
    assert [vars(each).keys() for each in network.modules()] == [each.keys() for each in states]


@pytest.mark.slow
def test_compiled_chains_keep_the_same(taught, batch):
    outputs = []
    for compiler in (None, Compiler({"compile_threads": 1})):
        torch.manual_seed(0)
        method = taught((8, 2)).to(memory_format=torch.channels_last)
        method.initialising = True
        with compiled_chains(compiler):
            loss = method.losses(method(batch[0]), batch[1], NOW)[TERM]
            loss.backward()
        assert compiler is None or not compiler.failed
        outputs.append((loss.detach(), [each.grad for each in method.initial_parameters()]))
    torch.testing.assert_close(*outputs)


def test_networks_without_an_answer_are_refused(taught, tiny_network):
    def message(stage: int, name: str) -> str:
        return rf"ab compares maps before a ReLU, but at the end of stage {stage} {name} has none of ours"

    # Its blocks end in batch normalisation, and the next ones begin with a convolution.
    with pytest.raises(UsageError, match=message(4, "mobilenetv2")):
        cd.WithTeacher(AB([cd.network("resnet8", 3)], 3), cd.network("mobilenetv2", 3))
    others = tiny_network()  # with a ReLU that is not ours
    others.stages[1] = nn.Sequential(others.stages[1][0], nn.BatchNorm2d(6), nn.ReLU())
    with pytest.raises(UsageError, match=message(1, "Network")):
        cd.WithTeacher(AB([others], 3, image_size=(8, 8)), tiny_network())
