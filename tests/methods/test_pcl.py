"""PCL: the classifier of all features, the mean teachers, views, resuming."""

import copy

import pytest
import torch
from torch import nn

from codistill.methods.cohort import Outputs
from codistill.methods.losses import soft_target_kl
from codistill.methods.pcl import PCL, PCLSettings
from codistill.networks.network import parameter_count

from . import slow

FULL = torch.tensor(1.0)


@pytest.fixture
def make(tiny_network):
    def build(*shapes, **settings) -> PCL:
        students = [tiny_network(*shape) for shape in shapes or [(8, 2)] * 3]
        method = PCL(students, 3, PCLSettings(**settings), (8, 8)).double()
        slow.disturb_norms(method.cohort)
        for parameter in method.means.parameters():  # so that a teacher is not its student
            nn.init.normal_(parameter, 0.5, 0.5)
        return method

    return build


def views_of(images: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([images, images.flip(3), images.roll(1, 2)][:count])


def update(method: PCL, batch, optimizer, progress=FULL) -> None:
    optimizer.zero_grad()
    sum(method.losses(method(batch[0]), batch[1], progress).values()).backward()
    optimizer.step()
    method.after_step()


def sgd(method: PCL, rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([each for group in method.parameter_groups() for each in group.parameters], lr=rate)


def test_terms(make, batch):
    method = make()
    terms = method.losses(method(batch[0]), batch[1], FULL)
    assert list(terms) == [
        *("ce/student0", "ce/student1", "ce/student2", "ce/fused"),
        *("kl/fused->student0", "kl/mean1->student0", "kl/mean2->student0"),
        *("kl/fused->student1", "kl/mean0->student1", "kl/mean2->student1"),
        *("kl/fused->student2", "kl/mean0->student2", "kl/mean1->student2"),
    ]


def test_terms_by_hand(make):
    # With logits T log 3, the softened probabilities are (3/4, 1/4); with equal ones they are (1/2, 1/2).
    sure, unsure = (torch.tensor([[3.295836866004329, 0.0]] * 2), torch.zeros(2, 2))
    method = make()
    outputs = Outputs((unsure, sure, sure), (), sure, extras={"mean0": sure, "mean1": unsure, "mean2": sure})
    terms = method.losses(outputs, torch.tensor([0, 1]), FULL)
    apart = 9 * 0.13081203594113694  # 9 (3/4 log(3/2) + 1/4 log(1/2))
    back = 9 * 0.14384103622589042  # 9 log(2) - 9/2 log(3) + ..: KL of (1/2, 1/2) to (3/4, 1/4)
    expected = {
        "ce/student0": 0.6931471805599453,
        "kl/fused->student0": apart,
        "kl/mean1->student0": 0.0,
        "kl/mean2->student0": apart / 2,
        "kl/fused->student1": 0.0,
        "kl/mean0->student1": 0.0,
        "kl/mean2->student1": 0.0,
        "kl/mean1->student2": back / 2,
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, abs=1e-6), name


def by_hand(method, batch, epoch, last_strides, temperature=3.0):
    """The loss of one step; images may have an axis of views in front."""
    images, labels = batch
    count = len(method.cohort)
    views = images if images.ndim == 5 else [images] * count

    def run(cohort):
        """Stage by stage, shared stages on all views as one batch."""
        lows = list(views)
        for stage in range(3):
            if stage < cohort.shared_stages:
                conv, norm = cohort[0].stages[stage]
                # Equal views twice in a batch do not change its statistics.
                whole = nn.functional.conv2d(torch.cat(lows), conv.weight, padding=1)
                lows = list(slow.batch_norm(whole, norm).clamp(min=0).split(len(labels)))
                continue
            for index, (student, last) in enumerate(zip(cohort, last_strides, strict=True)):
                conv, norm = student.stages[stage]
                stride = last if stage == 2 else 1
                raw = nn.functional.conv2d(lows[index], conv.weight, stride=stride, padding=1)
                lows[index] = slow.batch_norm(raw, norm).clamp(min=0)
        return lows, [slow.head_logits(each, low) for each, low in zip(cohort, lows, strict=True)]

    maps, logits = run(method.cohort)
    with torch.no_grad():
        taught = [slow.probabilities(each, temperature) for each in run(method.means)[1]]
    features = torch.cat([slow.pooled(each) for each in maps], dim=1)
    fused = features @ method.fusion.linear.weight.T + method.fusion.linear.bias
    target = slow.probabilities(torch.tensor(fused.tolist(), dtype=torch.float64), temperature)
    loss = slow.ce(fused, labels)
    weight = slow.ramp(epoch) * temperature**2
    for student in range(count):
        loss = loss + slow.ce(logits[student], labels)
        loss = loss + weight * slow.kl(target, logits[student], temperature)
        for peer in range(count):
            if peer != student:
                loss = loss + weight * slow.kl(taught[peer], logits[student], temperature) / (count - 1)
    return loss


CASES = {
    "three": ([(8, 2)] * 3, {}, True),
    "one view": ([(8, 2)] * 3, {"views_per_student": False}, False),
    "unlike": ([(8, 2), (10, 1)], {}, True),
    "unlike with a trunk": ([(8, 2), (10, 1)], {"shared_stages": 2}, True),
    "no trunk": ([(8, 2)] * 2, {"shared_stages": 0, "temperature": 2.0}, True),
}


@pytest.mark.parametrize(("shapes", "settings", "own_views"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("epoch", [0, 40, 200])
def test_a_step_against_a_slow_derivation(make, batch, shapes, settings, own_views, epoch):
    method = make(*shapes, **settings)
    images = views_of(batch[0], len(shapes)) if own_views else batch[0]
    assert method.views == (len(shapes) if own_views else 1)
    loss = by_hand(method, (images, batch[1]), epoch, [each[1] for each in shapes], method.settings.temperature)
    slow.assert_step_agrees(method, (images, batch[1]), epoch, loss)


def test_whole_updates_against_a_slow_derivation(make, batch):
    # Three steps of students, classifier and mean teachers, with a view for each student.
    method = make(mean_decay=0.6)
    other = copy.deepcopy(method)
    images = views_of(batch[0], 3)
    optimizer = sgd(method)
    for step in range(3):
        update(method, (images, batch[1]), optimizer, torch.tensor(30 / 300, dtype=torch.float64))
        trained = [*other.cohort.parameters(), *other.fusion.parameters()]
        gradients = torch.autograd.grad(by_hand(other, (images, batch[1]), 30, (2, 2, 2)), trained)
        keep = (0.0, 0.5, 0.6)[step]
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= 0.1 * gradient
            for mean, parameter in zip(other.means.parameters(), other.cohort.parameters(), strict=True):
                mean.copy_(keep * mean + (1 - keep) * parameter)
    torch.testing.assert_close(list(method.parameters()), list(other.parameters()), rtol=1e-8, atol=1e-10)
    assert method.steps == 3


@pytest.mark.parametrize(("decay", "expected"), [(0.999, [4.0, 6.0, 20 / 3]), (0.5, [4.0, 6.0, 7.0]), (0.0, [4, 8, 8])])
def test_mean_teachers_by_hand(make, decay, expected):
    # Weights 4, 8, 8 after steps 0, 1, 2: at first the mean of all so far, then at least 1 - decay of the newest.
    method = make(mean_decay=decay)
    weight, mean = method.cohort[1].head.linear.weight, method.means[1].head.linear.weight
    for value, wanted in zip((4.0, 8.0, 8.0), expected, strict=True):
        nn.init.constant_(weight, value)
        place = mean.data_ptr()
        method.after_step()
        assert mean.data_ptr() == place
        torch.testing.assert_close(mean, torch.full_like(mean, wanted))


def test_the_decay_reaches_its_limit(make):
    method = make().float()
    method.steps.fill_(5000)
    for student, mean in zip(method.cohort.parameters(), method.means.parameters(), strict=True):
        nn.init.ones_(student), nn.init.zeros_(mean)
    method.after_step()
    for mean in method.means.parameters():
        torch.testing.assert_close(mean, torch.full_like(mean, 0.001), rtol=1e-4, atol=0)


def test_mean_teachers_have_statistics_of_their_own_passes(make, batch):
    method = make()
    norm, own = method.means[0].stages[2][1], method.cohort[0].stages[2][1]
    method(batch[0]), method.after_step()
    assert norm.num_batches_tracked == own.num_batches_tracked == 1
    assert not torch.equal(norm.running_mean, own.running_mean)
    # The new statistics: a tenth of those of the batch that the teacher saw.
    fresh = make()
    maps = slow.stage_outputs(fresh.means[0], batch[0], (1, 1, 2))
    raw = nn.functional.conv2d(maps[1], fresh.means[0].stages[2][0].weight, stride=2, padding=1)
    fresh(batch[0])
    torch.testing.assert_close(fresh.means[0].stages[2][1].running_mean, 0.1 * raw.mean((0, 2, 3)))
    before = norm.running_mean.clone()
    method.eval()(batch[0])
    assert torch.equal(norm.running_mean, before)


def test_the_means_share_what_the_students_share(make):
    method = make()
    assert method.means.shared_stages == method.cohort.shared_stages == 2
    assert method.means[0].stages[0] is method.means[2].stages[0]
    assert parameter_count(method.means) == parameter_count(method.cohort)
    assert parameter_count(method.fusion) == 3 * 24 + 3
    pointers = [{each.data_ptr() for each in half.parameters()} for half in (method.means, method.cohort)]
    assert not pointers[0] & pointers[1]


def test_the_means_start_as_the_students(tiny_network, batch):
    method = PCL([tiny_network(), tiny_network()], 3, image_size=(8, 8)).double()
    outputs = method(batch[0])
    for index in range(2):
        assert torch.equal(outputs.extras[f"mean{index}"], outputs.logits[index])


def test_who_learns_from_what(make, batch):
    method = make()

    def reached(term: str, method: PCL = method) -> set[str]:
        return slow.reached(method, batch, term, fusion=method.fusion)

    assert not any(each.requires_grad for each in method.means.parameters())
    own = {"trunk", "branch1", "head1"}
    assert reached("ce/student1") == reached("kl/fused->student1") == reached("kl/mean0->student1") == own
    assert reached("ce/fused") == {"trunk", "branch0", "branch1", "branch2", "fusion"}
    everything = {"trunk", "branch0", "branch1", "branch2", "head1", "fusion"}
    assert reached("kl/fused->student1", make(detach_teachers=False)) == everything


def test_a_teacher_sees_its_own_students_view(make, batch):
    method = make().eval()
    images = views_of(batch[0], 3)
    outputs = method(images)
    for index, view in enumerate(images):
        torch.testing.assert_close(outputs.extras[f"mean{index}"], method.means[index](view))
        torch.testing.assert_close(outputs.logits[index], method.cohort[index](view))


def test_settings_reach_the_terms(make, batch):
    method = make(temperature=2.0, ramp_up=0.0, target_epsilon=1e-3)
    outputs = method(batch[0])
    terms = method.losses(outputs, batch[1], torch.tensor(0.0))
    expected = soft_target_kl(outputs.logits[0], outputs.extras["mean2"], 2.0, epsilon=1e-3) / 2
    torch.testing.assert_close(terms["kl/mean2->student0"], expected)


def test_predictors(make, batch):
    method = make((8, 2), (10, 1))
    update(method, batch, sgd(method))
    method.eval()
    predictions, predictors = method.predictions(method(batch[0])), method.predictors()
    assert list(predictions) == list(predictors) == ["student0", "student1", "ensemble", "fused", "mean0", "mean1"]
    for name, logits in predictions.items():
        assert torch.equal(predictors[name](batch[0]), logits), name
    assert parameter_count(predictors["mean1"]) == parameter_count(predictors["student1"])


def test_a_training_goes_on_after_loading_its_state(make, batch):
    whole = make()
    optimizer = sgd(whole)
    for _ in range(2):
        update(whole, batch, optimizer)
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert resumed.steps == 2 and {"steps", "means.students.0.head.linear.weight"} <= set(whole.state_dict())
    for method in (whole, resumed):
        for _ in range(2):
            update(method, batch, sgd(method))
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


def test_the_means_are_not_trained(make):
    method = make()
    (group,) = method.parameter_groups()
    assert group.name == "students" and group.weight_decay is None
    assert sum(each.numel() for each in group.parameters) == parameter_count(method.cohort) + 75
