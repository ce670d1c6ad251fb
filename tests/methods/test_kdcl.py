"""KDCL: targets worked by hand, the solver against brute force, a whole step against a slow derivation, views."""

import copy
import itertools
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

import codistill as cd
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.methods.cohort import Outputs
from codistill.methods.kdcl import (
    KDCL,
    ErrorWeights,
    KDCLSettings,
    linear_target,
    linear_weights,
    minlogit_target,
    naive_target,
)
from codistill.training.step import make_step

from .. import tiny
from . import slow

METHOD = KDCL
START = torch.tensor(0.0)
VARIANTS = get_args(get_type_hints(KDCLSettings)["variant"])
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
# Three classes.
Z1 = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
Z2 = torch.tensor([[1.0, 1.5, 0.0]], dtype=torch.float64)


def doubles(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Targets.


def test_minlogit_of_two_students():
    target = minlogit_target(torch.stack([Z1, Z2]), torch.tensor([0]))
    assert torch.equal(target, doubles([0.0, -1.5, -3.0]))
    # Leads over class 1: (1.5, 0, -1.5) and (-0.5, 0, -1.5).
    target = minlogit_target(torch.stack([Z1, Z2]), torch.tensor([1]))
    assert torch.equal(target, doubles([-0.5, 0.0, -1.5]))


def test_minlogit_is_surer_of_the_true_class_than_every_student():
    logits, labels = torch.randn(4, 20, 7, dtype=torch.float64), torch.arange(20) % 7
    target = minlogit_target(logits, labels)
    assert not target.gather(1, labels[:, None]).any()
    own = F.cross_entropy(target, labels, reduction="none")
    for each in logits:
        assert (own <= F.cross_entropy(each, labels, reduction="none")).all()


def test_naive_chooses_for_each_image():
    # The first student is the better one where the label is 0 (cross-entropy 0.24 and 1.10), else the second.
    logits = torch.stack([Z1.expand(3, 3), Z2.expand(3, 3)])
    target = naive_target(logits, torch.tensor([0, 1, 2]))
    assert torch.equal(target, torch.cat([Z1, Z2, Z2]))


def test_linear_of_students_that_contradict_each_other():
    # Students (2, 0) and (0, 2) on four images, three of them of class 0. The margin 2 (2 a - 1) of the combination
    # has to be log 3, so a = (2 + log 3) / 4.
    logits = torch.stack([doubles([2.0, 0.0]).expand(4, 2), doubles([0.0, 2.0]).expand(4, 2)])
    labels = torch.tensor([0, 0, 1, 0])
    weights = linear_weights(logits, labels)
    assert weights.tolist() == pytest.approx([(2 + math.log(3)) / 4, (2 - math.log(3)) / 4], abs=1e-4)
    target = linear_target(logits, labels)
    torch.testing.assert_close(
        target, doubles([1 + math.log(3) / 2, 1 - math.log(3) / 2]).expand(4, 2), atol=1e-3, rtol=0
    )


def test_linear_of_a_student_that_is_worse_everywhere():
    weights = linear_weights(torch.stack([Z1, Z2]), torch.tensor([0]))
    assert weights.tolist() == pytest.approx([1, 0], abs=1e-6)


def test_linear_of_equal_students():
    assert linear_weights(torch.stack([Z1, Z1, Z1]), torch.tensor([0])).tolist() == pytest.approx([1 / 3] * 3)


def loss_of(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.einsum("s,sbc->bc", weights, logits), labels)


def random_batch(seed: int, students: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Students that are alike and unlike, sure and unsure, good and bad, in batches of several sizes."""
    source = torch.Generator().manual_seed(seed)
    images, classes = [(128, 100), (16, 10), (6, 3)][seed % 3]
    labels = torch.randint(classes, (images,), generator=source)
    common = [0.0, 0.5, 2.0][seed % 3] * torch.randn(images, classes, generator=source)
    own = torch.randn(students, images, classes, generator=source) * torch.rand(students, 1, 1, generator=source)
    learned = F.one_hot(labels, classes) * 2 * torch.rand(students, 1, 1, generator=source)
    return ([0.5, 3.0, 10.0, 1.0][seed % 4] * (common + own + learned)).to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(12))
def test_linear_agrees_with_brute_force_for_two_students(seed, dtype):
    logits, labels = random_batch(seed, 2, dtype)
    weights = linear_weights(logits, labels)
    assert weights.dtype == dtype
    assert weights.sum().item() == pytest.approx(1, abs=1e-6) and (weights >= 0).all()
    # The loss is convex in the one free weight: halve where the slope changes its sign.
    low, high = doubles(0.0)[0], doubles(1.0)[0]
    exact = logits.double()
    for _ in range(60):
        middle = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(torch.stack([middle, 1 - middle]), exact, labels), middle)
        low, high = (middle.detach(), high) if slope < 0 else (low, middle.detach())
    best = loss_of(torch.stack([low, 1 - low]), exact, labels)
    assert weights[0].item() == pytest.approx(low.item(), abs=2e-3)
    assert -1e-9 <= loss_of(weights.double() / weights.double().sum(), exact, labels) - best <= 1e-6


def excess(logits: Tensor, labels: Tensor) -> float:
    """How far linear_weights is above the smallest loss, by a solver that reads from the host as often as it likes."""
    students = len(logits)

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(point, requires_grad=True)
        value = loss_of(weights, logits, labels)
        return value.item(), torch.autograd.grad(value, weights)[0].numpy()

    best = minimize(
        objective,
        np.full(students, 1 / students),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * students,
        constraints={"type": "eq", "fun": lambda point: point.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    found = loss_of(linear_weights(logits, labels), logits, labels).item()
    assert found <= loss_of(torch.full_like(logits[:, 0, 0], 1 / students), logits, labels).item()
    return found - best.fun


@pytest.mark.parametrize(
    ("students", "accuracy"),
    [
        pytest.param(2, 1e-7, marks=pytest.mark.slow),
        (3, 3e-4),
        pytest.param(4, 2e-3, marks=pytest.mark.slow),
        pytest.param(6, 2e-3, marks=pytest.mark.slow),
    ],
)
def test_linear_agrees_with_a_solver(students, accuracy):
    found = [excess(*random_batch(seed, students, torch.float64)) for seed in range(60)]
    assert min(found) >= -1e-7
    assert max(found) <= accuracy
    assert np.median(found) <= 1e-8


def test_linear_under_autocast_is_that_without():
    logits, labels = random_batch(1, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        within = linear_target(logits, labels)
    assert torch.equal(within, linear_target(logits, labels))


# The weights of variant general.


def test_general_weights_of_two_students():
    # Errors on two images of class 0: (-.2, .2), (-.5, .5) and (-.6, .6), (-.1, .1); so C11 = .29, C22 = .37,
    # C12 = .17, and w1 = (C22 - C12) / (C11 + C22 - 2 C12) = .20 / .32.
    weights, labels = ErrorWeights(2).double(), torch.tensor([0])
    weights.gather(doubles([[0.8, 0.2]], [[0.4, 0.6]]), labels)
    weights.gather(doubles([[0.5, 0.5]], [[0.9, 0.1]]), labels)
    torch.testing.assert_close(weights.products, 2 * doubles([0.29, 0.17], [0.17, 0.37]))
    assert weights.images.item() == 2
    assert weights.weights.tolist() == [0.5, 0.5]
    weights.renew()
    assert weights.weights.tolist() == pytest.approx([0.625, 0.375], abs=2e-6)
    assert not weights.products.any() and not weights.images.any()


def test_general_weights_of_three_students():
    correlation = doubles([0.4, 0.1, 0.2], [0.1, 0.5, 0.1], [0.2, 0.1, 0.6])
    weights = ErrorWeights(3).double()
    weights.products.copy_(20 * correlation), weights.images.fill_(20)
    weights.renew()
    inverse = correlation.inverse()
    torch.testing.assert_close(weights.weights, inverse.sum(1) / inverse.sum(), rtol=1e-5, atol=0)
    # They have the smallest squared error: any shift of weight adds to it.
    best = weights.weights @ correlation @ weights.weights
    for shift in itertools.permutations([0.01, -0.01, 0.0]):
        moved = weights.weights + doubles(*shift)
        assert moved @ correlation @ moved > best


def test_general_has_no_negative_weights():
    # C11 = .08, C22 = .74, C12 = .24: w1 = .50 / .34 is above 1.
    weights = ErrorWeights(2).double()
    weights.gather(doubles([[0.8, 0.2], [1.0, 0.0]], [[0.4, 0.6], [0.9, 0.1]]), torch.tensor([0, 0]))
    weights.renew()
    assert weights.weights.tolist() == [1.0, 0.0]
    method = KDCL(tiny.own_students(), 3, image_size=(8, 8)).double()
    method.ensemble.weights.copy_(weights.weights)
    target = method.target_logits([Z1, Z2], torch.tensor([0]))
    torch.testing.assert_close(target.softmax(1), Z1.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e6])
def test_general_weights_of_equal_students_are_equal(scale, dtype):
    weights = ErrorWeights(3).to(dtype)
    weights.products.fill_(scale), weights.images.fill_(100)
    weights.renew()
    assert weights.weights.tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_general_weights_stay_where_nothing_was_seen():
    weights = ErrorWeights(2)
    weights.weights.copy_(torch.tensor([0.75, 0.25]))
    weights.renew()
    assert weights.weights.tolist() == [0.75, 0.25]


def test_general_mixes_probabilities(make):
    method = make(temperature=2.0)
    method.ensemble.weights.copy_(doubles(0.25, 0.75))
    target = method.target_logits([Z1, Z2], torch.tensor([0]))
    expected = 0.25 * (Z1 / 2).softmax(1) + 0.75 * (Z2 / 2).softmax(1)
    torch.testing.assert_close((target / 2).softmax(1), expected)


# The loss.


def test_the_default_and_its_terms(make):
    method = make()
    assert (method.settings.variant, method.settings.temperature, method.settings.kl_weight) == ("general", 2.0, 1.0)
    terms = method.losses(Outputs((Z1, Z2), ()), torch.tensor([0]), START)
    assert list(terms) == ["ce/student0", "ce/student1", "kl/target->student0", "kl/target->student1"]
    assert terms["ce/student0"].item() == pytest.approx(0.2413113, abs=6e-9)
    assert terms["ce/student1"].item() == pytest.approx(1.10413061, abs=6e-9)


def test_minlogit_loss_by_hand(make):
    method = make(variant="minlogit", kl_weight=0.5)
    terms = method.losses(Outputs((Z1, Z2), ()), torch.tensor([0]), START)
    powers = [math.exp(each / 2) for each in (0.0, -1.5, -3.0)]
    target = [each / sum(powers) for each in powers]
    for index, logits in enumerate((Z1, Z2)):
        powers = [math.exp(each / 2) for each in logits[0].tolist()]
        divergence = sum(t * math.log(t * sum(powers) / power) for t, power in zip(target, powers, strict=True))
        assert terms[f"kl/target->student{index}"].item() == pytest.approx(0.5 * 4 * divergence, abs=1e-12)
    # The target is the first student, shifted by a constant.
    assert terms["kl/target->student0"].item() == pytest.approx(0, abs=1e-12)


def target_by_hand(method: KDCL, logits: list[Tensor], labels: Tensor) -> Tensor:
    """The target's probabilities at the temperature, image by image; of linear, with the weights that were found."""
    temperature, rows = method.settings.temperature, []
    stacked = torch.stack(logits).detach()
    for image, label in enumerate(labels.tolist()):
        own = stacked[:, image]
        if method.settings.variant == "naive":
            scores = min(own, key=lambda each: -math.log(slow.probabilities(each[None])[0, label]))
        elif method.settings.variant == "minlogit":
            scores = torch.stack([min(each[c] - each[label] for each in own) for c in range(own.shape[1])])
        elif method.settings.variant == "linear":
            scores = sum(a * each for a, each in zip(linear_weights(stacked, labels), own, strict=True))
        else:
            softened = [slow.probabilities(each[None], temperature)[0] for each in own]
            rows.append(sum(w * each for w, each in zip(method.ensemble.weights, softened, strict=True)))
            continue
        rows.append(slow.probabilities(scores[None], temperature)[0])
    return torch.stack(rows)


@EACH_VARIANT
@pytest.mark.parametrize("views", [True, False], ids=["own-views", "one-view"])
@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        ([(8, 2), (8, 2)], {}),
        ([(8, 2), (10, 1), (8, 2)], {"temperature": 3.0, "kl_weight": 0.3}),
        ([(8, 2), (8, 2), (8, 2)], {"shared_stages": 1}),
    ],
    ids=["two", "three-unlike", "three-shared"],
)
def test_a_whole_step_agrees_with_a_slow_derivation(make, batch, shapes, settings, variant, views):
    method = make(*shapes, variant=variant, **settings)
    slow.disturb_norms(method)
    if variant == "general":
        method.ensemble.weights.copy_(torch.arange(len(shapes)) + 1.0)
        method.ensemble.weights /= method.ensemble.weights.sum()
    images, labels = batch
    if views:
        images = torch.stack([images.roll(index, dims=-1) + 0.1 * index for index in range(len(shapes))])
    logits = []
    for index, (_, stride) in enumerate(shapes):
        features = images.flatten(0, -4)
        for depth, ((conv, norm), step) in enumerate(zip(method.cohort[index].stages, (1, 1, stride), strict=True)):
            if views and depth == method.cohort.shared_stages:  # up to here, batch statistics are over all views
                features = features.unflatten(0, images.shape[:2])[index]
            features = F.conv2d(features, conv.weight, stride=step, padding=1)
            features = slow.batch_norm(features, norm).clamp(min=0)
        logits.append(slow.head_logits(method.cohort[index], features))
    target = target_by_hand(method, logits, labels)
    temperature, weight = method.settings.temperature, method.settings.kl_weight
    by_hand = sum(
        slow.ce(each, labels) + weight * temperature**2 * slow.kl(target, each, temperature) for each in logits
    )
    slow.assert_step_agrees(method, (images, labels), 0, by_hand)


