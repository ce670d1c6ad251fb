"""What every method must do; a new method is covered by registering it."""

import copy
import re
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.data.augment import DeviceImages
from codistill.evaluation.evaluation import Evaluation
from codistill.methods import METHODS, Method, MethodSettings
from codistill.methods.cohort import Outputs
from codistill.methods.kd import WithTeacher
from codistill.networks import Network

from .. import tiny

NAMES = list(METHODS)
# Width of the feature map and stride of the last stage of each student.
COHORTS = {
    "two-equal": [(8, 2), (8, 2)],
    "two-unlike": [(8, 2), (10, 1)],
    "three-equal": [(8, 2), (8, 2), (8, 2)],
    "three-mixed": [(8, 2), (12, 1), (8, 2)],
}
HALFWAY = torch.tensor(0.1)


@pytest.fixture
def make(tiny_network):
    """Build a method on tiny students, all weights from one seed, in float64."""

    def build(name: str, shapes: list[tuple[int, int]], seed: int = 0) -> Method:
        torch.manual_seed(seed)
        students = [tiny_network(*shape) for shape in shapes]
        method = METHODS[name](students, num_classes=3, image_size=(8, 8))
        torch.manual_seed(99)  # whatever the students, the teacher is one
        try:
            taught = WithTeacher(method, tiny_network(8, 2)) if method.teacher == "required" else method
        except UsageError as error:
            assert "widths" in str(error)
            assert len({width for width, _ in shapes}) > 1
            pytest.skip(str(error))
        return taught.double()

    return build


def cases() -> list[tuple[str, str]]:
    return [
        (name, cohort)
        for name in NAMES
        for cohort, shapes in COHORTS.items()
        if METHODS[name].min_students <= len(shapes) <= (METHODS[name].max_students or len(shapes))
        and not (METHODS[name].like_students and len(set(shapes)) > 1)
    ]


def each_cohort() -> list[Any]:
    """Each case; in the second tier alone those that the largest cohort, of as many and as unlike widths, covers."""
    covered = {name for name, cohort in cases() if cohort == "three-mixed"}
    slow = [name in covered and cohort in ("two-unlike", "three-equal") for name, cohort in cases()]
    return [pytest.param(case, marks=[pytest.mark.slow] * second) for case, second in zip(cases(), slow, strict=True)]


EACH_COHORT = pytest.mark.parametrize("case", each_cohort(), ids="-".join, indirect=True)
# A student of the others has a place of its own.
INTERCHANGEABLE = [
    each for each in each_cohort() if each.values[0][0] not in ("ahbf", "ffsd", "rocket", "kdgan", "switokd")
]


# The largest cohort of a method, where the size is of no account.
@pytest.fixture(params=list(dict(cases()).items()), ids="-".join)
def case(request):
    name, cohort = request.param
    return name, COHORTS[cohort]


@pytest.fixture
def method(make, case):
    return make(*case)


def terms_of(method: Method, batch: tuple[Tensor, Tensor], progress: Tensor = HALFWAY) -> dict[str, Tensor]:
    images, labels = batch
    return method.losses(method(images), labels, progress)


def drawn_alike(method: Method, images: Tensor) -> Outputs:
    """A forward pass from one state of the generator, for methods that draw."""
    torch.manual_seed(0)
    return method(images)


