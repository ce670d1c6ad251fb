"""AdamW, schedules, clipping and the moving average: formulas, captured steps, and resumption bit for bit."""

import copy
import dataclasses
import math
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import codistill as cd
from codistill.core.errors import UsageError
from codistill.data.augment import DeviceImages, epoch_indices
from codistill.settings.config import TrainSettings
from codistill.training import trainer as loop
from codistill.training.average import WeightAverage
from codistill.training.optim import AdamW, make_optimizer, optimizer_tensors, rate_of
from codistill.training.resume import resume
from codistill.training.step import make_step

from .. import tiny
from ..faults.running import arguments, at_step, end_state, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")
SCHEDULE = ("--schedule", "cosine", "--warm-up", "1")
ALL = ("--optimizer", "adamw", "--lr", "0.01", *SCHEDULE, "--clip-norm", "0.5", "--ema-decay", "0.9")


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    return str(tiny.write_npz(tmp_path_factory.mktemp("updates") / "colours.npz", tiny.data(train=20, test=21)))


# --- optimiser ---


@pytest.mark.parametrize("everywhere", [None, True])
def test_adamw_equals_torchs_plain_one(everywhere):
    method = tiny.method()
    twin = copy.deepcopy(method)
    more = {"weight_decay": 0.1, "decay_norms": everywhere, "adam_beta2": 0.9}
    settings = TrainSettings(optimizer="adamw", learning_rate=0.01, **more)
    optimizer = make_optimizer(method, settings)
    assert len(optimizer_tensors(optimizer)) == 3 * len(list(method.parameters()))
    before = [each.data_ptr() for each in optimizer_tensors(optimizer)]
    names = {id(each): name for name, each in method.named_parameters()}
    decays = {names[id(each)]: group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    if everywhere is None:
        assert all((decays[name] > 0) == (each.ndim > 1) for name, each in method.named_parameters())
    reference = AdamW(  # torch's, but for the import of the compiler, which takes seconds
        [{"params": [each], "weight_decay": decays[name]} for name, each in twin.named_parameters()],
        lr=0.01,
        betas=(0.9, 0.9),
        foreach=False,
    )
    for seed in range(4):
        torch.manual_seed(seed)
        for parameter, other in zip(method.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    assert [each.data_ptr() for each in optimizer_tensors(optimizer)] == before
    for parameter, other in zip(method.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)


def test_sgd_decays_everything_unless_told():
    for decay_norms, groups in ((None, 2), (True, 2), (False, 4)):
        optimizer = make_optimizer(tiny.method(), TrainSettings(decay_norms=decay_norms))
        assert len(optimizer.param_groups) == groups


# --- schedules ---


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"schedule": "cosine"}, [1.0, 0.8535534, 0.5, 0.1464466]),
        ({"schedule": "cosine", "min_learning_rate": 0.2}, [1.0, 0.8828427, 0.6, 0.3171573]),
        ({"schedule": "cosine", "warm_up": 2}, [0.5, 1.0, 1.0, 0.5]),
        ({"warm_up": 2, "milestones": (1, 3)}, [0.5, 1.0, 0.1, 0.01]),
        ({"milestones": (1, 3)}, [1.0, 0.1, 0.1, 0.01]),
    ],
)
def test_rates_by_hand(changes, rates):
    settings = TrainSettings(epochs=4, learning_rate=1.0, **changes)
    assert [rate_of(settings, epoch) for epoch in range(4)] == pytest.approx(rates, abs=1e-6)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 9))
def test_a_warm_up_rises_by_equal_amounts(warm_up, more, steps):
    settings = TrainSettings(epochs=warm_up + more, learning_rate=0.3, warm_up=warm_up, milestones=())
    numbers = [(epoch, number / steps) for epoch in range(warm_up) for number in range(1, steps + 1)]
    rates = [rate_of(settings, *each) for each in numbers]
    assert rates == pytest.approx([0.3 * count / (warm_up * steps) for count in range(1, warm_up * steps + 1)])
    assert rate_of(settings, warm_up) == 0.3


