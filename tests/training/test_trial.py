"""Students of any form: what runs in a plain loop trains, or is refused in one line before a folder is made."""

import copy
import dataclasses
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import codistill as cd
from codistill.bench.loops import resident_loop
from codistill.core.errors import UsageError
from codistill.data.augment import DeviceImages, epoch_indices
from codistill.methods import METHODS
from codistill.networks import Network, PooledLinear
from codistill.settings.config import default_config
from codistill.training.step import TrainStep
from codistill.training.trial import HostReads

from .. import tiny

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the older ways to norm weights, and TorchScript


def block(before: int, after: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())


def own(stage: nn.Module | None = None, head: nn.Module | None = None, first: nn.Module | None = None) -> Network:
    """Make a network with another first stage, second stage or head than a plain one."""
    return Network([first or block(3, 4, 1), stage or block(4, 6, 2)], head or PooledLinear(6, 3), [4, 6])


class Then(nn.Module):
    """A module, then a function."""

    def __init__(self, module: nn.Module, function: Callable) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, inputs):
        return self.function(self.module(inputs))


class Constants(nn.Module):
    """Plain tensors, one in a list, a buffer that is not saved, and the last output."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.factor, self.more = block(4, 6, 2), torch.full((1, 6, 1, 1), 0.5), [torch.ones(1)]
        self.register_buffer("unsaved", torch.full((6, 1, 1), 3.0), persistent=False)

    def forward(self, maps):
        self.last = self.base(maps) * self.factor * self.more[0] * self.unsaved
        return self.last


class CountingNorm(nn.BatchNorm2d):
    """Which needs its count of batches in its own forward pass."""

    def forward(self, maps):
        if self.training:
            self.num_batches_tracked += 1
        momentum = 1 / (1 + float(self.num_batches_tracked))
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(maps, mean, variance, self.weight, self.bias, self.training, momentum)


class StandardisedConv(nn.Conv2d):
    def forward(self, maps):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(maps, weight, self.bias, self.stride, self.padding)


class Mask(nn.Module):
    """Takes a channel away by a buffer that is infinite, as masks of attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(6, 1, 1).index_fill(0, torch.tensor(2), -torch.inf))

    def forward(self, maps):
        return F.relu(maps + self.mask)


class AssignedMean(nn.Module):
    """A running mean that is assigned, not written into."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 6, 1, 1))

    def forward(self, maps):
        if not self.training:
            return maps - self.mean
        mean = maps.mean((0, 2, 3), keepdim=True)
        self.mean = 0.5 * self.mean + 0.5 * mean.detach()
        return maps - mean


class Fading(nn.Module):
    """Shrinks maps by how many passes it has seen in training, which it counts in whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, maps):
        if self.training:
            self.passes += 1
        return maps * (1 + 1 / (1 + self.passes))


def tied() -> nn.Module:
    convolutions = [nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)]
    convolutions[2].weight = convolutions[1].weight
    return nn.Sequential(*convolutions)


def frozen() -> Network:
    student = own()
    student.stages[0].requires_grad_(False)
    return student


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, 2, 1)


def tokens(maps):
    return maps.flatten(2).transpose(1, 2)


def mean_head(dim: int) -> nn.Module:
    return nn.Sequential(Then(nn.Identity(), lambda maps: maps.mean(dim)), nn.Linear(6, 3))


