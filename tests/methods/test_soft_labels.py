"""Labels that are shares of classes: the cross-entropy of every method, and own methods that cannot use them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import codistill as cd
from codistill.core.errors import UsageError
from codistill.data.mixing import soft_labels
from codistill.methods.kd import WithTeacher
from codistill.methods.kdcl import linear_target, minlogit_target, naive_target
from codistill.methods.losses import cross_entropy, label_shares
from codistill.settings.augment import AugmentSettings
from codistill.training.rehearsal import rehearse

from .. import tiny

CPU = torch.device("cpu")


def test_the_cross_entropy_with_shares_is_that_of_torch():
    torch.manual_seed(0)
    logits, shares = torch.randn(2, 5, 4), torch.rand(5, 4)
    expected = torch.stack([F.cross_entropy(each, shares) for each in logits])
    torch.testing.assert_close(cross_entropy(logits, shares), expected)
    # By hand: ln(1 + e^-1) where 2 of 3 of the label are class 0 with logit 1, 1 of 3 class 1 with logit 0.
    assert cross_entropy(torch.tensor([[1.0, 0.0]]), torch.tensor([[2 / 3, 1 / 3]])).item() == pytest.approx(
        0.31326169 * 2 / 3 + 1.31326169 / 3
    )


@hypothesis_settings(deadline=None, max_examples=30, derandomize=True)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_cross_entropy_of_a_mixed_label_is_the_mixed_cross_entropy(share, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    one, other = (torch.randint(0, 5, (6,), generator=generator) for _ in range(2))
    mixed = torch.lerp(soft_labels(one, 5), soft_labels(other, 5), share)
    expected = (1 - share) * cross_entropy(logits, one) + share * cross_entropy(logits, other)
    torch.testing.assert_close(cross_entropy(logits, mixed), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["general", "naive", "linear", "minlogit"])
def test_kdcl_with_one_hot_shares_is_kdcl_with_indices(variant):
    compare(cd.KDCL, variant=variant)


@pytest.mark.parametrize("name", [name for name in cd.METHODS if name != "kdcl"])
def test_every_method_with_one_hot_shares_is_the_method_with_indices(name):
    compare(cd.METHODS[name])


def compare(kind, **settings):
    students = max(2, kind.min_students) if kind.max_students != 1 else 1
    method = tiny.method(kind, students=students, **settings).train()
    if kind.teacher == "required":
        method = WithTeacher(method, tiny.own_students(1)[0])
    data = tiny.data().train
    pixels, labels = torch.from_numpy(data.images[:8]).permute(0, 3, 1, 2) / 255.0, torch.from_numpy(data.labels[:8])
    outputs = method(pixels.expand(method.views, *pixels.shape) if method.views > 1 else pixels)
    hard = method.losses(outputs, labels, 0.5)
    soft = method.losses(outputs, soft_labels(labels, 3), 0.5)
    assert hard.keys() == soft.keys()
    for term in hard:
        torch.testing.assert_close(hard[term], soft[term], rtol=1e-5, atol=1e-6)
    mixed = method.losses(outputs, torch.lerp(soft_labels(labels, 3), soft_labels(labels.flip(0), 3), 0.3), 0.5)
    cross_entropies = [term for term in hard if term.startswith("ce/")]
    assert cross_entropies and any(not torch.equal(hard[term], mixed[term]) for term in cross_entropies)


def test_targets_of_kdcl_with_mixed_labels_by_hand():
    # One image, half of class 0 and half of class 1; the second student fits that better, the first fits class 0.
    logits = torch.tensor([[[4.0, 0.0, 0.0]], [[2.0, 2.0, 0.0]]])
    label = torch.tensor([[0.5, 0.5, 0.0]])
    assert torch.equal(naive_target(logits, label), logits[1])
    assert torch.equal(naive_target(logits, torch.tensor([0])), logits[0])
    # Margins to the mean logit of the two, 2 for both students.
    assert minlogit_target(logits, label).tolist() == [[0.0, -2.0, -2.0]]
    assert cross_entropy(linear_target(logits, label), label) <= cross_entropy(logits[1], label) + 1e-4


def test_shares_add_up_to_one_whatever_the_weights():
    weighted = soft_labels(torch.tensor([0, 2]), 3, 0.3, torch.tensor([0.5, 1.0, 4.0]))
    torch.testing.assert_close(label_shares(weighted, torch.zeros(2, 3)), soft_labels(torch.tensor([0, 2]), 3, 0.3))


def own(losses):
    """A user's own method with such losses."""

    class Own(cd.Method):
        pass

    Own.losses = losses
    return tiny.method(Own)


def test_an_own_method_with_the_cross_entropy_of_torch_takes_shares():
    def losses(self, outputs, labels, progress):
        return {f"ce/student{j}": F.cross_entropy(each, labels) for j, each in enumerate(outputs.logits)}

    rehearse(own(losses), tiny.data(), 2, CPU, softened=True)


def test_an_own_method_that_needs_class_indices_is_refused_in_one_line():
    def losses(self, outputs, labels, progress):
        return {"ce": -outputs.logits[0].log_softmax(1).gather(1, labels[:, None]).mean()}

    method = own(losses)
    rehearse(method, tiny.data(), 2, CPU)
    with pytest.raises(UsageError, match=r"Own: its losses need class indices, but mixup, cutmix.* test_soft_labels"):
        rehearse(method, tiny.data(), 2, CPU, softened=True)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mixup": -1.0}, "mixup is -1.0; it must be a number, at least 0"),
        ({"cutmix": float("inf")}, "cutmix is inf; it must be a number, at least 0"),
        ({"resized_crop": 0.0}, "resized_crop is 0.0; it must be above 0 and at most 1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be from 0 to below 1"),
        ({"random_erasing": 1.5}, "random_erasing is 1.5; it must be from 0 to 1"),
        ({"color_jitter": float("nan")}, "color_jitter is nan; it must be from 0 to 1"),
        ({"randaugment_magnitude": 31}, "randaugment_magnitude is 31; it must be from 0 to 30"),
        ({"randaugment_operations": 0}, "randaugment_operations is 0; it must be from 1 to 16"),
        ({"auto_augment": "randaug"}, "auto_augment is 'randaug': did you mean randaugment"),
        ({"class_weights": "balanced", "sampling": "balanced"}, "which counts small classes twice: use one"),
        ({"class_weights": "balanced", "sampling": "class-pairs"}, "are balanced and class-pairs, which counts small"),
    ],
)
def test_settings_that_cannot_be(settings, line):
    with pytest.raises(UsageError) as caught:
        AugmentSettings(**settings)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert dataclasses.replace(AugmentSettings(), mixup=0.4).mixes
