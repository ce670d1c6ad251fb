"""OKDPH: the hub, its gradient, what happens between epochs, and the hub as a network of its own."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import codistill as cd
from codistill.methods.cohort import Outputs
from codistill.methods.okdph import OKDPH
from codistill.networks import Network
from codistill.networks.network import parameter_count
from codistill.training.forward import TrainingForward

from .. import tiny
from . import slow

METHOD = OKDPH
NOW = torch.tensor(0.5)


def views_of(images: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([images, images.flip(3), images.roll(1, 2), images.roll(2, 3)][:count])


def test_terms_by_hand(make):
    # Two images of two classes; T = 4 makes (1/2, 1/2) of the target's zeros, and (3/4, 1/4) of 4 log 3.
    sure, wrong = [[4 * math.log(3), 0.0]] * 2, [[-4 * math.log(3), 0.0]] * 2
    logits = tuple(torch.tensor(each, dtype=torch.float64) for each in (sure, wrong))
    hub = torch.tensor(
        [[0.0, 0.0], [2.0, 2.0]], dtype=torch.float64
    )  # the mean of all is 0, and for image 1 (2/3, 2/3)
    terms = make().losses(Outputs(logits, (), extras={"hub": hub}), torch.tensor([0, 0]), NOW)
    assert list(terms) == ["ce/student0", "ce/student1", "ce/hub", "kl/target->student0", "kl/target->student1"]
    found = {name: term.item() for name, term in terms.items()}
    assert found["ce/student0"] == pytest.approx(0.8 * math.log(1 + 3**-4), abs=1e-12)
    assert found["ce/student1"] == pytest.approx(0.8 * math.log(1 + 3**4), abs=1e-12)
    assert found["ce/hub"] == pytest.approx(0.2 * math.log(2), abs=1e-12)
    apart = 0.8 * 16 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert found["kl/target->student0"] == pytest.approx(apart, abs=1e-12)
    assert found["kl/target->student1"] == pytest.approx(apart, abs=1e-12)
    other = make(ce_weight=0.5, kl_weight=2.0, temperature=2.0)
    terms = other.losses(Outputs(logits, (), extras={"hub": hub}), torch.tensor([0, 0]), NOW)
    assert terms["ce/hub"].item() == pytest.approx(0.5 * math.log(2), abs=1e-12)
    # At T = 2 the student has (9/10, 1/10).
    expected = 2 * 4 * (0.5 * math.log(5 / 9) + 0.5 * math.log(5))
    assert terms["kl/target->student1"].item() == pytest.approx(expected, abs=1e-12)


def hub_by_hand(method: OKDPH) -> SimpleNamespace:
    """A network of plain means, with the parts that `slow` reads."""
    students = list(method.cohort)

    def mean(pick):
        return sum(pick(each) for each in students) / len(students)

    stages = [
        [
            SimpleNamespace(weight=mean(lambda each, stage=stage: each.stages[stage][0].weight)),
            SimpleNamespace(
                weight=mean(lambda each, stage=stage: each.stages[stage][1].weight),
                bias=mean(lambda each, stage=stage: each.stages[stage][1].bias),
            ),
        ]
        for stage in range(3)
    ]
    weight, bias = mean(lambda each: each.head.linear.weight), mean(lambda each: each.head.linear.bias)
    return SimpleNamespace(stages=stages, head=SimpleNamespace(linear=SimpleNamespace(weight=weight, bias=bias)))


def by_hand(method, batch, omega=0.8, beta=0.8, temperature=4.0, flows=True):
    """The loss of one step; images may have an axis of views, the hub's last."""
    images, labels = batch
    count = len(method.cohort)
    views = list(images) if images.ndim == 5 else [images] * (count + 1)
    logits = []
    for network, view in zip([*method.cohort, hub_by_hand(method)], views, strict=True):
        logits.append(slow.head_logits(network, slow.stage_outputs(network, view, (1, 1, 2))[-1]))
    hub = logits[-1]
    fixed = torch.tensor((sum(logits) / (count + 1)).tolist(), dtype=torch.float64)
    target = slow.probabilities(fixed, temperature)
    loss = (1 - omega) * slow.ce(hub if flows else hub.detach(), labels)
    for each in logits[:-1]:
        loss = loss + omega * slow.ce(each, labels)
        loss = loss + beta * temperature**2 * slow.kl(target, each, temperature)
    return loss