STUDENTS = {
    "constants": lambda: own(Constants()),
    "branch on a value": lambda: own(Then(block(4, 6, 2), lambda maps: maps.clamp(max=1) if maps.max() > 9 else maps)),
    "weight_norm": lambda: own(weight_norm(conv())),
    "spectral_norm": lambda: own(spectral_norm(conv())),
    "parametrized": lambda: own(nn.Sequential(parametrizations.weight_norm(conv()))),
    "TorchScript": lambda: own(torch.jit.script(block(4, 6, 2))),
    "counting norm": lambda: own(nn.Sequential(conv(), CountingNorm(6))),
    "SyncBatchNorm": lambda: own(nn.Sequential(conv(), nn.SyncBatchNorm(6))),
    "standardised weights": lambda: own(StandardisedConv(4, 6, 3, 2, 1)),
    "tied": lambda: own(tied()),
    "frozen": frozen,
    "float64 inside": lambda: own(Then(block(4, 6, 2), torch.Tensor.double), PooledLinear(6, 3).double()),
    "channels_last": lambda: own().to(memory_format=torch.channels_last),
    "view of maps": lambda: own(head=nn.Sequential(Then(nn.Identity(), lambda x: x.view(-1, 96)), nn.Linear(96, 3))),
    "tokens": lambda: own(Then(block(4, 6, 2), tokens), mean_head(1)),
    "tokens from the stem on": lambda: Network([Then(conv3(), tokens), nn.Linear(4, 6)], mean_head(1), [4, 6]),
    "mask": lambda: own(nn.Sequential(block(4, 6, 2), Mask())),
    "assigned buffer": lambda: own(nn.Sequential(block(4, 6, 2), AssignedMean())),
    "counted passes": lambda: own(nn.Sequential(block(4, 6, 2), Fading())),
    "vectors": lambda: own(Then(block(4, 6, 2), lambda maps: maps.mean((2, 3))), nn.Linear(6, 3)),
    "DataParallel stage": lambda: own(nn.DataParallel(block(4, 6, 2))),
}


def conv3() -> nn.Module:
    return nn.Conv2d(3, 4, 2, 2)


def made(make: Callable[[], nn.Module], kind: type[cd.Method] = cd.DML, **settings: object) -> cd.Method:
    torch.manual_seed(0)
    students = [make() for _ in range(max(2, kind.min_students))]
    return kind(students, 3, kind.Settings(**settings) if settings else None, (8, 8))


def train(method: cd.Method, out: object, **changes: object) -> cd.Run:
    settings, execution = tiny.both_settings(**changes)
    return cd.train(method, tiny.data(), out=out, settings=settings, execution=execution, show=False)


def plain_loop(method: cd.Method, epochs: int) -> cd.Method:
    """Train as anyone would, on the batches of a run."""
    data, settings = tiny.data(), tiny.settings(epochs=epochs)
    images, augmentation = DeviceImages(data.train, data.statistics, CPU), settings.augmentation(data)
    optimizer = torch.optim.SGD(
        method.parameters(),
        settings.learning_rate,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )
    for epoch in range(epochs):
        whole = epoch_indices(len(images), settings.seed, epoch, augmentation, CPU, method.train().views)
        for start in range(0, len(images), settings.batch_size):
            pixels, labels = images.augmented(whole.part(start, start + settings.batch_size), augmentation)
            optimizer.zero_grad()
            sum(method.losses(method(pixels.contiguous()), labels, epoch / epochs).values()).backward()
            optimizer.step()
    return method


