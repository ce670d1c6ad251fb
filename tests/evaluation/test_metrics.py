"""Scores against torchmetrics and F.cross_entropy, and sums that the host reads once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from codistill.evaluation.metrics import ClassificationSums, Scores, TermSums, read_together, scores

from .. import tiny

CPU = torch.device("cpu")


def scored(logits: Tensor, labels: Tensor, parts: list[int] | None = None) -> Scores:
    sums = ClassificationSums(logits.shape[1], CPU)
    sizes = parts or [len(labels)]
    for some, of_them in zip(logits.split(sizes), labels.split(sizes), strict=True):
        sums.update(some, of_them)
    return scores(read_together(sums.tensors()))


def reference(logits: Tensor, labels: Tensor) -> Scores:
    classes = logits.shape[1]
    error = [
        100 * (1 - multiclass_accuracy(logits, labels, classes, average="micro", top_k=min(k, classes)).item())
        for k in (1, 5)
    ]
    ece = 100 * multiclass_calibration_error(logits.softmax(dim=1), labels, classes, n_bins=15, norm="l1").item()
    wrong = (logits.argmax(dim=1) != labels).double()
    balanced = 100 * torch.stack([wrong[labels == each].mean() for each in labels.unique()]).mean().item()
    return Scores(*error, F.cross_entropy(logits.double(), labels).item(), ece, balanced)


def assert_alike(one: Scores, other: Scores, tolerance: float) -> None:
    for name in ("top1_error", "top5_error", "nll", "ece", "balanced_error"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=tolerance, abs=tolerance), name


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    """Logits that are anything from undecided to sure, right or wrong, and batches that they come in."""
    count, classes = draw(st.integers(1, 120)), draw(st.integers(2, 12))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    labels = torch.randint(classes, (count,), generator=source)
    logits = draw(st.sampled_from([0.1, 1.0, 5.0])) * torch.randn(count, classes, generator=source)
    logits += draw(st.sampled_from([-2.0, 0.0, 2.0])) * F.one_hot(labels, classes)
    parts = []
    while sum(parts) < count:
        parts.append(draw(st.integers(1, count - sum(parts))))
    return logits, labels, parts


@hypothesis_settings(deadline=None, max_examples=60, derandomize=True)
@given(predictions())
def test_scores_are_those_of_torchmetrics(drawn):
    logits, labels, parts = drawn
    assert_alike(scored(logits, labels, parts), reference(logits, labels), 1e-4)


def test_numbers_by_hand():
    # Probabilities 0.8 (right), 0.6 (wrong), 0.5 (right): three bins, gaps 0.2, 0.6 and 0.5 of one image each.
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    found = scored(probabilities.log(), torch.tensor([0, 1, 2]))
    assert found.top1_error == pytest.approx(100 / 3)
    assert found.top5_error == 0
    assert found.nll == pytest.approx(-torch.tensor([0.8, 0.3, 0.5]).log().mean().item(), abs=1e-6)
    assert found.ece == pytest.approx(100 * (0.2 + 0.6 + 0.5) / 3, abs=1e-4)


def test_certainty_has_a_bin_and_is_finite():
    logits = 1000.0 * F.one_hot(torch.tensor([0, 1]), 3)
    assert scored(logits, torch.tensor([0, 1])) == Scores(0.0, 0.0, 0.0, 0.0, 0.0)
    found = scored(logits, torch.tensor([0, 2]))
    assert (found.top1_error, found.top5_error, found.nll, found.ece) == (50, 0, 500, pytest.approx(50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened(dtype):
    logits, labels = torch.randn(50, 7).to(dtype), torch.randint(7, (50,))
    assert scored(logits, labels) == scored(logits.float(), labels)


def test_many_updates_do_not_lose_the_small_ones():
    # 2^24 + 1 images are not a float32.
    sums = ClassificationSums(2, CPU)
    sums._counts += 2**24
    sums.update(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    assert sums.tensors()["images"].item() == 2**24 + 1


def test_updates_read_nothing_back():
    logits, labels = torch.randn(10, 4), torch.randint(4, (10,))
    sums, terms = ClassificationSums(4, CPU), TermSums(CPU)
    with tiny.HostReads() as reads:
        for _ in range(2):
            sums.update(logits, labels)
            terms.update({"ce/student0": logits.sum(), "ce/student1": logits.mean()}, 10)
        sums.tensors()
        assert reads.found == []
        terms.means()
        assert reads.found == ["tolist"]


def test_terms_are_weighted_by_images():
    terms = TermSums(CPU)
    terms.update({"ce/student0": torch.tensor(1.0), "kl/fused->student0": torch.tensor(10.0)}, 8)
    terms.update({"ce/student0": torch.tensor(4.0), "kl/fused->student0": torch.tensor(-5.0)}, 4)
    means = terms.means()
    assert means == {"loss": 7.0, "ce/student0": 2.0, "kl/fused->student0": 5.0}
    assert list(means) == ["loss", "ce/student0", "kl/fused->student0"]


def test_means_may_be_read_on_the_way_and_sums_reset():
    terms = TermSums(CPU)
    terms.update({"ce": torch.tensor(2.0)}, 3)
    assert terms.means() == terms.means() == {"loss": 2.0, "ce": 2.0}
    terms.update({"ce": torch.tensor(6.0)}, 1)
    assert terms.means()["ce"] == 3.0
    terms.reset()
    terms.update({"ce": torch.tensor(5.0)}, 2)
    assert terms.means() == {"loss": 5.0, "ce": 5.0}


def test_terms_carry_no_graph():
    weight = torch.ones((), requires_grad=True)
    terms = TermSums(CPU)
    terms.update({"ce": 2 * weight}, 1)
    assert not terms.sums.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_means(value):
    terms = TermSums(CPU)
    terms.update({"ce": torch.tensor(1.0), "kl": torch.tensor(value)}, 4)
    terms.update({"ce": torch.tensor(1.0), "kl": torch.tensor(1.0)}, 4)
    means = terms.means()
    assert means["ce"] == 1 and not torch.tensor(means["kl"]).isfinite()