def test_each_step_of_a_warm_up_has_its_rate(colours, tmp_path, monkeypatch):
    seen = []
    for number in range(1, 7):
        at_step(monkeypatch, number, lambda step: seen.append(step.optimizer.param_groups[0]["lr"].item()))
    flags = ("--lr", "0.3", "--warm-up", "1", "--milestones")
    assert run_here(arguments(colours, tmp_path / "run", *flags)) == 0
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])
    assert [row["learning_rate"] for row in cd.Run(tmp_path / "run").metrics()] == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam': did you mean adamw"),
        ({"schedule": "cosin"}, "schedule is 'cosin': did you mean cosine"),
        ({"optimizer": "adamw"}, "learning_rate is 0.1, with which adamw diverges: it needs about 0.001"),
        ({"schedule": "cosine", "milestones": (2,)}, "milestones are [2], but schedule cosine has none"),
        ({"min_learning_rate": 0.01}, "min_learning_rate is 0.01, but schedule step has none"),
        ({"warm_up": 300}, "warm_up is 300; it must be at least 0 and less than the epochs, 300"),
        ({"clip_norm": math.inf}, "clip_norm is inf; it must be a number above 0"),
    ],
)
def test_what_does_not_go_together(changes, words):
    with pytest.raises(UsageError) as caught:
        TrainSettings(**changes)
    assert words in str(caught.value)


def test_a_preset_with_another_schedule(parsed):
    config = parsed("--preset", "mfef", "--networks", "tiny", "tiny", "--data", "digits", "--schedule", "cosine")
    assert config.train.milestones is None and config.train.epochs == 300


# --- clipping ---


def one_step(**changes) -> tuple[cd.Method, float]:
    """Train one step without momentum and decay, and return the method and how far all weights moved together."""
    method, data = tiny.method(cd.Independent), tiny.data()
    before = [each.detach().clone() for each in method.parameters()]
    settings = tiny.settings(learning_rate=0.1, momentum=0.0, weight_decay=0.0, **changes)
    images = DeviceImages(data.train, data.statistics, torch.device("cpu"))
    step = make_step(method, images, settings.augmentation(data), settings)
    step(epoch_indices(8, 0, 0, step.augmentation, step.device, 1), torch.zeros(()))
    moved = [(old - new).detach() for old, new in zip(before, method.parameters(), strict=True)]
    return method, torch.cat([each.flatten() for each in moved]).norm().item()


def test_long_gradients_are_scaled_down_together_and_short_ones_stay():
    free, distance = one_step()
    _, less = one_step(clip_norm=0.05)
    assert less == pytest.approx(0.1 * 0.05, rel=1e-3) and distance > 2 * less
    same, _ = one_step(clip_norm=1e6)
    for first, second in zip(free.parameters(), same.parameters(), strict=True):
        assert torch.equal(first, second)


# --- moving average ---


def test_the_average_by_hand():
    method = tiny.method(cd.Independent)
    bias = method.cohort[0].head.linear.bias
    mean = method.cohort[0].stages[0][1].running_mean
    with torch.no_grad():
        bias.zero_(), mean.zero_()
    average = WeightAverage(method, 0.25)
    twin = average.method.cohort[0]
    expected = 0.0
    for value in (1.0, 5.0, -2.0):
        with torch.no_grad():
            bias.fill_(value), mean.fill_(2 * value)
        average.update()
        decay = 2 / 11 if value == 1.0 else 0.25  # (1 + 1) / (10 + 1), then 3 / 12 = 0.25, and no more than that
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(twin.head.linear.bias, torch.full((3,), expected))
        torch.testing.assert_close(twin.stages[0][1].running_mean, torch.full((4,), 2 * expected))
    # What has not changed is not rounded either.
    assert torch.equal(twin.stages[0][0].weight, method.cohort[0].stages[0][0].weight)
    assert not any(each.requires_grad for each in average.method.parameters()) and not average.method.training


