"""MCL: the contrasts by hand, images without a positive, mixed labels, what is compared with what."""

import math

import pytest
import torch

import codistill as cd
from codistill.core.errors import UsageError
from codistill.data.mixing import soft_labels
from codistill.methods.cohort import Outputs
from codistill.methods.losses import supervised_contrast
from codistill.methods.mcl import MCL, ContrastSettings, Embedding, contrast_terms
from codistill.networks.network import parameter_count
from codistill.training.prepare import check_parts
from codistill.training.ranks import Ranks

from .. import tiny
from . import slow

METHOD = MCL
NOW = torch.tensor(0.5)
EMBEDDINGS = [  # of two networks, four images in a plane, of length 1
    [(1.0, 0.0), (0.6, 0.8), (0.0, 1.0), (-0.8, 0.6)],
    [(0.8, 0.6), (1.0, 0.0), (0.0, -1.0), (0.6, 0.8)],
]
ICL = "icl/student1->student0"


def tensors(*embeddings) -> list[torch.Tensor]:
    return [torch.tensor(each, dtype=torch.float64) for each in embeddings]


def similarity(one, other, temperature: float = 0.1) -> list[list[float]]:
    return [[sum(map(math.prod, zip(a, b, strict=True))) / temperature for b in other] for a in one]


def contrast(rows, classes) -> float:
    """Supervised contrast with nothing but floats."""
    of_images = []
    for image, row in enumerate(rows):
        others = [other for other in range(len(rows)) if other != image]
        positives = [other for other in others if classes[other] == classes[image]]
        if positives:
            total = math.log(sum(math.exp(row[other]) for other in others))
            of_images.append(sum(total - row[other] for other in positives) / len(positives))
    return sum(of_images) / len(of_images) if of_images else 0.0


def softened(target, rows, temperature: float = 3.0) -> float:
    """T^2 KL of similarities, mean over images."""
    each = [slow.divergence(*pair, temperature) for pair in zip(target, rows, strict=True)]
    return temperature**2 * sum(each) / len(rows)


def test_terms_by_hand():
    first, second = EMBEDDINGS
    classes = [0, 1, 0, 0]
    terms = contrast_terms([[each] for each in tensors(*EMBEDDINGS)], torch.tensor(classes), ContrastSettings())
    own, other, across = similarity(first, first), similarity(second, second), similarity(first, second)
    back = similarity(second, first)
    expected = {
        "vcl/student0": 0.1 * contrast(own, classes),
        "vcl/student1": 0.1 * contrast(other, classes),
        "icl/student1->student0": 0.1 * contrast(across, classes),
        "icl/student0->student1": 0.1 * contrast(back, classes),
        "softvcl/student1->student0": softened(other, own),
        "softvcl/student0->student1": softened(own, other),
        "softicl/student1->student0": softened(back, across),
        "softicl/student0->student1": softened(across, back),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, abs=1e-12) and value > 0.01, name


def test_the_contrast_where_it_is_a_formula():
    # Two images of each of two classes, on one axis each: e^10 for the positive, e^0 for each of the two others.
    pairs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    found = supervised_contrast(10 * pairs @ pairs.T, labels).item()
    assert found == pytest.approx(math.log(1 + 2 * math.exp(-10)), abs=1e-12)
    # Equal embeddings tell nothing: each of the three others is as likely.
    assert supervised_contrast(torch.full((4, 4), 7.0), labels).item() == pytest.approx(math.log(3), abs=1e-6)


def test_images_without_a_positive_are_left_out():
    rows = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 0])
    loss = supervised_contrast(rows, labels)
    assert loss.item() == pytest.approx(contrast(rows.tolist(), labels.tolist()), abs=1e-12)
    loss.backward()
    assert rows.grad[[0, 2, 4]].any(dim=1).all() and not rows.grad[[1, 3]].any() and rows.grad.isfinite().all()
    alone = torch.randn(3, 3, requires_grad=True)
    loss = supervised_contrast(alone, torch.arange(3))
    loss.backward()
    assert loss.item() == 0 and not alone.grad.any()
    single = torch.randn(2, 1, 1, requires_grad=True)
    losses = supervised_contrast(single, torch.zeros(1, dtype=torch.long))
    losses.sum().backward()
    assert losses.tolist() == [0, 0] and not single.grad.any()


def test_a_mixed_image_is_of_the_class_with_its_largest_share():
    rows, labels = torch.randn(6, 6), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = supervised_contrast(rows, labels)
    assert torch.equal(supervised_contrast(rows, soft_labels(labels, 3, 0.3)), expected)
    mixed = [torch.lerp(soft_labels(labels, 3), soft_labels(labels.roll(1), 3), share) for share in (0.4, 0.6)]
    assert torch.equal(supervised_contrast(rows, mixed[0]), expected)
    others = supervised_contrast(rows, labels.roll(1))
    assert torch.equal(supervised_contrast(rows, mixed[1]), others) and not torch.equal(others, expected)


def test_networks_that_agree_have_no_soft_terms():
    # The second network's embeddings are the first's, turned by a right angle: the same similarities within.
    first = EMBEDDINGS[0]
    turned = [(-y, x) for x, y in first]
    terms = contrast_terms([[each] for each in tensors(first, turned)], torch.tensor([0, 0, 1, 1]), ContrastSettings())
    assert terms["softvcl/student1->student0"].item() == pytest.approx(0, abs=1e-12)
    assert terms["softicl/student1->student0"].item() > 0.1
    terms = contrast_terms([[each] for each in tensors(first, first)], torch.tensor([0, 0, 1, 1]), ContrastSettings())
    assert terms["softicl/student1->student0"].item() == pytest.approx(0, abs=1e-12)
    assert terms["vcl/student0"].item() == pytest.approx(terms[ICL].item(), abs=1e-12)