CASES = {
    "two": (2, True, {}),
    "three": (3, True, {}),
    "one view": (2, False, {"views_per_student": False}),
    "as published": (2, True, {"hub_gradient": False}),
    "other weights": (2, True, {"ce_weight": 0.3, "kl_weight": 1.7, "temperature": 2.0}),
    "a trunk": (3, False, {"shared_stages": 2, "views_per_student": False}),
}


@pytest.mark.parametrize(("count", "own_views", "settings"), CASES.values(), ids=CASES)
def test_a_step_against_a_slow_derivation(make, batch, count, own_views, settings):
    method = make(*[(8, 2)] * count, **settings)
    slow.disturb_norms(method)
    assert method.views == (count + 1 if own_views else 1)
    images = views_of(batch[0], count + 1) if own_views else batch[0]
    named = {"omega": "ce_weight", "beta": "kl_weight", "temperature": "temperature", "flows": "hub_gradient"}
    chosen = {name: getattr(method.settings, setting) for name, setting in named.items()}
    slow.assert_step_agrees(method, (images, batch[1]), 10, by_hand(method, (images, batch[1]), **chosen))


def test_each_student_gets_the_gradient_of_its_own_loss(make, batch):
    # In the paper each student minimises a loss of its own, with the hub's cross-entropy in it, over its own weights.
    method = make((8, 2), (8, 2), (8, 2))
    terms = method.losses(method(batch[0]), batch[1], NOW)
    for index, student in enumerate(method.cohort):
        own = sum(terms[name] for name in (f"ce/student{index}", "ce/hub", f"kl/target->student{index}"))
        weights = list(student.parameters())
        whole = torch.autograd.grad(sum(terms.values()), weights, retain_graph=True)
        torch.testing.assert_close(list(whole), list(torch.autograd.grad(own, weights, retain_graph=True)))


def test_who_learns_from_what(make, batch):
    method, published = make(), make(hub_gradient=False)
    assert slow.reached(method, batch, "ce/hub") == slow.branches(0, 1)
    assert slow.reached(method, batch, "kl/target->student1") == slow.branches(1)
    terms = published.losses(published(batch[0]), batch[1], NOW)
    assert not terms["ce/hub"].requires_grad and terms["ce/hub"] > 0


def test_the_hub_normalises_by_its_batch_and_keeps_nothing(make, batch):
    method = make()
    alone = copy.deepcopy(method.cohort[0]).train()
    alone(batch[0])
    method(batch[0])
    for name, value in method.cohort[0].state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
    assert method.cohort[0].stages[0][1].num_batches_tracked == 1


def test_between_two_epochs_by_hand(make):
    # 2 and 6 have the mean 4: half of the way are 3 and 5, a quarter 2.5 and 5.5.
    for pull, expected in ((0.5, (3.0, 5.0)), (0.25, (2.5, 5.5)), (0.0, (2.0, 6.0)), (1.0, (4.0, 4.0))):
        method = make(pull=pull)
        for student, value in zip(method.cohort, (2.0, 6.0), strict=True):
            for each in (*student.parameters(), *student.buffers()):
                each.data.fill_(value)
        places = [each.data_ptr() for each in method.state_dict().values()]
        method.between_epochs()
        for student, value, counted in zip(method.cohort, expected, (2, 6), strict=True):
            for name, each in student.state_dict().items():
                assert (each == (counted if "num_batches" in name else value)).all(), name
        assert places == [each.data_ptr() for each in method.state_dict().values()]


def test_the_hub_is_a_plain_network_of_mean_weights(make, batch):
    method = make((8, 2), (8, 2), (8, 2))
    method(batch[0])
    method.eval()
    hub = method.predictors()["hub"]
    assert type(hub) is Network and parameter_count(hub) == parameter_count(method.cohort[0])
    for name, value in hub.state_dict().items():
        if value.is_floating_point():
            mean = sum(student.state_dict()[name] for student in method.cohort) / 3
            torch.testing.assert_close(value, mean, rtol=1e-12, atol=0)
    pointers = {each.data_ptr() for each in method.state_dict().values()}
    assert not pointers & {each.data_ptr() for each in hub.state_dict().values()}
    assert list(method.predictors()) == ["student0", "student1", "student2", "ensemble", "hub"]


