"""FFL: who teaches whom, where gradients stop, the number of parameters, settings."""

import pytest
import torch

from codistill.methods.ffl import FFL, FusionSettings
from codistill.methods.losses import mixture_logits, soft_target_kl
from codistill.networks import network
from codistill.networks.network import parameter_count

FULL = torch.tensor(1.0)
TERMS = ["ce/student0", "ce/student1", "ce/fused", "kl/fused->student0", "kl/fused->student1", "kl/ensemble->fused"]


@pytest.fixture
def make(tiny_network):
    def build(*shapes, **settings) -> FFL:
        students = [tiny_network(*shape) for shape in shapes or [(8, 2), (8, 2)]]
        return FFL(students, 3, FusionSettings(**settings), (8, 8)).double()

    return build


def reached(method, batch, term) -> set[str]:
    """Names of the parameters that a term gives a gradient to."""
    value = method.losses(method(batch[0]), batch[1], FULL)[term]
    names, parameters = zip(*method.named_parameters(remove_duplicate=False), strict=True)
    unique = list(dict.fromkeys(parameters))
    gradients = dict(zip(unique, torch.autograd.grad(value, unique, allow_unused=True), strict=True))
    return {
        name
        for name, parameter in zip(names, parameters, strict=True)
        if gradients[parameter] is not None and gradients[parameter].any()
    }


def parts(names: set[str]) -> set[str]:
    """Return `student0.trunk`, `student0.branch`, `student0.head` or `fusion` for each name."""
    found = set()
    for name in names:
        if name.startswith("fusion"):
            found.add("fusion")
            continue
        _, _, index, kind, *rest = name.split(".")
        stage = "head" if kind == "head" else "branch" if rest[0] == "2" else "trunk"
        found.add(f"student{index}.{stage}")
    return found


TRUNK = {"student0.trunk", "student1.trunk"}  # the same modules
BACKBONES = TRUNK | {"student0.branch", "student1.branch"}
HEADS = {"student0.head", "student1.head"}


def test_terms(make, batch):
    method = make()
    assert list(method.losses(method(batch[0]), batch[1], FULL)) == TERMS


def test_the_fused_classifier_stops_at_its_input_when_told(make, batch):
    method = make(detach_fusion_input=True)
    assert parts(reached(method, batch, "ce/fused")) == {"fusion"}
    assert parts(reached(method, batch, "kl/ensemble->fused")) == {"fusion"}
    assert "fusion" not in parts(reached(method, batch, "kl/fused->student0"))


def test_teachers_learn_too_when_not_detached(make, batch):
    method = make(detach_teachers=False)
    assert parts(reached(method, batch, "kl/fused->student0")) == BACKBONES | {"student0.head", "fusion"}
    assert parts(reached(method, batch, "kl/ensemble->fused")) == BACKBONES | HEADS | {"fusion"}


def test_the_trunk_of_equal_students_is_shared(make):
    method = make()
    first, second = method.cohort
    assert method.cohort.shared_stages == 2
    assert first.stages[0] is second.stages[0] and first.stages[2] is not second.stages[2]
    # Trunk 116 + 228, two branches of 448 + 27; fusion 9*16 + 32, 16*8 + 16, 8*3 + 3.
    assert parameter_count(method.cohort) == 344 + 2 * 475
    assert parameter_count(method.fusion) == 176 + 144 + 27


@pytest.mark.parametrize(
    ("networks", "classes", "students", "fusion"),
    [
        (["resnet20"] * 2, 100, 490_520, 16_228),
        (["resnet20"] * 2, 10, 478_820, 10_378),
        (["resnet32"] * 2, 100, 832_920, 16_228),
        (["resnet32"] * 3, 100, 1_193_084, 21_028),
        (["wrn-16-2"] * 2, 100, 1_241_624, 48_740),
        (["densenet-40-12"] * 2, 100, 260_336, 51_316),
        (["resnet32", "wrn-16-2"], 100, 472_756 + 703_284, 21_028),
    ],
)
def test_parameters_of_the_papers_models(networks, classes, students, fusion):
    with torch.device("meta"):
        method = FFL([network(name, classes) for name in networks], classes)
    assert parameter_count(method.cohort) == students
    assert parameter_count(method.fusion) == fusion
    assert parameter_count(method) == students + fusion


def test_groups_have_their_weight_decay(make):
    students, fusion = make().parameter_groups()
    assert (students.name, students.weight_decay) == ("students", None)
    assert (fusion.name, fusion.weight_decay) == ("fusion", 1e-5)
    assert sum(parameter.numel() for parameter in fusion.parameters) == 347
    assert make(fusion_weight_decay=1e-3).parameter_groups()[1].weight_decay == 1e-3


@pytest.mark.parametrize(("name", "value"), [("temperature", 1.0), ("ramp_up", 0.0), ("target_epsilon", 1e-2)])
def test_settings_change_the_distillation_terms_alone(make, batch, name, value):
    default, changed = make(), make(**{name: value})
    changed.load_state_dict(default.state_dict())
    before, after = (each.losses(each(batch[0]), batch[1], torch.tensor(0.1)) for each in (default, changed))
    for term in TERMS:
        assert torch.equal(before[term], after[term]) == term.startswith("ce/"), term


def test_settings_reach_the_terms(make, batch):
    method = make(temperature=2.0, ramp_up=0.0, target_epsilon=1e-3, ensemble_of="probabilities")
    outputs = method(batch[0])
    terms = method.losses(outputs, batch[1], torch.tensor(0.0))
    first, second = outputs.logits
    expected = soft_target_kl(outputs.fused_logits, mixture_logits([first, second], 2.0), 2.0, epsilon=1e-3)
    torch.testing.assert_close(terms["kl/ensemble->fused"], expected)
    expected = soft_target_kl(second, outputs.fused_logits, 2.0, epsilon=1e-3)
    torch.testing.assert_close(terms["kl/fused->student1"], expected)


def test_the_ramp_is_a_share_of_the_training(make, batch):
    method = make(ramp_up=0.5)
    outputs = method(batch[0])
    quarter, late = (method.losses(outputs, batch[1], torch.tensor(each)) for each in (0.25, 0.9))
    ratio = quarter["kl/fused->student0"] / late["kl/fused->student0"]
    assert ratio.item() == pytest.approx(0.2865047969, abs=1e-7)  # exp(-5 / 4)


def test_projection_reaches_the_fusion_module(make, batch):
    method = make((8, 2), (10, 1), fusion_projection="each")
    assert method.fusion.transfer[0][0].in_channels == 16
    assert method(batch[0]).fused_logits.shape == (6, 3)