def test_logits_teach_only_if_asked(make, batch):
    outputs = Outputs((torch.tensor([[2.0, 0.0, -1.0]] * 6), torch.tensor([[0.0, 3.0, 1.0]] * 6)), ())
    extras = make()(batch[0]).extras
    outputs = Outputs(tuple(each.double() for each in outputs.logits), (), extras=extras)
    assert not any(term.startswith("kl/") for term in make().losses(outputs, batch[1], NOW))
    terms = make(kl_weight=0.5).losses(outputs, batch[1], NOW)
    for index, logits in enumerate(([2.0, 0.0, -1.0], [0.0, 3.0, 1.0])):
        expected = 0.5 * 9 * slow.divergence([1.0, 1.5, 0.0], logits, 3.0)
        assert terms[f"kl/ensemble->student{index}"].item() == pytest.approx(expected, abs=1e-12)


def embedded(embedding: Embedding, feature_map: torch.Tensor) -> torch.Tensor:
    first, _, last = embedding.layers
    hidden = (slow.pooled(feature_map) @ first.weight.T + first.bias).clamp(min=0)
    raw = hidden @ last.weight.T + last.bias
    return raw / (raw**2).sum(1, keepdim=True).sqrt()


def by_hand(method, batch, strides, weights=(0.1, 0.1, 1.0, 1.0), tau=0.1, temperature=3.0, kl=0.0):
    images, labels = batch
    maps, logits = slow.run_students(method, images, strides)
    points = [embedded(each, own[-1]) for each, own in zip(method.embeddings, maps, strict=True)]
    loss = sum(slow.ce(each, labels) for each in logits)
    mean = torch.tensor((sum(logits) / len(logits)).tolist(), dtype=torch.float64)
    for each in logits:
        loss = loss + kl * temperature**2 * slow.kl(slow.probabilities(mean, temperature), each, temperature)
    for a, one in enumerate(points):
        for b, other in enumerate(points):
            rows, count = one @ other.T / tau, len(labels)
            for p in range(count):
                others = [k for k in range(count) if k != p]
                positives = [k for k in others if labels[k] == labels[p]]
                total = sum(rows[p, k].exp() for k in others).log()
                for q in positives:
                    loss = loss + weights[a != b] * (total - rows[p, q]) / (len(positives) * count)
            if a != b:
                within, theirs = one @ one.T / tau, (other @ other.T / tau).detach()
                for weight, target, own in ((weights[2], theirs, within), (weights[3], rows.T.detach(), rows)):
                    divergence = slow.kl(slow.probabilities(target, temperature), own, temperature)
                    loss = loss + weight * temperature**2 * divergence
    return loss


@pytest.mark.parametrize(
    ("shapes", "settings", "derivation"),
    {
        "a pair": ([(8, 2)] * 2, {}, {}),
        "three": ([(8, 2)] * 3, {"kl_weight": 0.7}, {"kl": 0.7}),
        "unlike": ([(8, 2), (10, 1)], {"shared_stages": 1}, {}),
        "settings": (
            [(8, 2)] * 2,
            {
                "vcl_weight": 0.3,
                "icl_weight": 0.7,
                "soft_vcl_weight": 0.4,
                "soft_icl_weight": 2.0,
                "contrast_temperature": 0.5,
                "temperature": 1.5,
                "kl_weight": 1.0,
            },
            {"weights": (0.3, 0.7, 0.4, 2.0), "tau": 0.5, "temperature": 1.5, "kl": 1.0},
        ),
    }.values(),
)
def test_a_step_against_a_slow_derivation(make, batch, shapes, settings, derivation):
    method = make(*shapes, **settings)
    slow.disturb_norms(method)
    strides = [stride for _, stride in shapes]
    slow.assert_step_agrees(method, batch, 10, by_hand(method, batch, strides, **derivation))


def test_which_modules_a_term_moves(make, batch):
    method = make()
    own = {f"embedding{index}": each for index, each in enumerate(method.embeddings)}
    both = {"branch0", "branch1", "embedding0", "embedding1"}
    for term, expected in {
        "vcl/student0": {"branch0", "embedding0"},
        "softvcl/student1->student0": {"branch0", "embedding0"},
        ICL: both,
        "softicl/student1->student0": both,
    }.items():
        assert slow.reached(method, batch, term, **own) == expected, term


def test_embeddings_serve_the_training_only(make, batch):
    method = make().eval()
    predictors = method.predictors()
    assert list(predictors) == list(method.predictions(method(batch[0]))) == ["student0", "student1", "ensemble"]
    assert predictors["student0"] is method.cohort[0]
    assert parameter_count(method.embeddings[0]) == 8 * 128 + 128 + 128 * 128 + 128
    (group,) = method.parameter_groups()
    assert len(group.parameters) == len(list(method.parameters()))


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("vcl_weight", -0.1, "vcl_weight is -0.1; it must be at least 0"),
        ("kl_weight", math.inf, "kl_weight is inf; it must be at least 0"),
        ("contrast_temperature", 0.0, r"contrast_temperature is 0.0; it must be a number above 0"),
        ("temperature", math.nan, r"temperature is nan; it must be a number above 0"),
    ],
)
def test_settings_that_cannot_be(name, value, line):
    with pytest.raises(UsageError, match=line):
        MCL.Settings(**{name: value})


def test_a_part_of_a_batch_is_not_compared():
    config = cd.RunConfig(method_name="mcl", networks=("tiny",) * 2, train=tiny.settings(), method=MCL.Settings())
    with pytest.raises(UsageError, match="mcl with the contrast between images needs the full batch in one process"):
        check_parts(config, 20, Ranks(0, 2))