def step(method: Method, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    """The whole protocol, as anybody's loop has it."""
    optimizer.zero_grad()
    loss = sum(terms_of(method, batch).values())
    loss.backward()
    optimizer.step()
    method.after_step()
    return loss.item()


def train(method: Method, batch: tuple[Tensor, Tensor], steps: int) -> list[float]:
    learning_rate = {"l-mcl": 0.1, "fitnets": 0.03}.get(method.name, 0.3)  # dozens of comparisons, a weight of 100
    torch.manual_seed(0)  # for methods that draw
    optimizer = torch.optim.SGD(method.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)
    return [step(method, optimizer, batch) for _ in range(steps)]


@EACH_COHORT
def test_terms_are_named_finite_scalars(method, batch):
    terms = terms_of(method, batch)
    assert {f"ce/student{index}" for index in range(len(method.cohort))} <= set(terms)
    for name, term in terms.items():
        assert re.fullmatch(r"[a-z]+/[a-z]+\d*(/[a-z]+\d+)?(->[a-z]+\d*)?", name), name
        assert term.shape == (), name
        assert term.isfinite(), name


def test_outputs(method, batch):
    outputs = method(batch[0])
    students = len(method.cohort)
    assert len(outputs.logits) == len(outputs.feature_maps) == students
    assert all(logits.shape == (6, 3) for logits in outputs.logits)
    for student, feature_map in zip(method.cohort, outputs.feature_maps, strict=True):
        assert feature_map.shape[:2] == (6, student.widths[-1])
        assert feature_map.shape[2] in (4, 8)
    torch.testing.assert_close(outputs.ensemble_logits, sum(outputs.logits) / students)


@EACH_COHORT
def test_every_trainable_parameter_gets_a_finite_gradient(make, case, batch):
    touched = {}
    for seed in range(6):  # so many because a hidden layer of one unit may be dead at the start
        method = make(*case, seed=seed)
        for initialising in (True, False) if method.initial_epochs(300) else (False,):
            method.initialising = initialising
            sum(terms_of(method, batch).values()).backward()
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                touched[name] = touched.get(name, False) or bool(parameter.grad.any())
        if seed and all(touched.values()):
            break
    assert [name for name, is_touched in touched.items() if not is_touched] == []


def test_parameter_groups_partition_the_parameters(method):
    groups = method.parameter_groups()
    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
    assert len({group.name for group in groups}) == len(groups)
    assert groups[0].name == "students" and groups[0].weight_decay is None
    plain = {id(each) for group in groups if group.weight_decay is None for each in group.parameters}
    assert {id(parameter) for parameter in method.cohort.parameters()} <= plain


def test_predictors_are_the_predictions(method, batch):
    train(method, batch, 2)  # so that running statistics and weights are not those of the start
    method.eval()
    with torch.no_grad():
        expected = method.predictions(method(batch[0]))
        predictors = method.predictors()
        assert list(predictors) == list(expected)
        assert {f"student{index}" for index in range(len(method.cohort))} | {"ensemble"} <= set(predictors)
        for name, predictor in predictors.items():
            torch.testing.assert_close(predictor(batch[0]), expected[name], rtol=0, atol=0)


def test_predictors_leave_the_method_as_it_was(method, batch):
    method.eval()
    before, names = method(batch[0]).logits, list(method.state_dict())
    method.predictors()
    assert list(method.state_dict()) == names
    assert all(map(torch.equal, method(batch[0]).logits, before))


def test_a_deployed_student_is_a_network_alone(method, batch):
    method.eval()
    with torch.no_grad():
        logits = method(batch[0]).logits
        for index in range(len(method.cohort)):
            deployed = copy.deepcopy(method.deployed_student(index))
            assert isinstance(deployed, Network)
            assert not any(isinstance(module, Method) for module in deployed.modules())
            torch.testing.assert_close(deployed(batch[0]), logits[index], rtol=0, atol=0)


def test_state_dict_round_trip(make, case, batch):
    method, other = make(*case), make(*case, seed=1)
    train(method, batch, 2)
    method.eval(), other.eval()
    with torch.no_grad():
        expected = method.predictions(method(batch[0]))
        before = other.predictions(other(batch[0]))
        other.load_state_dict(copy.deepcopy(method.state_dict()))
        after = other.predictions(other(batch[0]))
    for name, logits in expected.items():
        assert not torch.equal(before[name], logits)
        assert torch.equal(after[name], logits)


def test_repeats_bitwise_under_a_seed(make, case, batch):
    runs = [make(*case, seed=seed) for seed in (5, 5, 6)]
    losses = [train(method, batch, 3) for method in runs]
    assert losses[0] == losses[1] != losses[2]
    states = [method.state_dict() for method in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def permuted(method: Method, order: list[int]) -> dict[str, Tensor]:
    """Return the state of a method whose student i is this one's student order[i]."""
    if order == sorted(order):
        return method.state_dict()
    place = {str(old): str(new) for new, old in enumerate(order)}
    state = {}
    for name, tensor in method.state_dict().items():
        owner = re.match(
            r"(cohort\.students|aggregators|connectors|embeddings|enhancements|exits|means\.students|fusion\.(?:adapters|norms))\.(\d+)\.",
            name,
        )
        if owner:
            name = f"{owner[1]}.{place[owner[2]]}.{name[owner.end() :]}"
        # What the fusion module has for each channel of the concatenated maps moves with the channels.
        axis = 0 if name.startswith("fusion.transfer.0.") else 1
        if tensor.ndim and (axis == 0 or name in ("fusion.transfer.1.0.weight", "fusion.linear.weight")):
            parts = tensor.split_with_sizes([student.widths[-1] for student in method.cohort], dim=axis)
            tensor = torch.cat([parts[old] for old in order], dim=axis)
        # ONE's gate has an output for each student and, without a trunk, inputs for each student's channels.
        if name == "gate.layers.0.weight" and not method.cohort.shared_stages:
            parts = tensor.split_with_sizes([student.widths[-1] for student in method.cohort], dim=1)
            tensor = torch.cat([parts[old] for old in order], dim=1)
        if name.startswith("gate.") and tensor.ndim:
            tensor = tensor[order]
        state[name] = tensor
    return state


@pytest.mark.parametrize("case", INTERCHANGEABLE, ids="-".join, indirect=True)
def test_permuting_the_students_permutes_the_results(make, case, batch):
    name, shapes = case
    method = make(name, shapes)
    order = [1, 0] if len(shapes) == 2 else [2, 0, 1]
    if name == "okddip":  # the last student, the leader, is not one of the peers
        order = [1, 0, 2]
    other = make(name, [shapes[old] for old in order], seed=1)
    other.load_state_dict(permuted(method, order))
    before, after = (drawn_alike(each, batch[0]) for each in (method, other))
    for new, old in enumerate(order):
        torch.testing.assert_close(after.logits[new], before.logits[old])
    if before.fused_logits is not None:
        torch.testing.assert_close(after.fused_logits, before.fused_logits)
    place = {str(old): str(new) for new, old in enumerate(order)}
    terms = method.losses(before, batch[1], HALFWAY)
    moved = other.losses(after, batch[1], HALFWAY)
    own = re.compile(r"(?<=student)\d+|(?<=mean)\d+|(?<=aggregated)\d+")
    renamed = {own.sub(lambda found: place[found[0]], each): term for each, term in terms.items()}
    torch.testing.assert_close(moved, {each: renamed[each] for each in moved})
    assert len(moved) == len(terms)


def test_no_host_read_in_a_step(method, batch):
    progress = torch.tensor(0.1)
    with tiny.HostReads() as reads:
        sum(terms_of(method, batch, progress).values()).backward()
        method.after_step()
    assert reads.found == []


def test_no_host_read_in_an_evaluation(method):
    data = tiny.data(test=20)
    images = DeviceImages(data.test, data.statistics, torch.device("cpu"))
    evaluation = Evaluation(method.float(), {"test": images}, batch_size=8)
    with tiny.HostReads() as reads:
        evaluation.run()
        evaluation.tensors()
        method.after_epoch()
    assert reads.found == []


def test_a_step_needs_no_numbers(method, batch):
    method = method.to("meta")
    images, labels = (each.to("meta") for each in batch)
    sum(method.losses(method(images), labels, HALFWAY.to("meta")).values()).backward()
    method.after_step()


def cross_entropies(method: Method, batch: tuple[Tensor, Tensor]) -> float:
    return sum(term.item() for name, term in terms_of(method, batch).items() if name.startswith("ce/"))


def test_a_bare_loop_fits_one_batch(method, batch):
    before = cross_entropies(method, batch)
    losses = train(method, batch, 40)
    # An adversary's loss need not fall.
    fallen = losses[-1] / losses[0] if method.name != "kdgan" else cross_entropies(method, batch) / before
    assert fallen < 0.6


def test_progress_may_be_of_either_precision(make, case, batch):
    method = make(*case).float()
    images, labels = batch[0].float(), batch[1]
    outputs = method(images)
    single, double = (
        method.losses(outputs, labels, torch.tensor(20 / 300, dtype=dtype)) for dtype in (torch.float32, torch.float64)
    )
    assert list(single) == list(double)
    for name in single:
        assert single[name].dtype == double[name].dtype == torch.float32, name
        torch.testing.assert_close(single[name], double[name])
    torch.stack(list(double.values())).sum().backward()


@pytest.mark.parametrize("all_within", [True, False], ids=["losses-within", "losses-outside"])
def test_autocast(make, case, batch, all_within):
    method = make(*case).float()
    images, labels = batch[0].float(), batch[1]
    reference = sum(terms_of(method, (images, labels)).values())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = method(images)
        assert outputs.logits[0].dtype == torch.bfloat16
        terms = method.losses(outputs, labels, HALFWAY)
    if not all_within:
        terms = method.losses(outputs, labels, HALFWAY)
    for name, term in terms.items():
        assert term.dtype == torch.float32, name
        assert term.isfinite(), name
    loss = sum(terms.values())
    torch.testing.assert_close(loss, reference, rtol=0.05, atol=0)
    loss.backward()
    for name, parameter in method.named_parameters():
        if name.startswith("connectors.") and method.initial_epochs(300):
            assert parameter.grad is None, name  # they are trained before
        elif parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_another_method_are_refused(name, tiny_network):
    class Foreign(MethodSettings):
        pass

    # Where types are checked at run time (pytest --jaxtyping-packages), that check comes first.
    says = f"{name} takes {METHODS[name].Settings.__name__}, not Foreign|typechecking parameter 'settings'"
    with pytest.raises((UsageError, TypeCheckError), match=says):
        METHODS[name]([tiny_network(), tiny_network()], 3, Foreign(), (8, 8))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("byot", "adapter_width", 0),
        ("byot", "soft_weight", 1.5),
        ("byot", "temperature", 0.0),
        ("cl-ilr", "ce_weight", 1.1),
        ("ffl", "fusion_weight_decay", 1.0),
        ("kdcl", "temperature", 0.0),
        ("okddip", "attention_reduction", 0),
        ("pcl", "mean_decay", 1.0),
    ],
)
def test_bounds_of_settings(name, setting, value):
    # tests/faults/test_configuration.py has nan, inf and -1 for every number, tests/settings the shared bounds.
    with pytest.raises(UsageError, match=rf"method\.{setting} is {value}; it must be"):
        METHODS[name].Settings(**{setting: value})