@pytest.mark.fault(76)
@pytest.mark.parametrize("name", STUDENTS)
def test_what_trains_in_a_plain_loop_trains_here(name, tmp_path, no_pages):
    method = made(STUDENTS[name])
    wanted = plain_loop(made(STUDENTS[name]), epochs=1).state_dict()
    run = train(method, tmp_path / "run", epochs=1)
    for key, tensor in method.state_dict().items():
        torch.testing.assert_close(
            tensor, wanted[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    # In a later process, from networks with other weights.
    torch.manual_seed(1)
    again = cd.Run(
        run.path, method=METHODS["dml"]([STUDENTS[name]() for _ in range(2)], 3, None, (8, 8)), data=tiny.data()
    )
    last = run.metrics()[-1]["test"]
    assert {key: each.top1_error for key, each in again.evaluate(device="cpu").items()} == {
        key: each["top1_error"] for key, each in last.items()
    }
    train(made(STUDENTS[name]), tmp_path / "bf16", epochs=1, precision="bf16")


@pytest.mark.parametrize("name", ["mask", "assigned buffer", "counted passes"])
def test_buffers_of_an_average_are_those_of_its_method_or_follow_them(name, tmp_path, no_pages):
    method = made(STUDENTS[name])
    run = train(method, tmp_path / "run", ema_decay=0.5)
    last, state = run.metrics()[-1]["test"], run.checkpoints.load()
    again = cd.Run(run.path, method=made(STUDENTS[name]), data=tiny.data()).evaluate(device="cpu")
    assert {key: each.nll for key, each in again.items()} == {key: each["nll"] for key, each in last.items()}
    for key in state.method:
        if key.endswith(".mean"):
            assert state.ema[key].abs().sum() > 0 and not torch.equal(state.ema[key], state.method[key])
        assert key.endswith((".mask", ".passes", "num_batches_tracked")) or key in state.ema


def test_a_layer_that_assigns_a_buffer_cannot_be_captured(tmp_path, no_pages):
    for name, capturable in (("assigned buffer", False), ("counted passes", True)):
        method = made(STUDENTS[name])
        train(method, tmp_path / name, epochs=1)
        assert method.capturable is capturable


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(cd.DML, {"update": "alternating"}), (cd.FSP, {}), (cd.FitNets, {"initial_share": 0.5, "hint_stage": 1})],
)
def test_frozen_parameters_stay_where_a_part_is_updated(kind, settings, tmp_path, no_pages):
    torch.manual_seed(0)
    method = kind([frozen(), frozen()], 3, kind.Settings(**settings), (8, 8))
    if kind is not cd.DML:
        cd.WithTeacher(method, own())
    before = {name: each.clone() for name, each in method.named_parameters()}
    train(method, tmp_path / "run")
    stayed = {name for name, each in method.named_parameters() if torch.equal(each, before[name])}
    assert {name for name in before if ".stages.0." in name and "students" in name} <= stayed < before.keys()


@pytest.mark.parametrize("student", ["view of maps", "tied"])
@pytest.mark.parametrize("teacher", ["view of maps", "tied"])
def test_a_teacher_may_view_its_maps(student, teacher, tmp_path, no_pages):
    method = made(STUDENTS[student], cd.KD)
    cd.WithTeacher(method, STUDENTS[teacher]())
    assert train(method, tmp_path / "run", epochs=1).finished
    loop = resident_loop([method], dataclasses.replace(default_config("kd"), train=tiny.settings()), CPU, tiny.data())
    loop(1)


@pytest.mark.fault(76)
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning")  # of the compiler
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_stages_train(backend, tmp_path, no_pages):
    method = made(lambda: own(torch.compile(block(4, 6, 2), backend=backend)))
    run = train(method, tmp_path / "run", epochs=1)
    plain = made(lambda: own(block(4, 6, 2)))
    train(plain, tmp_path / "plain", epochs=1)
    for mine, other in zip(method.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert run.export("student0", tmp_path / "student.pt2").exists()


@pytest.mark.fault(76)
@pytest.mark.parametrize("name", ["constants", "weight_norm", "TorchScript", "counting norm", "view of maps"])
def test_students_of_any_form_are_resumed(name, tmp_path, no_pages, monkeypatch):
    whole = made(STUDENTS[name])
    train(whole, tmp_path / "whole")
    call, count = TrainStep.__call__, iter(range(100))

    def breaking(self, *arguments):
        if next(count) == 4:
            raise KeyboardInterrupt
        call(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "__call__", breaking)
        train(made(STUDENTS[name]), tmp_path / "run")
    resumed = made(STUDENTS[name])
    cd.resume(tmp_path / "run", method=resumed, data=tiny.data(), show=False)
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in resumed.state_dict().items())


@pytest.mark.fault(76)
@pytest.mark.gpu
def test_students_that_read_values_are_not_captured(tmp_path, no_pages, capsys):
    method = made(STUDENTS["branch on a value"])
    train(method, tmp_path / "run", device="cuda", epochs=3)
    assert "dml cannot be captured as a CUDA graph: the steps run one by one" in capsys.readouterr().err
    assert made(own).capturable


