"""MFEF: a whole step against a slow derivation, gradient flow, the ablation of Table 5, settings."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.independent import Independent
from codistill.methods.mfef import MFEF, MFEFSettings
from codistill.modules import ATTENTION, DualAttention, FeatureFusion, MultiScaleExtraction
from codistill.networks import Network, network
from codistill.networks.network import parameter_count

from .. import tiny
from . import slow

METHOD = MFEF
FULL = torch.tensor(1.0)
# By hand, 8 channels in 4 groups, widths 2, 3, 4: 9 (4 + 9 + 16) + 2 (2 + 3 + 4); hidden width 1: 8 + 8 + 2 * 49.
STUDENT, MSFE, DA, FUSION = 819, 279, 114, 347


# The slow derivation, down to loss_by_hand, takes nothing of codistill but the weights.


def conv_bn_relu(features: Tensor, layers: nn.Sequential, stride: int = 1) -> Tensor:
    return slow.batch_norm(F.conv2d(features, layers[0].weight, stride=stride, padding=1), layers[1]).clamp(min=0)


def extracted(features: Tensor, msfe: MultiScaleExtraction) -> Tensor:
    """Eq. (4) with p = 4: the first part straight out, halves carried, the last part whole."""
    f1, f2, f3, f4 = torch.tensor_split(features, 4, dim=1)
    carried2, exported2 = torch.tensor_split(conv_bn_relu(f2, msfe.transforms[0]), 2, dim=1)
    joined = torch.cat([f3, carried2], dim=1)
    carried3, exported3 = torch.tensor_split(conv_bn_relu(joined, msfe.transforms[1]), 2, dim=1)
    last = conv_bn_relu(torch.cat([f4, carried3], dim=1), msfe.transforms[2])
    return torch.cat([f1, exported2, exported3, last], dim=1)


def attended(features: Tensor, da: DualAttention) -> Tensor:
    """Eqs. (5)-(8)."""

    def perceptron(pooled: Tensor) -> Tensor:
        return (pooled @ da.channel[0].weight.T).clamp(min=0) @ da.channel[2].weight.T

    both = perceptron(features.mean((2, 3))) + perceptron(features.amax((2, 3)))
    weighted = features / (1 + torch.exp(-both))[:, :, None, None]
    pooled = torch.stack([weighted.mean(1), weighted.amax(1)], dim=1)
    return weighted / (1 + torch.exp(-F.conv2d(pooled, da.spatial[0].weight, padding=3)))


def fused(maps: list[Tensor], fusion: FeatureFusion) -> Tensor:
    smallest = min(each.shape[2] for each in maps)
    alike = [
        each if each.shape[2] == smallest else conv_bn_relu(each, adapter[0], stride=2)
        for each, adapter in zip(maps, fusion.adapters, strict=True)
    ]
    joined = torch.cat(alike, dim=1)
    (depthwise, first), (pointwise, second) = fusion.transfer
    filtered = [
        F.conv2d(joined[:, index : index + 1], depthwise.weight[index : index + 1], padding=1)
        for index in range(joined.shape[1])
    ]
    spatial = slow.batch_norm(torch.cat(filtered, dim=1), first).clamp(min=0)
    mixed = torch.einsum("oc,bchw->bohw", pointwise.weight[:, :, 0, 0], spatial)
    return (
        slow.batch_norm(mixed, second).clamp(min=0).mean((2, 3)) @ fusion.head.linear.weight.T + fusion.head.linear.bias
    )


def loss_by_hand(method: MFEF, images: Tensor, labels: Tensor, strides: list[int], epoch: int) -> Tensor:
    """Eqs. (1)-(11), batch mean, ramp-up over 80 of 300 epochs, teachers held fixed."""
    stages, _ = slow.run_students(method, images, strides)
    maps = [
        attended(extracted(own[-1], msfe), da)
        for own, (msfe, da) in zip(stages, (each.steps for each in method.enhancements), strict=True)
    ]
    logits = [slow.head_logits(student, each) for student, each in zip(method.cohort, maps, strict=True)]
    fused_logits = fused(maps, method.fusion)

    def kl(teacher: Tensor, student: Tensor) -> Tensor:
        return slow.kl(slow.probabilities(teacher.detach(), 3.0), student, 3.0)

    distillation = sum(kl(fused_logits, each) for each in logits) + kl(sum(logits) / len(logits), fused_logits)
    ce = sum(slow.ce(each, labels) for each in (*logits, fused_logits))
    return ce + slow.ramp(epoch) * 9 * distillation


@pytest.mark.parametrize("epoch", [0, 40, 80])
@pytest.mark.parametrize(
    "shapes",
    [[(8, 2), (8, 2)], [(8, 2), (10, 2)], [(8, 2), (8, 1)], [(8, 2), (8, 2), (8, 2)], [(12, 1), (8, 2), (9, 1)]],
    ids=["equal", "unlike-widths", "unlike-resolutions", "three-equal", "three-unlike"],
)
def test_a_whole_step_agrees_with_a_slow_derivation(make, batch, shapes, epoch):
    method = make(*shapes)
    slow.disturb_norms(method)
    by_hand = loss_by_hand(method, *batch, [stride for _, stride in shapes], epoch)
    slow.assert_step_agrees(method, batch, epoch, by_hand)


def reached(method: MFEF, batch: tuple[Tensor, Tensor], term: str) -> set[str]:
    components = {
        f"{part}{index}": step
        for index, enhancement in enumerate(method.enhancements)
        for part, step in zip(("msfe", "da"), enhancement.steps, strict=True)
    }
    return slow.reached(method, batch, term, fusion=method.fusion, **components)


# Students of unlike width, so that no trunk is shared.
UNLIKE = [(8, 2), (10, 2)]
ENHANCED = {f"{part}{index}" for part in ("branch", "msfe", "da") for index in range(2)}


def test_the_fused_classifier_stops_at_its_input_when_told(make, batch):
    method = make(*UNLIKE, detach_fusion_input=True)
    assert reached(method, batch, "ce/fused") == {"fusion"}
    assert reached(method, batch, "kl/ensemble->fused") == {"fusion"}


def test_teachers_learn_too_when_not_detached(make, batch):
    method = make(*UNLIKE, detach_teachers=False)
    assert reached(method, batch, "kl/fused->student0") == ENHANCED | {"head0", "fusion"}
    assert reached(method, batch, "kl/ensemble->fused") == ENHANCED | {"head0", "head1", "fusion"}


@pytest.mark.parametrize("detach", [True, False])
def test_the_ensemble_as_the_students_teacher(make, batch, detach):
    method = make(*UNLIKE, distillation="ensemble", multiscale="none", attention="none", detach_teachers=detach)
    value = method.losses(method(batch[0]), batch[1], FULL)["kl/ensemble->student0"]
    others = torch.autograd.grad(value, list(method.cohort[1].parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in others) == (not detach)


def kinds(method: MFEF) -> set[str]:
    known = (MultiScaleExtraction, DualAttention, FeatureFusion)
    return {type(module).__name__ for module in method.modules() if isinstance(module, known)}


FUSION_TERMS = {"ce/fused", "kl/fused->student0", "kl/fused->student1", "kl/ensemble->fused"}
ENSEMBLE_TERMS = {"kl/ensemble->student0", "kl/ensemble->student1"}
E, D, F_ = "MultiScaleExtraction", "DualAttention", "FeatureFusion"


@pytest.mark.parametrize(
    ("settings", "modules", "more_terms", "enhancement"),
    [
        ({"multiscale": "none", "attention": "none", "distillation": "none"}, set(), set(), 0),
        ({"attention": "none", "distillation": "none"}, {E}, set(), MSFE),
        ({"multiscale": "none", "attention": "none", "distillation": "ensemble"}, set(), ENSEMBLE_TERMS, 0),
        ({"attention": "none"}, {E, F_}, FUSION_TERMS, MSFE),
        ({}, {E, D, F_}, FUSION_TERMS, MSFE + DA),
    ],
    ids="ABCDE",
)
def test_table_5(make, batch, settings, modules, more_terms, enhancement):
    method = make(**settings)
    assert kinds(method) == modules
    fusion = FUSION if F_ in modules else 0
    assert parameter_count(method) == parameter_count(method.cohort) + 2 * enhancement + fusion
    assert [parameter_count(method.deployed_student(index)) for index in range(2)] == [STUDENT + enhancement] * 2
    outputs = method.eval()(batch[0])
    names = ["student0", "student1", "ensemble", *(["fused"] if fusion else [])]
    assert list(method.predictors()) == list(method.predictions(outputs)) == names
    assert set(method.losses(outputs, batch[1], FULL)) == {"ce/student0", "ce/student1"} | more_terms
    assert [group.name for group in method.parameter_groups()] == ["students", *(["fusion"] if fusion else [])]
    grouped = [id(parameter) for group in method.parameter_groups() for parameter in group.parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in method.parameters())


def test_case_a_is_independent_training_of_a_shared_trunk(make, batch, tiny_network):
    method = make(multiscale="none", attention="none", distillation="none")
    plain = Independent([tiny_network(), tiny_network()], 3, Independent.Settings(shared_stages=2)).double()
    plain.load_state_dict(method.state_dict())
    assert all(map(torch.equal, method(batch[0]).logits, plain(batch[0]).logits))


def test_terms_of_the_ensemble_as_teacher(make, batch):
    method = make(distillation="ensemble")
    outputs = method(batch[0])
    terms = method.losses(outputs, batch[1], torch.tensor(20 / 300, dtype=torch.float64))
    target = slow.probabilities(sum(outputs.logits) / 2, 3.0)
    for index, logits in enumerate(outputs.logits):
        expected = 9 * 0.0600546679 * slow.kl(target, logits, 3.0)
        assert terms[f"kl/ensemble->student{index}"].item() == pytest.approx(expected.item(), rel=1e-8)


# By hand for 8 channels. Res2Net, w = 2: 3 (9 * 4 + 4). PyConv, 2 channels a level in 1, 2, 2 and 2 groups:
# 8 (2 * 9 + 25 + 49 + 81) + 16; PSA: a hidden unit more, 2 + 1 + 2 + 2. ASPP: 8.5 * 64 + 2 (10 + 8).
@pytest.mark.parametrize(
    ("block", "count"), [("res2net", 120), ("pyconv", 1_400), ("psa", 1_407), ("aspp", 580), ("hs", MSFE), ("none", 0)]
)
def test_multi_scale_blocks(make, batch, block, count):
    method = make(multiscale=block)
    sum(method.losses(method(batch[0]), batch[1], FULL).values()).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in method.parameters())
    assert parameter_count(method) == parameter_count(method.cohort) + 2 * (count + DA) + FUSION
    method.eval()
    logits = method(batch[0]).logits
    for index in range(2):
        assert torch.equal(method.deployed_student(index)(batch[0]), logits[index])


def test_groups_are_those_of_res2net_too(make):
    assert make(multiscale="res2net", groups=2).enhancements[0].steps[0].width == 4
    with pytest.raises(UsageError, match="res2net: 8 channels do not divide into 3 equal groups: use 2, 4, 8"):
        make(multiscale="res2net", groups=3)


@pytest.mark.parametrize("kind", ATTENTION)
def test_kinds_of_attention_and_their_maps(make, batch, kind):
    method = make((8, 2), (8, 1), attention=kind)
    sum(method.losses(method(batch[0]), batch[1], FULL).values()).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in method.parameters())
    maps = method.eval().attention_maps(batch[0])
    assert list(maps) == ["student0", "student1", "fused"]
    for name, (channels, places) in maps.items():
        assert (channels is not None) == ("channel" in ATTENTION[kind])
        assert (places is not None) == ("spatial" in ATTENTION[kind])
        if channels is not None:
            assert channels.shape == (6, 16 if name == "fused" else 8)
        if places is not None:
            assert places.shape == (6, *[4 if name == "student0" else 8] * 2)
    (da, *_), feature_map = method.enhancements[0].steps[1:], method(batch[0]).feature_maps[0]
    expected = da.maps(method.enhancements[0].steps[0](feature_map))
    for one, other in zip(maps["student0"], expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_no_attention_has_no_maps(make, batch):
    assert make(attention="none").attention_maps(batch[0]) == {}


@pytest.mark.parametrize("point", ["raw", "msfe", "msfe_da"])
@pytest.mark.parametrize("attention", ["cbam", "none"])
def test_head_input(make, batch, point, attention):
    method = make(head_input=point, attention=attention).eval()
    assert kinds(method) == {E, F_} | ({D} if attention == "cbam" else set())
    maps = tiny.feature_maps(method.cohort, batch[0])
    logits = method(batch[0]).logits
    for index, feature_map in enumerate(maps):
        msfe, da = method.enhancements[index].steps
        seen = {"raw": feature_map, "msfe": msfe(feature_map), "msfe_da": da(msfe(feature_map))}[point]
        assert torch.equal(logits[index], method.cohort[index].head(seen))
        deployed = method.deployed_student(index)
        own = {"raw": 0, "msfe": MSFE, "msfe_da": MSFE + DA * (attention == "cbam")}[point]
        assert parameter_count(deployed) == STUDENT + own
        assert torch.equal(deployed(batch[0]), logits[index])


@pytest.mark.parametrize("point", ["raw", "msfe", "msfe_da"])
def test_fusion_input(make, batch, point):
    method = make(fusion_input=point).eval()
    seen = []
    for enhancement, feature_map in zip(method.enhancements, tiny.feature_maps(method.cohort, batch[0]), strict=True):
        seen.append(enhancement(feature_map)[("raw", "msfe", "msfe_da").index(point)])
    expected = method.fusion(seen)
    assert torch.equal(method(batch[0]).fused_logits, expected)
    assert torch.equal(method.predictors()["fused"](batch[0]), expected)


@pytest.mark.parametrize(
    ("settings", "modules"),
    [
        ({"head_input": "raw", "distillation": "none"}, set()),
        ({"head_input": "raw", "distillation": "ensemble"}, set()),
        ({"head_input": "msfe", "distillation": "none"}, {E}),
        ({"head_input": "raw", "fusion_input": "raw"}, {F_}),
        ({"head_input": "raw", "fusion_input": "msfe"}, {E, F_}),
        ({"head_input": "msfe_da", "fusion_input": "raw"}, {E, D, F_}),
        ({"multiscale": "none"}, {D, F_}),
        ({"head_input": "raw", "fusion_input": "msfe", "multiscale": "none", "detach_fusion_input": True}, {F_}),
        ({"head_input": "msfe", "attention": "none", "detach_fusion_input": True}, {E, F_}),
    ],
)
def test_no_component_that_nothing_sees(make, batch, settings, modules):
    method = make(**settings)
    assert kinds(method) == modules
    sum(method.losses(method(batch[0]), batch[1], FULL).values()).backward()
    assert [name for name, parameter in method.named_parameters() if parameter.grad is None] == []


def test_the_outputs_have_the_backbones_own_maps(make, batch):
    method = make().eval()
    outputs = method(batch[0])
    for student, feature_map in zip(method.cohort, outputs.feature_maps, strict=True):
        assert torch.equal(feature_map, student.feature_map(batch[0]))


def test_one_student_without_distillation(make, batch):
    method = make((8, 2), distillation="none", attention="none").eval()
    assert kinds(method) == {E}
    outputs = method(batch[0])
    assert list(method.losses(outputs, batch[1], FULL)) == ["ce/student0"]
    assert list(method.predictors()) == list(method.predictions(outputs)) == ["student0"]
    assert parameter_count(method) == STUDENT + MSFE


@pytest.mark.parametrize("distillation", ["fusion", "ensemble"])
def test_one_student_has_nobody_to_learn_from(make, distillation):
    says = "mfef needs at least 2 students, got 1: with one student use --method.distillation none"
    with pytest.raises(UsageError, match=says):
        make((8, 2), distillation=distillation)


@pytest.mark.parametrize(
    ("name", "student", "msfe", "attention"),
    [
        ("resnet20", 278_324, 14_680, 610),
        ("wrn-16-2", 703_284, 58_448, 2_146),
        ("densenet-40-12", 188_092, 62_859, 2_210),
    ],
)
def test_cost_of_the_components_in_the_deployed_student(name, student, msfe, attention):
    costs = []
    for point in ("raw", "msfe", "msfe_da"):
        with torch.device("meta"):
            method = MFEF([network(name, 100) for _ in range(2)], 100, MFEFSettings(head_input=point))
        costs.append([parameter_count(method.deployed_student(index)) for index in range(2)])
    assert costs == [[student] * 2, [student + msfe] * 2, [student + msfe + attention] * 2]


def test_a_deployed_student_has_no_peers(make, batch):
    method = make(*UNLIKE).eval()
    own = {id(module) for module in (*method.cohort[1].modules(), *method.enhancements[1].modules())}
    deployed = method.deployed_student(1)
    assert isinstance(deployed, Network)
    foreign = [
        module
        for module in deployed.modules()
        if any(True for _ in module.parameters())
        and id(module) not in own
        and module not in (deployed, deployed.stages, deployed.head)
    ]
    assert foreign == []
    assert torch.equal(deployed(batch[0]), method(batch[0]).logits[1])
    assert deployed.widths == (4, 6, 10)


def test_shared_components(make, batch):
    own, shared = make(), make(share_components=True)
    assert parameter_count(own) - parameter_count(shared) == MSFE + DA
    assert shared.enhancements[0] is shared.enhancements[1]
    assert own.enhancements[0] is not own.enhancements[1]
    group = shared.parameter_groups()[0]
    assert len(group.parameters) == len({id(parameter) for parameter in group.parameters})
    logits = shared.eval()(batch[0]).logits
    for index in range(2):
        assert torch.equal(shared.deployed_student(index)(batch[0]), logits[index])


def test_components_of_unlike_widths_cannot_be_shared(make):
    with pytest.raises(UsageError, match=r"one width, got \[8, 10\]: set it to false"):
        make(*UNLIKE, share_components=True)


def test_components_have_storage_of_their_own(make):
    tensors = [tensor for each in make().enhancements for tensor in (*each.parameters(), *each.buffers())]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_components_decay_as_told(make):
    for decays_with, students, fusion in (
        ("students", 344 + 2 * 475 + 2 * (MSFE + DA), FUSION),
        ("fusion", 344 + 2 * 475, FUSION + 2 * (MSFE + DA)),
    ):
        groups = make(components_decay=decays_with).parameter_groups()
        assert [sum(parameter.numel() for parameter in group.parameters) for group in groups] == [students, fusion]
        assert [group.weight_decay for group in groups] == [None, 1e-5]
    alone = make((8, 2), distillation="none", components_decay="fusion").parameter_groups()
    assert [(group.name, group.weight_decay) for group in alone] == [("students", None), ("fusion", 1e-5)]


def test_settings_reach_the_components(make):
    method = make(
        groups=2,
        exported_half="first",
        depthwise=True,
        attention_reduction=2,
        attention_kernel=3,
        attention_bias=True,
        attention_norm=True,
    )
    for enhancement in method.enhancements:
        msfe, da = enhancement.steps
        assert msfe.conv_widths == (4,) and msfe.exported == "first"
        assert parameter_count(msfe) == 9 * 4 + 8
        assert parameter_count(da) == 2 * 8 * 4 + 4 + 8 + 18 + 2


def test_impossible_components_are_refused(make):
    with pytest.raises(UsageError, match="use 2 to 4 groups"):
        make(groups=9)
    with pytest.raises(UsageError, match="must be odd"):
        make(attention_kernel=4)


def test_maps_of_unlike_resolution_depend_on_the_image_size(tiny_network):
    for size, shape in (((8, 8), (4, 4)), ((12, 8), (6, 4))):
        method = MFEF([tiny_network(8, 2), tiny_network(8, 1)], 3, image_size=size)
        assert [len(adapter) for adapter in method.fusion.adapters] == [0, 1]
        assert method.fusion.adapters[1](torch.randn(2, 8, *size)).shape[2:] == shape
        assert method(torch.randn(2, 3, *size)).fused_logits.shape == (2, 3)


def test_alone_a_student_has_the_components_that_it_carries():
    chosen = MFEF.alone(MFEFSettings(multiscale="psa", attention="none"))
    assert chosen is not None and (chosen.multiscale, chosen.distillation) == ("psa", "none")
    assert MFEF.alone(MFEFSettings(multiscale="none", attention="none")) is None
    assert MFEF.alone(MFEFSettings(multiscale="none", head_input="msfe")) is None