def test_the_average_of_a_trunk_is_a_trunk_and_has_no_teacher():
    method = tiny.method(cd.MFEF)
    twin = WeightAverage(cd.WithTeacher(method, tiny.own_students(1)[0]), 0.9).method
    assert method.taught_by is not None and twin.taught_by is None
    assert twin.cohort[0].stages[0] is twin.cohort[1].stages[0] is not method.cohort[0].stages[0]


def test_averages_are_evaluated_exported_and_chosen(colours, tmp_path):
    flags = ("--ema-decay", "0.9", "--validation", "4")
    assert run_here(arguments(colours, tmp_path / "run", *flags)) == 0
    run = cd.Run(tmp_path / "run")
    names = ["student0", "student1", "ensemble", "fused"]
    assert list(run.summary["parameters"]) == names + [f"{name}-ema" for name in names]
    assert run.summary["parameters"]["student1-ema"] == run.summary["parameters"]["student1"]
    last = run.metrics()[-1]
    assert {name: dataclasses.asdict(each) for name, each in run.evaluate(device="cpu").items()} == last["test"]
    assert list(last["validation"]) == list(run.summary["parameters"])
    assert set(last["diversity"]["gap_to_fused"]) == {"student0", "student1"}
    plain, averaged = (run.predictors()[name].state_dict() for name in ("student0", "student0-ema"))
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)
    run.export("student0-ema", tmp_path / "student.safetensors")
    loaded = cd.load_classifier(tmp_path / "student.safetensors")
    pixels = run.load_data().test.images
    expected = cd.load_classifier(run.path, "student0-ema").logits(pixels)
    torch.testing.assert_close(loaded.logits(pixels), expected)


# --- resumption ---


def stopped(colours, out, step, *more, method="mfef"):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run_here(arguments(colours, out, *more, method=method)) == 143
    return out


@pytest.mark.parametrize(
    ("method", "step", "more"),
    [
        ("mfef", 2, ALL),
        pytest.param("dml", 5, ALL, marks=pytest.mark.slow),
        *(
            pytest.param(method, step, more, marks=pytest.mark.slow)
            for method, step in (("mfef", 1), ("pcl", 4), ("kdcl", 6))
            for more in (ALL, ["--optimizer", "adamw", "--lr", "0.01"], ["--ema-decay", "0.9"], ["--clip-norm", "0.1"])
        ),
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_bits(colours, tmp_path, method, step, more):
    assert run_here(arguments(colours, tmp_path / "whole", *more, method=method)) == 0
    resume(stopped(colours, tmp_path / "broken", step, *more, method=method), show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("method", ["mfef", "dml"])
def test_captured_steps_go_on_with_the_same_bits(colours, tmp_path, method):
    # Eight steps an epoch: three plain ones, then the graph; the warm-up ends within the captured ones.
    flags = ("--device", "cuda", "--deterministic", "-b", "3", *ALL)
    outs = [tmp_path / name for name in ("whole", "broken")]
    assert run_here(arguments(colours, outs[0], *flags, method=method)) == 0
    with pytest.MonkeyPatch.context() as patch:
        after = loop.Trainer.after_step

        def stopping(self, epoch, number):
            after(self, epoch, number)
            if (epoch, number) == (0, 5):
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(loop.Trainer, "after_step", stopping)
        assert run_here(arguments(colours, outs[1], *flags, method=method)) == 143
    assert run_here(["resume", str(outs[1])]) == 0
    assert end_state(outs[1]) == end_state(outs[0])


@pytest.mark.slow
def test_verify_resume_compares_averages_too(colours, tmp_path, capsys):
    assert run_here(arguments(colours, tmp_path / "run", "--verify-resume", *ALL)) == 0
    assert capsys.readouterr().out.startswith("resume verified: 3 breaks in 6 steps change no bit of ")