def test_reads_on_the_host_are_found():
    with HostReads() as reads:
        values = torch.arange(3.0)
        values.max() > 1, values * 2, torch.where(values > 1, values, 0)
        assert reads.found == []
        bool(values.max() > 1), values[0].item(), values[values > 1]
    assert len(reads.found) == 3


FORMS = {
    "four dimensions": (
        lambda: own(head=Then(PooledLinear(6, 3), lambda x: x[..., None, None])),
        "head.*3, 1, 1.*logits",
    ),
    "dict": (lambda: own(head=Then(PooledLinear(6, 3), lambda x: {"out": x})), "head returns a dict with 'out'"),
    "tuple": (lambda: own(head=Then(PooledLinear(6, 3), lambda x: (x, x))), "head returns a tuple"),
    "tuple in training": (lambda: own(head=Auxiliary()), "head returns a tuple"),
    "class indices": (lambda: own(head=Then(PooledLinear(6, 3), lambda x: x.long())), "of int64"),
    "without a batch": (lambda: own(head=Then(PooledLinear(6, 3), lambda x: x.mean(0))), "for a batch of 2"),
    "stage with two outputs": (lambda: own(Then(block(4, 6, 2), lambda x: (x, x))), "stage 1 returns a tuple"),
    "stage with none": (lambda: own(Then(block(4, 6, 2), lambda x: None)), "stage 1 returns a NoneType"),
    "other classes": (lambda: own(head=PooledLinear(6, 5)), "has 5 classes, but data set colours 3"),
    "no Network": (lambda: nn.Sequential(block(3, 6, 2), PooledLinear(6, 3)), r"is a Sequential, but .* Network\("),
    "compiled Network": (lambda: torch.compile(own(), backend="eager"), "--compile"),
    "DataParallel": (lambda: nn.DataParallel(own()), r"within DataParallel: hand in its \.module"),
}


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = PooledLinear(6, 3)

    def forward(self, maps):
        return (self.head(maps), maps) if self.training else self.head(maps)


