"""How different the students are against numpy, and when a student in trouble is named."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import codistill as cd
from codistill.evaluation.diversity import Diversity, DiversitySums, diversity, health_warnings
from codistill.evaluation.metrics import read_together
from codistill.training import trainer as loop

from .. import tiny

CPU = torch.device("cpu")


def diversity_of(logits: list[np.ndarray], batch_size: int = 1000) -> Diversity:
    sums = DiversitySums(len(logits), logits[0].shape[1], CPU)
    for start in range(0, len(logits[0]), batch_size):
        sums.update([torch.from_numpy(each[start : start + batch_size]) for each in logits])
    return diversity(read_together(sums.tensors()))


def slow(logits: list[np.ndarray]) -> tuple[float, float, list[float]]:
    """Every pair, every image, one at a time."""
    images, classes = logits[0].shape
    differ, divergence = [], []
    for i, first in enumerate(logits):
        for j, second in enumerate(logits):
            if i == j:
                continue
            for image in range(images):
                p, q = (np.exp(each[image].astype(np.float64)) for each in (first, second))
                p, q = p / p.sum(), q / q.sum()
                differ.append(100.0 * (first[image].argmax() != second[image].argmax()))
                divergence.append(float((p * np.log(p / q)).sum()))
    shares = [np.bincount(each.argmax(axis=1), minlength=classes).max() / images for each in logits]
    return float(np.mean(differ or 0)), float(np.mean(divergence or 0)), shares


@settings(deadline=None, max_examples=60)
@given(
    students=st.integers(1, 4),
    images=st.integers(1, 12),
    classes=st.integers(2, 5),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_diversity_against_numpy(students, images, classes, scale, batch_size, seed):
    rng = np.random.default_rng(seed)
    logits = [(scale * rng.standard_normal((images, classes))).astype(np.float32) for _ in range(students)]
    found = diversity_of(logits, batch_size)
    disagreement, kl, shares = slow(logits)
    assert found.disagreement == pytest.approx(disagreement)
    assert found.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert list(found.largest_class_share) == [f"student{index}" for index in range(students)]
    assert list(found.largest_class_share.values()) == pytest.approx(shares)


def test_numbers_on_paper():
    # p = (2/3, 1/3) and q = (1/3, 2/3): KL = 1/3 log 2 either way; the second image is the same for both.
    first, second = np.log([[2.0, 1.0], [1.0, 3.0]]), np.log([[1.0, 2.0], [1.0, 3.0]])
    found = diversity_of([first, second])
    assert found.disagreement == 50.0 and found.kl == pytest.approx(math.log(2) / 6, rel=1e-5)
    assert found.largest_class_share == {"student0": 0.5, "student1": 1.0}


def test_half_precision_and_large_logits():
    logits = [torch.tensor([[60.0, -60.0, 0.0]], dtype=torch.bfloat16), torch.tensor([[-60.0, 60.0, 0.0]])]
    sums = DiversitySums(2, 3, CPU)
    sums.update(logits)
    found = diversity(read_together(sums.tensors()))
    assert found.disagreement == 100 and found.kl == pytest.approx(120, rel=1e-3)


def row(epoch: int, errors: list[float], shares: list[float] | None = None) -> dict:
    names = [f"student{index}" for index in range(len(errors))]
    test = {name: {"top1_error": error} for name, error in zip(names, errors, strict=True)}
    test["ensemble"] = {"top1_error": 99.0}
    given_shares = dict(zip(names, shares or [0.2] * len(errors), strict=True))
    return {"epoch": epoch, "test": test, "diversity": {"largest_class_share": given_shares}}


def history(errors: list[list[float]]) -> list[dict]:
    return [row(epoch, each) for epoch, each in enumerate(errors)]


@pytest.mark.parametrize(
    ("epochs", "epoch", "named"),
    [
        (300, 13, False),
        (300, 14, True),  # 15 of 300 epochs are over
        (300, 299, True),
        (4, 0, False),  # the first epoch never counts
        (4, 1, True),
        (1, 0, False),
    ],
)
def test_a_collapse_is_named_after_a_twentieth(epochs, epoch, named):
    before = history([[90.0, 90.0]] * epoch)
    found = health_warnings(row(epoch, [90.0, 90.0], [0.3, 0.95]), before, epochs)
    assert found == ["student1 has collapsed: it names one class for 95 % of the test images"] * named


@pytest.mark.parametrize(("share", "named"), [(0.9, False), (0.901, True), (1.0, True), (0.5, False)])
def test_a_collapse_is_more_than_nine_tenths(share, named):
    found = health_warnings(row(9, [90.0], [share]), history([[90.0]] * 9), 10)
    assert bool(found) is named


def test_all_that_have_collapsed_are_named():
    found = health_warnings(row(9, [90.0, 30.0, 90.0], [0.99, 0.1, 1.0]), history([[90.0, 30.0, 90.0]] * 9), 10)
    assert [each.split()[0] for each in found] == ["student0", "student2"]


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ([[40.0, 40.0]], [61.0, 40.0], True),
        ([[40.0, 40.0]], [60.0, 39.0], False),  # exactly 20 above its own best
        ([[40.0, 40.0]], [61.0, 41.0], False),  # exactly 20 above the peer
        ([[70.0, 40.0]], [80.0, 30.0], False),  # always was behind
        ([[40.0, 40.0]], [61.0, 61.0], False),  # both rose: a learning rate, not a student
        ([], [90.0, 30.0], False),  # nothing before
        ([[80.0, 80.0], [40.0, 40.0], [50.0, 38.0]], [61.0, 36.0], True),  # above its best, not its last
    ],
)
def test_a_student_that_falls_behind_is_named(before, now, named):
    found = health_warnings(row(len(before), now), history(before), 100)
    message = (
        f"student0 is diverging: test error {now[0]:.1f} %, after 40.0 % before and {now[1]:.1f} % of the best peer"
    )
    assert found == [message] * named


def test_the_best_of_several_peers_counts():
    found = health_warnings(row(1, [70.0, 75.0, 45.0]), history([[40.0, 74.0, 45.0]]), 100)
    assert found == ["student0 is diverging: test error 70.0 %, after 40.0 % before and 45.0 % of the best peer"]


def test_one_student_alone_does_not_fall_behind():
    assert health_warnings(row(1, [90.0]), history([[20.0]]), 100) == []


def test_who_has_collapsed_is_not_named_twice():
    found = health_warnings(row(5, [90.0, 30.0], [1.0, 0.2]), history([[30.0, 30.0]] * 5), 10)
    assert len(found) == 1 and "collapsed" in found[0]
    # Within the first epochs, where a collapse is not yet named, falling behind is.
    found = health_warnings(row(1, [90.0, 30.0], [1.0, 0.2]), history([[30.0, 30.0]]), 300)
    assert len(found) == 1 and "diverging" in found[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda run, summary: None)


@pytest.mark.parametrize("kind", [cd.MFEF, cd.Independent], ids=lambda kind: kind.name)
def test_a_run_records_it(tmp_path, kind):
    data, settings = tiny.data(), tiny.settings(validation=6)  # held-out images do not stand in for the test images
    run = cd.train(tiny.method(kind), data, out=tmp_path / "run", settings=settings, show=False)
    rows, summary = run.metrics(), run.summary
    for each in rows:
        assert {"disagreement", "kl", "largest_class_share"} <= set(each["diversity"])
        assert set(each["diversity"]["largest_class_share"]) == {"student0", "student1"}
        assert isinstance(each["warnings"], list)
        gaps = each["diversity"].get("gap_to_fused")
        errors = {name: scores["top1_error"] for name, scores in each["test"].items()}
        expected = {name: errors[name] - errors["fused"] for name in ("student0", "student1")} if gaps else None
        assert gaps == expected and bool(gaps) is (kind is cd.MFEF)
    assert summary["diversity"] == rows[-1]["diversity"]
    images = loop.DeviceImages(data.test, data.statistics, CPU)
    logits = run.load_method()(images.batch(0, 9)[0]).logits
    disagreement, kl, shares = slow([each.detach().numpy() for each in logits])
    found = summary["diversity"]
    assert (found["disagreement"], found["kl"]) == pytest.approx((disagreement, kl), rel=1e-3, abs=1e-6)
    assert list(found["largest_class_share"].values()) == pytest.approx(shares)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for name in ("disagreement", "kl"):
        scalars = events.Scalars(f"diversity/{name}")
        assert [each.step for each in scalars] == [1, 2]
        assert [each.value for each in scalars] == pytest.approx([each["diversity"][name] for each in rows])


class Constant(cd.Independent):
    """Whose second student's head says the same of every image, whatever it learns."""

    def after_step(self) -> None:
        with torch.no_grad():
            self.cohort[1].head.linear.weight.zero_()
            self.cohort[1].head.linear.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))


def test_a_run_says_that_a_student_has_collapsed(tmp_path, capsys):
    torch.manual_seed(0)
    method = Constant(tiny.own_students(), 3, image_size=(8, 8))
    settings = tiny.settings(epochs=3, learning_rate=0.01)
    run = cd.train(method, tiny.data(), out=tmp_path / "run", settings=settings)
    words = "student1 has collapsed: it names one class for 100 % of the test images"
    assert [each["warnings"] for each in run.metrics()] == [[], [words], [words]]
    assert run.summary["warnings"] == [f"epoch 2: {words}", f"epoch 3: {words}"]
    assert run.summary["status"] == "finished"
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert lines == [f"warning: epoch {epoch}: {words}" for epoch in (2, 3)]
