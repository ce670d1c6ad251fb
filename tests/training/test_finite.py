"""The first step at which something was no number, and whose it was."""

import math

import pytest
import torch

import codistill as cd
from codistill.evaluation.metrics import read_together
from codistill.training.finite import GRADIENT, NonFiniteDetector, culprits, norms, part_of

from .. import tiny

CPU = torch.device("cpu")


def named(values: list[float]) -> dict[str, torch.Tensor]:
    return dict(zip("abc", torch.tensor(values).unbind(), strict=True))


def first_bad(watch: NonFiniteDetector) -> tuple[int, list[str]] | None:
    return watch.first_bad(read_together(watch.tensors()))


def watched(*steps: list[float]) -> NonFiniteDetector:
    watch = NonFiniteDetector(CPU)
    for values in steps:
        watch.update(named(values))
    return watch


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_and_all_that_was_bad_in_it(bad):
    watch = watched([1, 2, 3], [1, bad, bad], [bad, 2, 3], [1, 2, 3])
    assert read_together(watch.tensors()) == {"a": 2, "b": 1, "c": 1}
    assert first_bad(watch) == (2, ["b", "c"])


def test_large_and_small_numbers_are_numbers():
    watch = watched([3e38, -3e38, 1e-45], [0.0, -0.0, 1.0])
    assert first_bad(watch) is None


def test_a_reset_forgets_all_steps():
    watch = watched([math.nan, 1, 1])
    watch.reset()
    watch.update(named([1, 1, 1]))
    assert first_bad(watch) is None


def test_it_continues_from_its_state():
    first = watched([1, 1, 1], [1, 1, 1])
    second = NonFiniteDetector(CPU)
    second.load({name: value.clone() if torch.is_tensor(value) else value for name, value in first.state().items()})
    for watch in (first, second):
        watch.update(named([1, 1, math.nan]))
    assert first_bad(second) == first_bad(first) == (3, ["c"])


def test_the_host_reads_nothing():
    watch = NonFiniteDetector(CPU)
    with tiny.HostReads() as reads:
        for _ in range(3):
            watch.update(norms({"a": torch.ones(3, 2)}))
        watch.tensors()
    assert reads.found == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norms_show_a_single_bad_number(bad):
    whole = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = {"a": whole, "b": torch.zeros(1000), "c": torch.tensor(1e30)}
    assert [each.isfinite().item() for each in norms(tensors).values()] == [True, True, True]
    tensors["b"][617] = bad
    assert [each.isfinite().item() for each in norms(tensors).values()] == [True, False, True]


def test_whose_a_parameter_is():
    method = cd.MFEF(tiny.own_students(), 3, image_size=(8, 8))
    shared = method.cohort.shared_stages
    parts = {part_of(name, shared) for name, _ in method.named_parameters()}
    assert {"the shared trunk", "student0", "student1", "fusion"} <= parts
    assert part_of("method.cohort.students.1.head.linear.bias", 2) == "student1"
    assert part_of("method.gate.0.weight", 2) == "gate"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ce/student1", "kl/fused->student1"], "student1 (loss ce/student1, kl/fused->student1)"),
        (["kl/fused->student1"], "kl/fused->student1 (loss kl/fused->student1)"),
        (["ce/fused", GRADIENT + "fusion.x"], "fused (loss ce/fused)"),
        ([GRADIENT + "cohort.students.1.head.w", GRADIENT + "fusion.x"], "student1, fusion (gradient of cohort"),
    ],
)
def test_who_went_wrong(names, words):
    assert culprits(names, 2).startswith(words)
