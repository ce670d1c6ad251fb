"""FFL: who teaches whom, where gradients stop, the number of parameters, settings."""

import pytest
import torch

from codistill.methods.ffl import FFL
from codistill.methods.losses import mixture_logits, soft_target_kl
from codistill.networks import network
from codistill.networks.network import parameter_count

from . import slow

METHOD = FFL


def test_the_fused_classifier_stops_at_its_input_when_told(make, batch):
    method = make(detach_fusion_input=True)
    for term in ("ce/fused", "kl/ensemble->fused"):
        assert slow.reached(method, batch, term, fusion=method.fusion) == {"fusion"}
    assert "fusion" not in slow.reached(method, batch, "kl/fused->student0", fusion=method.fusion)


def test_teachers_learn_too_when_not_detached(make, batch):
    method = make(detach_teachers=False)
    maps = {"trunk", "branch0", "branch1", "fusion"}
    assert slow.reached(method, batch, "kl/fused->student0", fusion=method.fusion) == maps | {"head0"}
    assert slow.reached(method, batch, "kl/ensemble->fused", fusion=method.fusion) == maps | {"head0", "head1"}


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
