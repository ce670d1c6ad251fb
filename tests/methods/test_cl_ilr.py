"""CL-ILR: numbers by hand, gradient rescaling, a whole step against a slow derivation, who moves what."""

import pytest
import torch
from torch import Tensor

from codistill.methods.cl_ilr import CLILR, scale_gradient
from codistill.methods.cohort import Outputs

from .slow import assert_step_agrees, branches, ce, disturb_norms, kl, probabilities, ramp, reached, run_students

METHOD = CLILR
TWO, THREE, UNLIKE = [(8, 2)] * 2, [(8, 2)] * 3, [(8, 2), (10, 1), (12, 2)]
SHAPES = THREE
LOGITS = ([2, 0.5, -1], [1, 1.5, 0], [3, 0, -2])


def outputs_by_hand() -> Outputs:
    logits = tuple(torch.tensor([each], dtype=torch.float64) for each in LOGITS)
    return Outputs(logits, (torch.zeros(1, 8, 4, 4),) * 3)


@pytest.mark.parametrize(
    ("ensemble_of", "divergences"),
    [
        # The others' means are (2, .75, -1), (2.5, .25, -1.5) and (1.5, 1, -.5); T = 2, beta = 1/2.
        ("logits", [0.0032534447694683513, 0.4764451065831328, 0.4259874113912744]),
        ("probabilities", [0.005053960413717588, 0.4564849200740467, 0.4205759380098403]),
    ],
)
def test_numbers_by_hand(make, ensemble_of, divergences):
    terms = make(ensemble_of=ensemble_of).losses(outputs_by_hand(), torch.tensor([0]), torch.tensor(0.0))
    hard = [0.12065564832857852, 0.5520653026683642, 0.027492617688573754]
    expected = {f"ce/student{index}": each for index, each in enumerate(hard)}
    expected |= {f"kl/peers->student{index}": each for index, each in enumerate(divergences)}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-12)


def test_label_weight_divides_between_labels_and_peers(make):
    half, tenth = (
        make(ce_weight=weight).losses(outputs_by_hand(), torch.tensor([0]), torch.tensor(0.0)) for weight in (0.5, 0.1)
    )
    for name in half:
        factor = 0.2 if name.startswith("ce/") else 1.8
        assert tenth[name].item() == pytest.approx(factor * half[name].item()), name


def test_no_ramp_unless_asked_for(make):
    for method, ratio in ((make(), 1.0), (make(ramp_up=80 / 300), 0.2865047969)):
        full, early = (
            method.losses(outputs_by_hand(), torch.tensor([0]), torch.tensor(each))["kl/peers->student1"]
            for each in (1.0, 40 / 300)
        )
        assert early.item() == pytest.approx(ratio * full.item(), rel=1e-6)


def test_scale_gradient_changes_the_gradient_alone():
    values = torch.randn(4, 3, requires_grad=True)
    scaled = scale_gradient(values, 1 / 3)
    assert torch.equal(scaled, values)
    (gradient,) = torch.autograd.grad((scaled**2).sum(), values)
    torch.testing.assert_close(gradient, 2 * values / 3)


def loss_by_hand(method: CLILR, batch: tuple[Tensor, Tensor], strides: list[int], epoch: int) -> Tensor:
    images, labels = batch
    chosen = method.settings
    beta, temperature = chosen.ce_weight, chosen.temperature
    _, logits = run_students(method, images, strides)
    loss = torch.zeros((), dtype=torch.float64)
    for index, own in enumerate(logits):
        others = [each for other, each in enumerate(logits) if other != index]
        if chosen.ensemble_of == "logits":
            target = probabilities(sum(others) / len(others), temperature)
        else:
            target = sum(probabilities(each, temperature) for each in others) / len(others)
        if chosen.detach_teachers:
            target = target.detach()
        soft = temperature**2 * kl(target, own, temperature)
        loss = loss + beta * ce(own, labels) + (1 - beta) * (ramp(epoch) if chosen.ramp_up else 1) * soft
    return loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rescale_gradients": False},
        {"ensemble_of": "probabilities", "ce_weight": 0.3},
        {"detach_teachers": False, "temperature": 3.0, "ramp_up": 80 / 300},
    ],
    ids=["default", "not-rescaled", "probabilities", "moving-targets"],
)
@pytest.mark.parametrize(
    ("shapes", "shared"),
    [(TWO, None), (THREE, None), (THREE, 1), (THREE, 0), (UNLIKE, None)],
    ids=["two", "three", "one-stage", "unshared", "unlike"],
)
def test_a_whole_step_agrees_with_a_slow_derivation(make, batch, shapes, shared, settings):
    method = make(*shapes, shared_stages=shared, **settings)
    disturb_norms(method)
    trunk = method.cohort.shared_stages
    names = tuple(f"cohort.students.0.stages.{index}." for index in range(trunk))

    def gradient_scale(name: str) -> float:
        return 1 / len(shapes) if names and method.settings.rescale_gradients and name.startswith(names) else 1.0

    by_hand = loss_by_hand(method, batch, [stride for _, stride in shapes], 40)
    assert_step_agrees(method, batch, 40, by_hand, gradient_scale)


@pytest.mark.parametrize("all_rescaled", [True, False])
def test_equal_branches_send_the_gradient_of_one_into_the_trunk(make, batch, all_rescaled):
    """n equal branches have n times the gradient of one; rescaled, that of one, whatever n is."""
    gradients = []
    for shapes in (TWO, [(8, 2)] * 4):
        torch.manual_seed(0)
        method = make(*shapes, rescale_gradients=all_rescaled)
        first = method.cohort[0]
        for student in method.cohort:
            student.stages[2].load_state_dict(first.stages[2].state_dict())
            student.head.load_state_dict(first.head.state_dict())
        sum(method.losses(method(batch[0]), batch[1], torch.tensor(0.0)).values()).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in first.stages[:2].parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0] * (1 if all_rescaled else 2))


def test_the_others_learn_too_when_not_detached(make, batch):
    method = make(detach_teachers=False)
    for index in range(3):
        assert reached(method, batch, f"kl/peers->student{index}") == {"trunk"} | branches(0, 1, 2)