def test_a_drawn_hub_has_shares_that_the_step_draws(make, batch):
    method = make((8, 2), (8, 2), (8, 2), mixing="dirichlet")
    hubs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        hubs.append(method(batch[0]).extras["hub"])
    assert torch.equal(hubs[0], hubs[1]) and not torch.equal(hubs[0], hubs[2])
    # Normalised exponentials are a Dirichlet draw with all parameters 1.
    torch.manual_seed(1)
    drawn = torch.empty(3).exponential_()
    shares = (drawn / drawn.sum()).tolist()
    mixed = copy.deepcopy(method.cohort[0]).train()
    with torch.no_grad():
        for own, *parts in zip(mixed.parameters(), *(each.parameters() for each in method.cohort), strict=True):
            own.copy_(sum(share * part for share, part in zip(shares, parts, strict=True)))
    torch.testing.assert_close(hubs[2], mixed(batch[0]), rtol=1e-6, atol=1e-6)
    method.eval()
    state = torch.get_rng_state()
    assert torch.equal(method(batch[0]).extras["hub"], method.predictors()["hub"](batch[0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_students_start_from_the_same_weights():
    networks = [cd.network("resnet8", 3) for _ in range(3)]
    drawn = [each.head.linear.weight.clone() for each in networks]
    assert not torch.equal(drawn[0], drawn[1])
    method = OKDPH(networks, 3)
    assert method.cohort.shared_stages == 0
    states = [student.state_dict() for student in method.cohort]
    assert all(torch.equal(each[name], value) for each in states[1:] for name, value in states[0].items())
    # Weights of one's own stay.
    networks = [cd.network("resnet8", 3) for _ in range(2)]
    nn.init.constant_(networks[1].head.linear.bias, 2.0)
    method = OKDPH(networks, 3)
    assert (method.cohort[1].head.linear.bias == 2).all()
    assert torch.equal(method.cohort[1].head.linear.weight, method.cohort[0].head.linear.weight)


def test_the_hub_in_bfloat16(make, batch):
    method = make().float().train()
    slow.disturb_norms(method)
    images = batch[0].float()
    with torch.no_grad():
        expected = copy.deepcopy(method)(images).extras["hub"]
    outputs = TrainingForward(method, "bf16")(images)
    hub = outputs.extras["hub"]
    assert hub.dtype == torch.bfloat16
    assert (hub - expected).norm() < 0.05 * expected.norm()
    method.losses(outputs, batch[1], NOW)["ce/hub"].backward()
    halves = [each.grad.clone() for each in method.parameters()]
    assert all(each.dtype == torch.float32 and each.any() for each in halves)
    method.zero_grad()
    method.losses(method(images), batch[1], NOW)["ce/hub"].backward()
    half, whole = (
        torch.cat([each.flatten() for each in side]) for side in (halves, [p.grad for p in method.parameters()])
    )
    assert (half - whole).norm() < 0.1 * whole.norm()


def test_a_run_scores_what_it_keeps(tmp_path, no_pages, monkeypatch):
    borders, between = [], OKDPH.between_epochs

    def counted(method):
        before = method.cohort[0].head.linear.weight.clone()
        between(method)
        borders.append(not torch.equal(before, method.cohort[0].head.linear.weight))

    monkeypatch.setattr(OKDPH, "between_epochs", counted)
    run = cd.train(tiny.method(OKDPH), tiny.data(), out=tmp_path / "run", settings=tiny.settings(epochs=3), show=False)
    assert borders == [True, True]
    scores = run.evaluate(device="cpu")
    assert list(scores) == ["student0", "student1", "ensemble", "hub"]
    assert {name: each.top1_error for name, each in scores.items()} == run.summary["top1_error"]
    assert set(run.metrics()[-1]["train"]) >= {"ce/hub", "kl/target->student1"}