@EACH_VARIANT
def test_the_target_gets_no_gradient(make, batch, variant):
    method = make(*[(8, 2)] * 3, variant=variant)
    for index in range(3):
        assert slow.reached(method, batch, f"ce/student{index}") == {f"branch{index}", f"head{index}"}
        assert slow.reached(method, batch, f"kl/target->student{index}") == {f"branch{index}", f"head{index}"}
    logits = tuple(each.detach().requires_grad_() for each in (Z1, Z2, Z2))
    assert not method.target_logits(logits, torch.tensor([0])).requires_grad


# Views and epochs.

CPU, AUGMENTATION = torch.device("cpu"), Augmentation(padding=2)


def run_epoch(method: cd.Method, epoch: int = 0) -> tuple[DeviceImages, list]:
    images = DeviceImages(tiny.data().train, tiny.data().statistics, CPU)
    images.affine.double()
    step = make_step(method, images, AUGMENTATION, tiny.settings(weight_decay=0.01))
    plan = epoch_indices(24, 0, epoch, AUGMENTATION, CPU, method.views)
    taken = [plan.part(begin, begin + 6) for begin in range(0, 24, 6)]
    for batch in taken:
        step(batch, torch.tensor(epoch / 2))
    return images, taken


@EACH_VARIANT
@pytest.mark.parametrize("views", [True, False], ids=["own-views", "one-view"])
def test_an_epoch_equals_one_written_by_hand(variant, views):
    # In float64: variants choose, so that one rounding in float32 may lead to another target.
    # The learning rate is float32.
    method = tiny.method(KDCL, variant=variant, views_per_student=views).double().train()
    other = copy.deepcopy(method)
    images, taken = run_epoch(method)
    optimizer = torch.optim.SGD(other.parameters(), 0.05, 0.9, weight_decay=0.01, nesterov=True, foreach=False)
    products, temperature = torch.zeros(2, 2, dtype=torch.float64), other.settings.temperature
    for batch in taken:
        logits = []
        for index, student in enumerate(other.cohort):
            own = type(batch)(*(table[index] for table in batch.tables())) if views else batch
            pixels, labels = images.augmented(own, AUGMENTATION)
            logits.append(student(pixels))
        softened = torch.stack([slow.probabilities(each.detach(), temperature) for each in logits])
        errors = softened - F.one_hot(labels, 3)
        products += torch.einsum("ibc,jbc->ij", errors, errors)
        target = target_by_hand(other, logits, labels)
        distances = sum(slow.kl(target, each, temperature) for each in logits)
        optimizer.zero_grad()
        (sum(slow.ce(each, labels) for each in logits) + temperature**2 * distances).backward()
        optimizer.step()
    expected = other.state_dict()
    gathered = {"ensemble.products": products, "ensemble.images": torch.tensor(24.0, dtype=torch.float64)}
    for name, tensor in method.state_dict().items():
        wanted = gathered.get(name, expected[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: name + text)
    method.after_epoch()
    if variant == "general":
        first = (products[1, 1] - products[0, 1]) / (products[0, 0] + products[1, 1] - 2 * products[0, 1])
        first = first.clamp(0, 1).item()
        assert first != pytest.approx(0.5, abs=1e-3)
        assert method.ensemble.weights.tolist() == pytest.approx([first, 1 - first], abs=1e-4)


def test_evaluation_gathers_nothing(make, batch):
    method = make().eval()
    terms = method.losses(method(batch[0]), batch[1], START)
    assert torch.stack(list(terms.values())).isfinite().all()
    assert not method.ensemble.images.any()


def test_weights_are_part_of_the_state(make, batch):
    method, other = make(), make()
    sum(method.losses(method(batch[0]), batch[1], START).values()).backward()
    assert method.ensemble.images.item() == 6
    method.after_epoch()
    assert method.ensemble.weights.tolist() != [0.5, 0.5]
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.ensemble.weights, method.ensemble.weights)
    assert not [name for name in make(variant="naive").state_dict() if name.startswith("ensemble")]


