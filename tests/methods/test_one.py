"""ONE: numbers by hand, the gate, a whole step against a slow derivation, who moves what, the ensemble alone."""

import math

import pytest
import torch
from torch import Tensor

from codistill.methods.cohort import Outputs
from codistill.methods.one import ONE, GatedPredictor
from codistill.networks import network
from codistill.networks.network import parameter_count

from .slow import (
    assert_step_agrees,
    batch_norm,
    branches,
    ce,
    disturb_norms,
    kl,
    pooled,
    probabilities,
    ramp,
    reached,
    run_students,
)

METHOD = ONE
EQUAL, UNLIKE, THREE = [(8, 2)] * 2, [(8, 2), (10, 1)], [(8, 2)] * 3


def terms_by_hand(fused: list[float], progress: float, method: ONE) -> dict[str, float]:
    z1, z2, z_e = (torch.tensor([each], dtype=torch.float64) for each in ([2, 0.5, -1], [1, 1.5, 0], fused))
    outputs = Outputs((z1, z2), (torch.zeros(1, 8, 4, 4),) * 2, z_e)
    terms = method.losses(outputs, torch.tensor([0]), torch.tensor(progress, dtype=torch.float64))
    return {name: term.item() for name, term in terms.items()}


def test_numbers_by_hand(make):
    # g = (1/4, 3/4) mixes z1 = (2, .5, -1) and z2 = (1, 1.5, 0) to z_e = (1.25, 1.25, -.25); T = 3.
    assert terms_by_hand([1.25, 1.25, -0.25], 1.0, make()) == pytest.approx(
        {
            "ce/student0": 0.24131129665715703,
            "ce/student1": 1.1041306053367284,
            "ce/fused": 0.7989161848417257,
            "kl/fused->student0": 0.2738134538948296,
            "kl/fused->student1": 0.029148131456524954,
        },
        abs=1e-12,
    )


def set_gate(method: ONE, rows: list[list[float]], bias: list[float]) -> None:
    linear = method.gate.layers[0]
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(rows)), linear.bias.copy_(torch.tensor(bias))


def test_the_gate_by_hand(make):
    """Running mean 0 and variance 1: softmax(relu(W h + b)), but for the norm's 1e-5."""
    method = make().eval()
    h = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ripple = torch.tensor([[-1.0, 1.0], [3.0, -3.0]], dtype=torch.float64)
    low = h[:, :, None, None] + ripple
    # W h + b = (ln 3, -1), so the weights are 3/4 and 1/4: the negative one is cut off at 0.
    set_gate(method, [[1.0, 0.0] + [0.0] * 4, [0.0, -1.0] + [0.0] * 4], [math.log(3) - 1, 1.0])
    torch.testing.assert_close(method.gate([low]), torch.tensor([[0.75, 0.25]], dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_gate_that_knows_nothing_gives_the_mean(make, batch):
    method = make(*THREE)
    set_gate(method, [[0.0] * 6] * 3, [0.0] * 3)
    outputs = method(batch[0])
    torch.testing.assert_close(outputs.fused_logits, outputs.ensemble_logits)


@pytest.mark.parametrize("shared", [None, 0], ids=["trunk", "no-trunk"])
def test_weights_add_up_and_differ_between_images(make, batch, shared):
    gate = make(*THREE, shared_stages=shared)(batch[0]).extras["gate"]
    assert gate.shape == (6, 3) and (gate > 0).all()
    torch.testing.assert_close(gate.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert not torch.allclose(gate[0], gate[1])


def loss_by_hand(method: ONE, batch: tuple[Tensor, Tensor], strides: list[int], epoch: int) -> Tensor:
    images, labels = batch
    maps, logits = run_students(method, images, strides)
    shared = method.cohort.shared_stages
    seen = pooled(maps[0][shared - 1]) if shared else torch.cat([pooled(own[-1]) for own in maps], dim=1)
    linear, norm, _ = method.gate.layers
    gate = probabilities(batch_norm(seen @ linear.weight.T + linear.bias, norm).clamp(min=0))
    fused = sum(gate[:, index, None] * each for index, each in enumerate(logits))
    target = probabilities(fused, 3.0).detach()
    distillation = sum(kl(target, each, 3.0) for each in logits)
    return sum(ce(each, labels) for each in logits) + ce(fused, labels) + ramp(epoch) * 9 * distillation


@pytest.mark.parametrize("epoch", [0, 40, 80])
@pytest.mark.parametrize(
    ("shapes", "shared"),
    [(EQUAL, None), (THREE, None), (THREE, 1), (THREE, 3), (EQUAL, 0), (UNLIKE, None)],
    ids=["equal", "three", "one-stage", "all-stages", "unshared", "unlike"],
)
def test_a_whole_step_agrees_with_a_slow_derivation(make, batch, shapes, shared, epoch):
    method = make(*shapes, shared_stages=shared)
    disturb_norms(method)
    assert_step_agrees(method, batch, epoch, loss_by_hand(method, batch, [stride for _, stride in shapes], epoch))


def test_the_ensemble_learns_too_when_not_detached(make, batch):
    method = make(detach_teachers=False)
    assert reached(method, batch, "kl/fused->student0", gate=method.gate) == {"trunk", "gate"} | branches(0, 1)


@pytest.mark.parametrize(("shapes", "shared"), [(EQUAL, None), (EQUAL, 0), (UNLIKE, None)])
def test_the_ensemble_alone(make, batch, shapes, shared):
    method = make(*shapes, shared_stages=shared)
    method(batch[0])  # moves the running statistics
    method.eval()
    alone = method.predictors()["fused"]
    assert isinstance(alone, GatedPredictor)
    assert torch.equal(alone(batch[0]), method(batch[0]).fused_logits)
    assert parameter_count(alone) == parameter_count(method)


def test_the_ensemble_alone_can_be_traced_for_any_batch(make):
    alone = make().float().eval().predictors()["fused"]
    images = torch.randn(5, 3, 8, 8)
    program = torch.export.export(alone, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images), alone(images))


def test_parameters(make):
    # Gate: 6 inputs from the trunk, 3 outputs with a bias, and 2 x 3 of the norm; without a trunk 8 + 8 + 8 inputs.
    assert parameter_count(make(*THREE).gate) == 6 * 3 + 3 + 6
    assert parameter_count(make(*THREE, shared_stages=0).gate) == 24 * 3 + 3 + 6
    with torch.device("meta"):
        method = ONE([network("resnet32", 100) for _ in range(3)], 100)
    assert parameter_count(method.gate) == 32 * 3 + 3 + 6
    (students,) = method.parameter_groups()
    assert {id(each) for each in method.gate.parameters()} <= {id(each) for each in students.parameters}


@pytest.mark.parametrize(("name", "value"), [("temperature", 1.0), ("ramp_up", 0.0), ("target_epsilon", 1e-2)])
def test_settings_change_the_distillation_terms_alone(make, batch, name, value):
    default, changed = make(), make(**{name: value})
    changed.load_state_dict(default.state_dict())
    before, after = (each.losses(each(batch[0]), batch[1], torch.tensor(0.1)) for each in (default, changed))
    for term in before:
        assert torch.equal(before[term], after[term]) == term.startswith("ce/"), term


def test_outputs_without_an_ensemble_are_refused(make, batch):
    method = make()
    outputs = method(batch[0])
    with pytest.raises(ValueError, match="no fused logits"):
        method.losses(Outputs(outputs.logits, outputs.feature_maps), batch[1], torch.tensor(0.0))
