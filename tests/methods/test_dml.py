"""DML: numbers worked by hand, a whole step against a slow derivation, gradient flow, students that take turns."""

import copy

import pytest
import torch
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.methods.cohort import Outputs
from codistill.methods.dml import DML, DMLSettings
from codistill.training.step import make_step

from .. import tiny
from . import slow

METHOD = DML
START = torch.tensor(0.0)
# Three classes, the label is 0.
Z1 = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
Z2 = torch.tensor([[1.0, 1.5, 0.0]], dtype=torch.float64)
Z3 = torch.tensor([[3.0, 0.0, -2.0]], dtype=torch.float64)
LABEL = torch.tensor([0])
# KL(Z1 -> Z2) at T = 1, and so on, in nats.
KL12, KL21 = 0.43401338, 0.47418277


def terms_at(method: DML, *logits: Tensor, progress: Tensor = START) -> dict[str, float]:
    terms = method.losses(Outputs(logits, ()), LABEL, progress)
    return {name: term.item() for name, term in terms.items()}


def test_two_students_at_the_papers_temperature(make):
    terms = terms_at(make(temperature=1.0), Z1, Z2)
    assert terms == pytest.approx(
        {
            "ce/student0": 0.2413113,
            "ce/student1": 1.10413061,
            "kl/student1->student0": KL21,
            "kl/student0->student1": KL12,
        },
        abs=6e-9,
    )


def test_the_default_has_temperature_three_and_its_square(make):
    terms = terms_at(make(), Z1, Z2)
    assert terms["kl/student1->student0"] == pytest.approx(9 * slow.divergence(Z2[0], Z1[0], 3.0), rel=1e-12)
    assert terms["kl/student0->student1"] == pytest.approx(9 * slow.divergence(Z1[0], Z2[0], 3.0), rel=1e-12)


def test_for_two_students_all_targets_are_the_same(make):
    plain = sorted(terms_at(make(), Z1, Z2).values())
    for settings in ({"target": "mean"}, {"divide_by_peers": False}):
        assert sorted(terms_at(make(**settings), Z1, Z2).values()) == pytest.approx(plain, rel=1e-13)


@pytest.mark.parametrize(("divide", "share"), [(True, 0.5), (False, 1.0)])
def test_three_students_learn_from_each_peer(make, divide, share):
    method = make(*[(8, 2)] * 3, temperature=1.0, divide_by_peers=divide)
    terms = terms_at(method, Z1, Z2, Z3)
    assert [name for name in terms if name.startswith("kl/")] == [
        *("kl/student1->student0", "kl/student2->student0"),
        *("kl/student0->student1", "kl/student2->student1"),
        *("kl/student0->student2", "kl/student1->student2"),
    ]
    logits = {"student0": Z1, "student1": Z2, "student2": Z3}
    for name in list(terms)[3:]:
        peer, student = name.removeprefix("kl/").split("->")
        assert terms[name] == pytest.approx(share * slow.divergence(logits[peer][0], logits[student][0]), rel=1e-12), (
            name
        )
    assert terms["kl/student1->student0"] == pytest.approx(share * KL21, abs=6e-9)


def test_three_students_learn_from_the_mean_of_the_others(make):
    terms = terms_at(make(*[(8, 2)] * 3, temperature=2.0, target="mean"), Z1, Z2, Z3)
    assert list(terms)[3:] == ["kl/peers->student0", "kl/peers->student1", "kl/peers->student2"]
    others = [  # worked by hand
        torch.tensor([[2.0, 0.75, -1.0]]),
        torch.tensor([[2.5, 0.25, -1.5]]),
        torch.tensor([[1.5, 1.0, -0.5]]),
    ]
    for index, (mean, own) in enumerate(zip(others, (Z1, Z2, Z3), strict=True)):
        assert terms[f"kl/peers->student{index}"] == pytest.approx(4 * slow.divergence(mean[0], own[0], 2.0), rel=1e-12)


def test_the_ramp_is_off_unless_asked_for(make):
    plain = terms_at(make(), Z1, Z2)
    assert plain == terms_at(make(), Z1, Z2, progress=torch.tensor(0.9))
    ramped = terms_at(make(ramp_up=0.5), Z1, Z2, progress=torch.tensor(0.25))
    for name, value in plain.items():
        assert ramped[name] == pytest.approx(value * (0.2865047969 if name.startswith("kl/") else 1), rel=1e-6), name


def loss_by_hand(logits: list[Tensor], labels: Tensor, settings: DMLSettings, weight: float) -> Tensor:
    """The objective with peers held fixed, at one weight of the distillation terms."""
    temperature, total = settings.temperature, sum(slow.ce(each, labels) for each in logits)
    for index, own in enumerate(logits):
        peers = [each.detach() for peer, each in enumerate(logits) if peer != index]
        if settings.target == "mean":
            distance = slow.kl(slow.probabilities(sum(peers) / len(peers), temperature), own, temperature)
        else:
            distance = sum(slow.kl(slow.probabilities(each, temperature), own, temperature) for each in peers)
            distance = distance / len(peers) if settings.divide_by_peers else distance
        total = total + weight * temperature**2 * distance
    return total


