"""KDGAN: who learns from whom, relaxed samples, and what a discriminator that knows nothing teaches."""

import math

import pytest
import torch
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.kdgan import KDGAN
from codistill.networks import Network

from . import slow

METHOD = KDGAN
NOISE = ("noise/student0", "noise/student1")
BOTH = {"trunk", "branch0", "head0", "branch1", "head1"}


def outputs(scores, noise=((0.0, 0.0), (0.0, 0.0)), classifier=(2.0, 0.0), teacher=(0.0, 1.0)) -> Outputs:
    logits = tuple(torch.tensor([each], dtype=torch.float64) for each in (classifier, teacher))
    drawn = {name: torch.tensor([each], dtype=torch.float64) for name, each in zip(NOISE, noise, strict=True)}
    return Outputs(logits, (), extras={"scores": torch.tensor([scores], dtype=torch.float64), **drawn})


def terms(method, *arguments, progress=0.5, **more) -> dict[str, float]:
    found = method.losses(outputs(*arguments, **more), torch.tensor([0]), torch.tensor(progress, dtype=torch.float64))
    return {name: each.item() for name, each in found.items()}


def softplus(value: float) -> float:
    return math.log(1 + math.exp(value))


def test_terms_by_hand(make):
    # tau is 1 half way from 10 to 0.1: the samples are (.8808, .1192) and (.2689, .7311), the scores of them
    # 3 * .8808 - .1192 = 2.5232 and 3 * .2689 - .7311 = .0758; that of the label is 3.
    found = terms(make(), (3.0, -1.0))
    assert found["adversarial/student0"] == pytest.approx(-0.2 * softplus(2.52318831))
    assert found["adversarial/student1"] == pytest.approx(-0.8 * softplus(0.07576569))
    believed = softplus(-3) + 0.2 * softplus(2.52318831) + 0.8 * softplus(0.07576569)
    assert found["adversarial/discriminator"] == pytest.approx(believed)
    assert found["ce/student0"] == pytest.approx(softplus(-2)) and found["ce/student1"] == pytest.approx(softplus(1))
    there, back = (9 * slow.divergence(*pair, 3) for pair in (((0, 1), (2, 0)), ((2, 0), (0, 1))))
    assert found["kl/student1->student0"] == pytest.approx(there)
    assert found["kl/student0->student1"] == pytest.approx(1e-4 * back)


def test_noise_is_added_before_the_softmax(make):
    # Noise that takes the logits' difference away: both samples are (1/2, 1/2), whose score is 1.
    found = terms(make(), (3.0, -1.0), noise=((0.0, 2.0), (1.0, 0.0)))
    assert found["adversarial/student0"] == pytest.approx(-0.2 * softplus(1))
    assert found["adversarial/student1"] == pytest.approx(-0.8 * softplus(1))


@pytest.mark.parametrize(("progress", "tau"), [(0.0, 10.0), (0.5, 1.0), (1.0, 0.1)])
def test_samples_become_sharp(make, progress, tau):
    share = 1 / (1 + math.exp(-2 / tau))
    found = terms(make(), (3.0, -1.0), progress=progress)
    assert found["adversarial/student0"] == pytest.approx(-0.2 * softplus(4 * share - 1))


def test_the_noise_is_of_gumbel_and_drawn_in_training_alone(make, batch):
    method = make()
    images = batch[0].repeat(50, 1, 1, 1)
    drawn = torch.cat([method(images).extras[name].flatten() for _ in range(6) for name in NOISE])
    # Mean: Euler's constant; standard deviation: pi / sqrt 6. Four standard errors of 10,800 draws.
    assert drawn.mean().item() == pytest.approx(0.5772, abs=4 * 1.2825 / 10_800**0.5)
    assert drawn.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.06)
    assert not method.eval()(batch[0]).extras


def test_a_discriminator_that_knows_nothing_teaches_nothing(make, batch):
    method = make()
    head = method.discriminator.head.linear
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    found = method.losses(method(batch[0]), batch[1], torch.tensor(0.5))
    for index in (0, 1):
        parameters = list(method.cohort.parameters())
        gradients = torch.autograd.grad(
            found[f"adversarial/student{index}"], parameters, retain_graph=True, allow_unused=True
        )
        assert all(each is None or not each.any() for each in gradients)
    assert found["adversarial/discriminator"].item() == pytest.approx(2 * math.log(2))


def by_hand(method: KDGAN, images: Tensor, labels: Tensor, noise: list[Tensor], scores: Tensor, tau: float) -> Tensor:
    """The loss in plain sums; what a term does not train is a constant of the same value."""
    _, (classifier, teacher) = slow.run_students(method, images, (2, 2))
    fixed = scores.detach()
    loss = slow.ce(classifier, labels) + slow.ce(teacher, labels)
    for weight, logits, drawn in zip((0.2, 0.8), (classifier, teacher), noise, strict=True):
        named = slow.probabilities(logits + drawn, tau)
        for image, label in enumerate(labels):
            believed = 1 / (1 + torch.exp(-(named[image] * fixed[image]).sum()))
            loss = loss + weight * torch.log(1 - believed) / len(labels)
            believed = 1 / (1 + torch.exp(-(named[image].detach() * scores[image]).sum()))
            loss = loss - weight * torch.log(1 - believed) / len(labels)
            if weight == 0.2:
                loss = loss - torch.log(1 / (1 + torch.exp(-scores[image, label]))) / len(labels)
    target = slow.probabilities(teacher.detach(), 3)
    back = slow.probabilities(classifier.detach(), 3)
    return loss + 9 * slow.kl(target, classifier, 3) + 1e-4 * 9 * slow.kl(back, teacher, 3)


def test_a_step_against_a_slow_derivation(make, batch):
    method = make()
    slow.disturb_norms(method)
    torch.manual_seed(1)
    found = method(batch[0])
    noise = [found.extras[name] for name in NOISE]
    loss = by_hand(method, *batch, noise, method.discriminator(batch[0]), 10 * 0.01 ** (10 / 300))
    torch.manual_seed(1)
    slow.assert_step_agrees(method, batch, 10, loss)


def test_the_discriminator_is_in_no_predictor(make):
    method = make()
    own = {id(each) for each in method.discriminator.parameters()}
    for predictor in method.predictors().values():
        assert not own & {id(each) for each in predictor.parameters()}
    assert isinstance(method.discriminator, Network) and method.discriminator.spec == "resnet8"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 1.5}, "method.alpha is 1.5; it must be between 0 and 1"),
        ({"last_tau": 0.0}, "method.last_tau is 0.0; it must be a number above 0"),
        ({"teacher_kl_weight": -1.0}, "method.teacher_kl_weight is -1.0; it must be a number, at least 0"),
        ({"discriminator": "resnet9"}, "unknown network 'resnet9'"),
    ],
)
def test_bad_settings(make, settings, words):
    with pytest.raises(UsageError, match=words):
        make(**settings)