def test_a_run_renews_the_weights_and_is_read_back(tmp_path, tiny_registered):
    data = cd.dataset("packed", tiny.write_npz(tmp_path / "colours.npz", tiny.data()))
    torch.manual_seed(0)
    method = KDCL([cd.network("tiny", 3), cd.network("tiny", 3)], 3, image_size=(8, 8))
    run = cd.train(method, data, out=tmp_path / "run", settings=tiny.settings(), show=False)
    weights = method.ensemble.weights
    assert weights.sum().item() == pytest.approx(1) and weights[0].item() != 0.5
    assert not method.ensemble.images.any()
    again = run.load_method("last")
    assert torch.equal(again.ensemble.weights, weights.cpu())


@EACH_VARIANT
def test_losses_under_autocast_are_those_without(make, batch, variant):
    method = make(*[(8, 2)] * 3, variant=variant).float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = method(batch[0].float())
        within = method.losses(outputs, batch[1], START)
    without = method.losses(outputs, batch[1], START)
    assert outputs.logits[0].dtype == torch.bfloat16
    assert {term.dtype for term in within.values()} == {torch.float32}
    assert all(torch.equal(within[name], without[name]) for name in without)


@EACH_VARIANT
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_no_host_read_with_own_views(variant, precision):
    method = tiny.method(KDCL, variant=variant).train()
    images = DeviceImages(tiny.data().train, tiny.data().statistics, CPU)
    step = make_step(method, images, AUGMENTATION, tiny.settings(weight_decay=0.01), precision)
    plan = epoch_indices(24, 0, 0, AUGMENTATION, CPU, method.views)
    with tiny.HostReads() as reads:
        step(plan.part(0, 6), START)
        step(plan.part(6, 12), START)
    assert reads.found == []
    assert all(math.isfinite(value) for value in step.sums.means().values())
