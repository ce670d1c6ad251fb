"""The first step at which something was no number, and whose it was."""

import math

import pytest
import torch

import codistill as cd
from codistill.training.finite import (
    GRADIENT,
    NonFiniteDetector,
    culprits,
    norms,
    parameter_names,
    part_of,
    state_damage,
)

from .. import tiny

CPU = torch.device("cpu")


def watched(*steps: list[float]) -> NonFiniteDetector:
    watch = NonFiniteDetector(CPU)
    for values in steps:
        watch.update(["a", "b", "c"], torch.tensor(values))
    return watch


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_and_all_that_was_bad_in_it(bad):
    watch = watched([1, 2, 3], [1, bad, bad], [bad, 2, 3], [1, 2, 3])
    assert watch.packed().tolist() == [2, 1, 1]
    assert watch.first_bad(watch.packed().tolist()) == (2, ["b", "c"])


def test_large_and_small_numbers_are_numbers():
    watch = watched([3e38, -3e38, 1e-45], [0.0, -0.0, 1.0])
    assert watch.first_bad(watch.packed().tolist()) is None


def test_it_begins_anew():
    watch = watched([math.nan, 1, 1])
    watch.reset()
    watch.update(["a", "b", "c"], torch.ones(3))
    assert watch.first_bad(watch.packed().tolist()) is None


def test_it_goes_on_from_its_state():
    first = watched([1, 1, 1], [1, 1, 1])
    second = NonFiniteDetector(CPU)
    second.load({name: value.clone() if torch.is_tensor(value) else value for name, value in first.state().items()})
    for watch in (first, second):
        watch.update(["a", "b", "c"], torch.tensor([1, 1, math.nan]))
    assert second.first_bad(second.packed().tolist()) == first.first_bad(first.packed().tolist()) == (3, ["c"])


def test_the_host_reads_nothing():
    watch = NonFiniteDetector(CPU)
    with tiny.HostReads() as reads:
        for _ in range(3):
            watch.update(["a"], torch.stack(norms([torch.ones(3, 2)])))
        watch.packed()
        state_damage(tiny.method().state_dict())
    assert reads.found == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norms_and_states_show_a_single_bad_number(bad):
    tensors = [torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(1000), torch.tensor(1e30)]
    assert [each.isfinite().item() for each in norms(tensors)] == [True, True, True]
    tensors[1][617] = bad
    assert [each.isfinite().item() for each in norms(tensors)] == [True, False, True]
    names, damage = state_damage({"a": tensors[0], "steps": torch.tensor(3), "b": tensors[1]})
    assert names == ["a", "b"] and damage[0] == 0 and damage[1].isnan()


def test_whose_a_parameter_is():
    method = cd.MFEF(tiny.own_students(), 3, image_size=(8, 8))
    shared = method.cohort.shared_stages
    parts = {part_of(name, shared) for name in parameter_names(method).values()}
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