@pytest.mark.parametrize("name", NAMES)
def test_views(name, tiny_network, batch):
    """A view for each student in training where the setting asks for it; one for all in evaluation."""
    students = [tiny_network() for _ in range(max(2, METHODS[name].min_students))]
    method = METHODS[name](
        students, 3, METHODS[name].Settings(views_per_student=True, shared_stages=0), (8, 8)
    ).double()
    # One more where something beside the students sees a view of its own.
    assert method.views >= len(students)
    views = torch.stack([batch[0].flip(3) if index else batch[0] for index in range(method.views)])
    assert method.eval().views == 1
    outputs = method(views)
    for index, logits in enumerate(outputs.logits):
        torch.testing.assert_close(logits, method(views[index]).logits[index])
    sum(method.losses(method.train()(views), batch[1], HALFWAY).values()).backward()
    own = METHODS[name].Settings(views_per_student=False)
    assert METHODS[name]([tiny_network() for _ in students], 3, own, (8, 8)).views == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_lack_of_students_is_refused(name, tiny_network):
    with pytest.raises(UsageError, match="at least"):
        METHODS[name]([tiny_network()] * (METHODS[name].min_students - 1), 3, image_size=(8, 8))


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].max_students])
def test_too_many_students_are_refused(name, tiny_network):
    count = METHODS[name].max_students + 1
    with pytest.raises(UsageError, match=f"{name} takes at most .* got {count}: name fewer --networks"):
        METHODS[name]([tiny_network() for _ in range(count)], 3, image_size=(8, 8))


@pytest.mark.parametrize("name", NAMES)
def test_shared_stages_is_a_setting_of_every_method(name, tiny_network):
    settings = METHODS[name].Settings
    for shared in (0, 1):
        students = [tiny_network() for _ in range(max(2, METHODS[name].min_students))]
        method = METHODS[name](students, 3, settings(shared_stages=shared), (8, 8))
        assert method.cohort.shared_stages == shared
        assert (students[0].stages[0] is students[1].stages[0]) == bool(shared)
