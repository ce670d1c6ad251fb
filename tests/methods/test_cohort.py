"""Students and the trunk that they share."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Cohort, Outputs
from codistill.networks.likeness import alike
from codistill.networks.network import parameter_count

from .. import tiny

# Stages of the tiny network with 8 channels: 3*4*9 + 8, 4*6*9 + 12, 6*8*9 + 16; head 8*3 + 3.
STAGES, HEAD = (116, 228, 448), 27


def storages(module: nn.Module) -> set[int]:
    tensors = [*module.parameters(), *module.buffers()]
    pointers = {tensor.data_ptr() for tensor in tensors}
    assert len(pointers) == len(tensors)
    return pointers


@pytest.mark.parametrize("students", [2, 3])
@pytest.mark.parametrize(("asked", "shared"), [(None, 2), (0, 0), (1, 1), (2, 2), (3, 3)])
def test_equal_students(tiny_network, students, asked, shared):
    cohort = Cohort([tiny_network() for _ in range(students)], asked)
    assert cohort.shared_stages == shared
    for student in cohort:
        for index, stage in enumerate(student.stages):
            assert (stage is cohort[0].stages[index]) == (index < shared or student is cohort[0])
    private = sum(STAGES[shared:]) + HEAD
    assert parameter_count(cohort) == sum(STAGES[:shared]) + students * private
    assert all(parameter_count(student) == sum(STAGES) + HEAD for student in cohort)


@pytest.mark.parametrize("shapes", [[(8, 2), (10, 2)], [(8, 2), (8, 1)], [(8, 2), (8, 2), (10, 2)]])
def test_unlike_students_share_nothing(tiny_network, shapes):
    cohort = Cohort([tiny_network(*shape) for shape in shapes])
    assert cohort.shared_stages == 0
    assert len(storages(cohort)) == sum(len(storages(student)) for student in cohort)


def test_unlike_students_share_their_equal_stages_when_asked(tiny_network):
    cohort = Cohort([tiny_network(8), tiny_network(10)], 2)
    assert cohort.shared_stages == 2
    assert [cohort[0].stages[index] is cohort[1].stages[index] for index in range(3)] == [True, True, False]


@pytest.mark.parametrize("students", [2, 3])
def test_private_tensors_have_storage_of_their_own(tiny_network, students):
    cohort = Cohort([tiny_network() for _ in range(students)])
    trunk = storages(nn.ModuleList(cohort[0].stages[:2]))
    private = [storages(nn.ModuleList([student.stages[2], student.head])) for student in cohort]
    assert len(set.union(trunk, *private)) == len(trunk) + sum(map(len, private))
    weights = [student.stages[2][0].weight for student in cohort]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_students_stay_complete_networks(tiny_network, batch):
    cohort = Cohort([tiny_network(), tiny_network(), tiny_network()]).double().eval()
    maps = tiny.feature_maps(cohort, batch[0])
    for student, feature_map in zip(cohort, maps, strict=True):
        assert torch.equal(student.feature_map(batch[0]), feature_map)
        assert torch.equal(student(batch[0]), student.head(feature_map))
    assert [tuple(feature_map.shape) for feature_map in maps] == [(6, 8, 4, 4)] * 3


def test_the_trunk_runs_once(tiny_network, batch):
    cohort = Cohort([tiny_network(), tiny_network()]).double()
    calls = []
    for stage in {stage for student in cohort for stage in student.stages}:
        stage.register_forward_hook(lambda module, *_: calls.append(module))
    tiny.feature_maps(cohort, batch[0])
    assert len(calls) == len(set(calls)) == 4
    # Its statistics are therefore updated once a step, not once for each student.
    assert cohort[1].stages[0][1].num_batches_tracked == 1


def test_maps_of_unlike_students(tiny_network, batch):
    cohort = Cohort([tiny_network(8, 2), tiny_network(10, 1)]).double()
    assert [tuple(each.shape) for each in tiny.feature_maps(cohort, batch[0])] == [(6, 8, 4, 4), (6, 10, 8, 8)]


def test_one_student_shares_with_nobody(tiny_network):
    assert Cohort([tiny_network()]).shared_stages == 0
    assert Cohort([tiny_network()], 2).shared_stages == 0


def test_is_a_sequence_of_its_students(tiny_network):
    students = [tiny_network(), tiny_network(10)]
    cohort = Cohort(students)
    assert len(cohort) == 2
    assert list(cohort) == students == [cohort[0], cohort[1]]


def test_what_cannot_work_is_refused(tiny_network):
    student = tiny_network()
    with pytest.raises(UsageError, match="at least one student"):
        Cohort([])
    with pytest.raises(UsageError, match="same network object twice: build one network for each student"):
        Cohort([student, tiny_network(), student])
    for asked in (-1, 4):
        with pytest.raises(UsageError, match=rf"cannot share {asked} stages of .*: share between 0 and 3"):
            Cohort([tiny_network(), tiny_network()], asked)
    with pytest.raises(UsageError, match=r"cannot share 3 stages of .*: unlike networks share nothing \(use 0\)"):
        Cohort([tiny_network(), tiny_network(10)], 3)
    named = [tiny_network(), tiny_network(10)]
    named[0].spec, named[1].spec = "small", "large"
    with pytest.raises(UsageError, match=r"small \+ large"):
        Cohort(named, 3)


def test_likeness_tells_structures_and_shapes_apart(tiny_network):
    assert alike(tiny_network().stages, tiny_network().stages)
    assert not alike(tiny_network(8).stages, tiny_network(10).stages)
    assert not alike(tiny_network(stride=1).stages, tiny_network(stride=2).stages)
    scales = [nn.ModuleList([nn.Module()]) for _ in range(2)]  # whose text does not tell their sizes
    for stages, size in zip(scales, (2, 3), strict=True):
        stages[0].register_parameter("scale", nn.Parameter(torch.ones(size)))
    assert repr(scales[0]) == repr(scales[1])
    assert not alike(scales[0], scales[1])


class Held(nn.Module):
    """A module with a value that its text and its state do not tell."""

    def __init__(self, value):
        super().__init__()
        self.value = value


class Plain:
    """An object without a comparison of its own."""

    def __init__(self, value):
        self.value, self.itself = value, self


def shifted(by):
    return lambda maps: maps + by


@pytest.mark.parametrize(
    ("one", "like", "unlike"),
    [
        (F.relu, F.relu, F.hardswish),
        ([1, [2]], [1, [2]], [1, [3]]),
        ({"a": 1}, {"a": 1}, {"a": 2}),
        (torch.arange(3), torch.arange(3), torch.arange(3) + 1),
        (np.arange(3), np.arange(3), np.arange(3) + 1),
        (functools.partial(F.leaky_relu, negative_slope=0.1), functools.partial(F.leaky_relu, negative_slope=0.1),
         functools.partial(F.leaky_relu, negative_slope=0.2)),
        (shifted(1), shifted(1), shifted(2)),
        (Plain(1), Plain(1), Plain(2)),
        (nn.ReLU, nn.ReLU, nn.GELU),
        ([nn.Linear(2, 2)], [nn.Linear(2, 2)], [nn.Linear(2, 3)]),
        (Plain(1).__init__, Plain(1).__init__, Held(1).__init__),
    ],
)  # fmt: skip
def test_likeness_tells_attributes_apart(one, like, unlike):
    assert alike(Held(one), Held(like)) and not alike(Held(one), Held(unlike))


def test_modules_may_hold_themselves():
    one, like, unlike = (Held(value) for value in (1, 1, 2))
    for each in (one, like, unlike):
        each.holder = [each]
    assert alike(one, like) and not alike(one, unlike)


def test_students_that_compute_other_things_share_nothing(tiny_network):
    students = [tiny_network(), tiny_network()]
    students[1].stages[0].activation = F.hardswish
    assert Cohort(students).shared_stages == 0
    buffers = [Held(1), Held(1)]
    for number, each in enumerate(buffers):
        each.register_buffer("mask", torch.full((2,), float(number)), persistent=False)
    assert not alike(*buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ensemble_is_the_mean_of_the_logits(dtype):
    logits = torch.randn(3, 5, 4).to(dtype)
    ensemble = Outputs(tuple(logits), ()).ensemble_logits
    assert ensemble.dtype == torch.float32
    torch.testing.assert_close(ensemble, (logits[0].float() + logits[1].float() + logits[2].float()) / 3)