@pytest.mark.parametrize("shapes", [[(8, 2), (8, 2)], [(8, 2), (10, 1), (8, 2)]], ids=["two", "three"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "divide_by_peers": False},
        {"temperature": 2.0, "target": "mean"},
        {"ramp_up": 80 / 300, "shared_stages": 1},
    ],
    ids=["default", "added-up", "mean", "ramped-and-shared"],
)
def test_a_whole_step_agrees_with_a_slow_derivation(make, batch, shapes, settings):
    method = make(*shapes, **settings)
    slow.disturb_norms(method)
    _, logits = slow.run_students(method, batch[0], [stride for _, stride in shapes])
    weight = slow.ramp(30) if "ramp_up" in settings else 1.0
    slow.assert_step_agrees(method, batch, 30, loss_by_hand(logits, batch[1], method.settings, weight))


def students_reached(method: DML, batch: tuple[Tensor, Tensor], term: str) -> set[int]:
    """Which students a term gives a gradient to."""
    return {int(part.removeprefix("head")) for part in slow.reached(method, batch, term) if part.startswith("head")}


@pytest.mark.parametrize("target", ["pairwise", "mean"])
def test_peers_get_no_gradient_unless_they_are_to(make, batch, target):
    name = "kl/student2->student0" if target == "pairwise" else "kl/peers->student0"
    shapes = [(8, 2)] * 3
    assert students_reached(make(*shapes, target=target), batch, "ce/student0") == {0}
    assert students_reached(make(*shapes, target=target), batch, name) == {0}
    both = {0, 2} if target == "pairwise" else {0, 1, 2}
    assert students_reached(make(*shapes, target=target, detach_teachers=False), batch, name) == both


def test_nothing_is_shared_unless_asked_for(make):
    first, second = make().cohort
    assert not {id(each) for each in first.parameters()} & {id(each) for each in second.parameters()}
    assert make(shared_stages=None).cohort.shared_stages == 2


# Students that take turns.

CPU, RATE, DECAY = torch.device("cpu"), 0.05, 0.01
AUGMENTATION = Augmentation(padding=2)


def turns_by_hand(method: DML, settings: DMLSettings, taken: list, images: DeviceImages) -> list[tuple[int, float]]:
    """A loop of its own: an optimiser for each student, and a fresh forward pass of all before each update."""
    optimizers = [
        torch.optim.SGD(student.parameters(), RATE, 0.9, weight_decay=DECAY, nesterov=True, foreach=False)
        for student in method.cohort
    ]
    seen = []
    for batch in taken:
        pixels, labels = images.augmented(batch, AUGMENTATION)
        for index, optimizer in enumerate(optimizers):
            logits = [student(pixels) for student in method.cohort]
            soft = [slow.probabilities(each, settings.temperature).detach() for each in logits]
            distances = [
                slow.kl(each, logits[index], settings.temperature) for peer, each in enumerate(soft) if peer != index
            ]
            distance = settings.temperature**2 * sum(distances) / len(distances)
            loss = slow.ce(logits[index], labels) + distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append((index, loss.item()))
    return seen


@pytest.mark.parametrize("students", [2, 3])
def test_turns_equal_a_loop_written_by_hand(students):
    method = tiny.method(DML, students=students, update="alternating").train()
    other, images = copy.deepcopy(method), DeviceImages(tiny.data().train, tiny.data().statistics, CPU)
    start = copy.deepcopy(method.state_dict())
    step = make_step(method, images, AUGMENTATION, tiny.settings(learning_rate=RATE, weight_decay=DECAY))
    plan = epoch_indices(24, 0, 0, AUGMENTATION, CPU)
    taken = [plan.part(begin, begin + 6) for begin in range(0, 24, 6)]
    for batch in taken:
        step(batch, START)
    seen = turns_by_hand(other, method.settings, taken, images)
    assert [index for index, _ in seen] == list(range(students)) * 4
    expected = other.state_dict()
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )
        assert not torch.equal(tensor, start[name]), name
    # What is logged of a step is what its last turn saw.
    last = f"student{students - 1}"
    means = step.sums.means()
    own = sum(value for name, value in means.items() if name.endswith(last))
    assert own == pytest.approx(sum(loss for index, loss in seen if index == students - 1) / 4, rel=1e-4)


def test_a_turn_sees_the_update_before_it():
    states = []
    for update in ("simultaneous", "alternating"):
        method = tiny.method(DML, update=update).train()
        images = DeviceImages(tiny.data().train, tiny.data().statistics, CPU)
        step = make_step(
            method, images, AUGMENTATION, tiny.settings(learning_rate=RATE, momentum=0.0, weight_decay=0.0)
        )
        step(epoch_indices(24, 0, 0, AUGMENTATION, CPU).part(0, 6), START)
        states.append([[each.detach().clone() for each in student.parameters()] for student in method.cohort])
    for together, in_turn in zip(states[0][0], states[1][0], strict=True):
        torch.testing.assert_close(together, in_turn)
    assert not any(map(torch.allclose, states[0][1], states[1][1]))


def test_turns_are_the_students_own_parameters(make):
    assert make().alternating_updates() == ()
    method = make((8, 2), (10, 1), (8, 2), update="alternating")
    turns = method.alternating_updates()
    assert [[id(each) for each in turn] for turn in turns] == [
        [id(each) for each in student.parameters()] for student in method.cohort
    ]
    everything = [id(each) for turn in turns for each in turn]
    assert len(everything) == len(set(everything)) == len(list(method.parameters()))


@pytest.mark.parametrize("shared", [1, None])
def test_students_that_share_cannot_take_turns(make, shared):
    with pytest.raises(
        UsageError, match=r"dml: .* cannot share stages, but these share [12]: set method.shared_stages to 0"
    ):
        make(update="alternating", shared_stages=shared)


def test_unlike_students_share_nothing_and_take_turns(make):
    assert len(make((8, 2), (10, 1), update="alternating", shared_stages=None).alternating_updates()) == 2