@pytest.mark.fault(77)
@pytest.mark.parametrize("name", FORMS)
def test_networks_of_another_form_are_refused(name, tmp_path):
    make, says = FORMS[name]
    with pytest.raises(UsageError, match=says):
        train(made(make), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.held = block(4, 6, 2), threading.Lock()

    def forward(self, maps):
        return self.base(maps)


class ExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = block(4, 6, 2)

    def forward(self, maps):
        return self.base(maps)

    def get_extra_state(self):
        return {"seen": 1}

    def set_extra_state(self, state):
        pass


def within_inference_mode() -> Network:
    with torch.inference_mode():
        return own()


UNFIT = {
    "lazy": (lambda: own(nn.LazyConv2d(6, 3)), "lazy layers without weights: call it once"),
    "meta": (lambda: own().to("meta"), "no weights, only their shapes"),
    "half": (lambda: own().half(), r"stage 0 .*float16 weights.*\.float\(\)"),
    "float64": (lambda: own().double(), r"stage 0 .*float64 weights.*\.float\(\)"),
    "inference mode": (within_inference_mode, "within torch.inference_mode"),
    "lock": (lambda: own(Holding()), "cannot be copied: TypeError.*lock"),
    "all frozen": (lambda: own().requires_grad_(False), "does not require grad"),
    "extra state": (lambda: own(ExtraState()), "get_extra_state"),
    "error": (lambda: own(Then(block(4, 6, 2), lambda x: x[:, 9])), "stage 1 cannot take 8x8 images: IndexError"),
    "writes to the images": (
        lambda: own(first=Then(nn.Identity(), lambda x: x.sub_(1).repeat(1, 2, 1, 1)[:, :4])),
        "stage 0 writes",
    ),
}


@pytest.mark.fault(78)
@pytest.mark.parametrize("name", UNFIT)
def test_networks_that_cannot_be_trained_are_refused(name, tmp_path):
    make, says = UNFIT[name]
    with pytest.raises(UsageError, match=says):
        train(made(make, shared_stages=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(79)
@pytest.mark.parametrize("name", METHODS)
def test_maps_of_other_dimensions_are_trained_or_refused(name, tmp_path, no_pages):
    kind = METHODS[name]
    needs_maps = name in ("mfef", "ffl", "byot", "one", "okddip", "okd-cheap", "pcl", "mcl", "l-mcl", "ahbf", "ffsd")

    def run(**settings: object) -> None:
        method = made(
            lambda: Network([conv3(), Then(nn.Identity(), tokens), nn.Linear(4, 6)], mean_head(1), [4, 4, 6]),
            kind,
            **settings,
        )
        if kind.teacher == "required":
            method = cd.WithTeacher(method, own())
        train(method, tmp_path / "run", epochs=1)

    if needs_maps or kind.teacher_maps:
        with pytest.raises(UsageError, match=r"\[batch, 16, [46]\]"):
            run()
        assert not (tmp_path / "run").exists()
    else:
        run(views_per_student=True, **({"shared_stages": 2} if kind.min_students > 1 else {}))


def test_a_view_for_each_student_reaches_it_whatever_the_form_of_maps():
    method = made(STUDENTS["tokens from the stem on"], shared_stages=1).eval()
    views = torch.randn(2, 5, 3, 8, 8)
    together = method(views).logits
    for index, view in enumerate(views):
        torch.testing.assert_close(together[index], method(view).logits[index])


@pytest.mark.fault(78)
@pytest.mark.parametrize("way", ["constant", "type", "frozen"])
def test_students_that_only_look_alike_share_no_stages(way):
    class Scale(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor, self.base = factor, block(3, 4, 1)

        def forward(self, images):
            return self.factor * self.base(images)

    class Other(Scale):
        pass

    Other.__name__ = "Scale"
    pair = {
        "constant": (Scale(1), Scale(2)),
        "type": (Scale(1), Other(1)),
        "frozen": (Scale(1), Scale(1).requires_grad_(False)),
    }
    assert made(lambda: own(first=Scale(1)), cd.FFL).cohort.shared_stages == 1
    stems = iter(pair[way])
    assert made(lambda: own(first=next(stems)), cd.FFL).cohort.shared_stages == 0


def test_a_trial_leaves_networks_and_random_numbers_alone(tmp_path, no_pages):
    students = [own(nn.Sequential(spectral_norm(conv()), nn.Dropout(0.5))) for _ in range(2)]
    students[0](torch.randn(2, 3, 8, 8))  # which leaves a weight that is no leaf
    before, drawn = copy.deepcopy(students[1].state_dict()), torch.get_rng_state()
    with pytest.raises(UsageError, match="made for 4 classes"):
        train(cd.DML(students, 4, image_size=(8, 8)), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), drawn) and students[1].training
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in students[1].state_dict().items()
        if not name.startswith("stages.0")
    )


@pytest.mark.fault(77)
def test_teachers_of_any_form_teach_or_are_refused(tmp_path, no_pages):
    train(cd.WithTeacher(made(own), STUDENTS["branch on a value"]()), tmp_path / "run", epochs=1)
    train(
        cd.WithTeacher(made(own), nn.Sequential(weight_norm(conv3()), nn.Flatten(), nn.Linear(64, 3))), tmp_path / "two"
    )
    for teacher, says in (
        (own(head=Then(PooledLinear(6, 3), lambda x: (x, x))), "the teacher returns a tuple"),
        (own(head=PooledLinear(6, 5)), "the teacher has 5 classes"),
        (nn.Linear(5, 3), "the teacher cannot take its input"),
    ):
        with pytest.raises(UsageError, match=says):
            cd.WithTeacher(made(own), teacher)
