"""The measurement that chooses an execution: on a GPU that is not there, and with times that are made up."""

import json
import os
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill import tuning
from codistill.config import RunConfig
from codistill.data.augment import Augmentation, DeviceImages
from codistill.execution import Execution, choices
from codistill.tuning import WORTHWHILE_STEPS, Trial, choose_execution, trial

from . import tiny
from .faults.running import arguments, end_state, run_here
from .pretended_gpu import pretended

CUDA = torch.device("cuda")
STOCK, BESIDE, FUSED = Execution(), Execution(overlap=True), Execution("fused", overlap=True)
AUGMENTATION = Augmentation(padding=1)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "CHOSEN", {})
    with pretended() as device:
        yield device


class Times:
    """What executions are said to give: milliseconds and loss, or what fails; and which were tried for how many."""

    def __init__(self) -> None:
        self.of: dict[Execution, tuple[float, float] | Exception] = {}
        self.tried: list[tuple[Execution, int]] = []

    def trial(self, method, config, images, augmentation, runs, execution) -> Trial:
        self.tried.append((execution, runs))
        found = self.of.get(execution, (9.0, 3.0))
        if isinstance(found, Exception):
            raise found
        return Trial(*found)


@pytest.fixture
def times(monkeypatch):
    made_up = Times()
    monkeypatch.setattr(tuning, "trial", made_up.trial)
    return made_up


def config(kind: type[cd.Method] = cd.MFEF, **changes: object) -> RunConfig:
    return RunConfig(method_name=kind.name, method=kind.Settings(), train=tiny.settings(**changes))


def resident() -> DeviceImages:
    data = tiny.data()
    return DeviceImages(data.train, data.statistics, CUDA)


def choose(
    steps: int = WORTHWHILE_STEPS, runs: int = 1, method: cd.Method | None = None, **changes: object
) -> Execution:
    return choose_execution(method or tiny.method(), config(**changes), resident, AUGMENTATION, CUDA, runs, steps)


def test_the_fastest_is_chosen_and_known_from_then_on(times, capsys):
    times.of[FUSED] = 2.0, 3.01
    assert choose() == FUSED
    assert "measuring which way to compute a step" in capsys.readouterr().err
    # Without overlap only the fastest one is tried.
    assert times.tried == [(BESIDE, 1), (FUSED, 1), (Execution("fused"), 1)]
    for steps in (WORTHWHILE_STEPS, 1):
        assert choose(steps) == FUSED
        tuning.CHOSEN.clear()  # another process reads it
    assert len(times.tried) == 3 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [{"runs": 2}, {"batch_size": 4}, {"precision": "bf16"}, {"method": tiny.method(students=3)}], ids=str
)
def test_what_was_measured_holds_for_the_same_training_only(times, other):
    times.of[FUSED] = 2.0, 3.0
    choose()
    before = len(times.tried)
    choose(**other)
    assert len(times.tried) == before + 3
    assert {runs for _, runs in times.tried[before:]} == {other.get("runs", 1)}


def test_images_of_another_size_are_another_training(times):
    larger = tiny.method()
    choose(method=larger)
    larger.image_size = (16, 16)
    choose(method=larger)
    assert len(times.tried) == 6


def test_the_first_one_stays_unless_another_is_clearly_faster(times):
    times.of[BESIDE], times.of[FUSED] = (2.0, 3.0), (1.99, 3.0)
    assert choose() == BESIDE


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (RuntimeError("Triton\n cannot"), "Triton cannot"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (ValueError(), "ValueError"),
        ((1.0, 3.2), "its loss in the first 8 steps is 3.2000 and should be about 3.0000"),
        ((1.0, float("nan")), "its loss in the first 8 steps is nan"),
    ],
    ids=str,
)
def test_one_that_fails_or_gives_other_losses_is_left_out(times, capsys, failure, says):
    times.of[FUSED], times.of[STOCK] = failure, (5.0, 3.0)
    assert choose() == STOCK
    assert f"a step with fused kernels, overlapping streams is left out: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [RuntimeError("broken"), (1.0, float("inf"))], ids=str)
def test_where_the_first_one_fails_nothing_is_chosen_or_kept(times, failure, tmp_path):
    times.of[BESIDE] = failure
    assert choose() == BESIDE
    assert len(times.tried) == 1 and not (tmp_path / "cache").exists()


def test_nothing_is_measured_for_short_runs_or_where_nothing_is_open(times):
    assert choose(steps=WORTHWHILE_STEPS - 1) == BESIDE
    assert choose(kernels="stock", overlap="off") == STOCK
    assert choose(deterministic=True) == BESIDE
    assert not times.tried


def test_nothing_is_measured_for_what_cannot_be_captured(times, monkeypatch):
    monkeypatch.setattr(cd.MFEF, "capturable", False)
    assert choose() == STOCK and not times.tried


@pytest.mark.parametrize("content", ["", "{}", '{"chosen": {"kernels": "other"}}', '{"chosen": {"speed": 1}}'])
def test_a_damaged_file_is_measured_anew(times, tmp_path, content):
    times.of[FUSED] = 2.0, 3.0
    choose()
    (file,) = (tmp_path / "cache" / "codistill" / "executions").iterdir()
    whole = json.loads(file.read_text())
    assert whole["chosen"] == {"kernels": "fused", "compiled": False, "overlap": True}
    stock = {"kernels": "stock", "compiled": False, "overlap": True, "milliseconds": 9.0, "loss": 3.0}
    assert whole["measured"][0] == stock
    file.write_text(content)
    tuning.CHOSEN.clear()  # as another process would find it
    assert choose() == FUSED and len(times.tried) == 6
    assert json.loads(file.read_text()) == whole


def test_a_cache_folder_that_cannot_be_written_is_said_and_survived(times, tmp_path, monkeypatch, capsys):
    times.of[FUSED] = 2.0, 3.0
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose() == FUSED
    assert "what was measured is not kept for later runs" in capsys.readouterr().err
    assert choose() == FUSED and len(times.tried) == 3
    tuning.CHOSEN.clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert choose() == FUSED
    assert "set XDG_CACHE_HOME to a folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [cd.MFEF, cd.KDCL])
@pytest.mark.parametrize("runs", [1, 2])
def test_a_trial_trains_copies_in_captured_steps(gpu, kind, runs, monkeypatch):
    monkeypatch.setattr(tuning, "ROUND_SECONDS", 0.001)
    method = tiny.method(kind)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    losses = []
    for execution in choices(config(kind, kernels="stock").train, CUDA, runs, 1):
        replays = gpu.replays
        found = trial(method, config(kind, kernels="stock"), resident(), AUGMENTATION, runs, execution)
        assert gpu.replays > replays and found.milliseconds > 0
        losses.append(found.loss)
    assert len(losses) == 2 and losses[0] == losses[1]
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert method.cohort.streams == []


def test_a_training_that_is_tuned_ends_as_one_that_is_told(monkeypatch, tiny_registered, tmp_path, capsys):
    colours = str(tiny.write_npz(tmp_path / "colours.npz", tiny.data()))
    monkeypatch.setattr(tuning, "WORTHWHILE_STEPS", 1)
    monkeypatch.setattr(tuning, "ROUND_SECONDS", 0.001)
    flags = ("--device", "cuda", "--kernels", "stock", "--seeds", "0", "1")
    assert run_here(arguments(colours, tmp_path / "told", *flags, "--overlap", "off")) == 0
    assert not os.path.exists(tmp_path / "cache")
    assert run_here(arguments(colours, tmp_path / "tuned", *flags)) == 0
    assert capsys.readouterr().err.count("measuring which way to compute a step") == 1
    for seed in ("seed0", "seed1"):
        told, tuned = (cd.Run(tmp_path / each / seed) for each in ("told", "tuned"))
        assert end_state(tuned.path)[0] != "" and told.summary["execution"]["overlap"] is False
        assert tuned.summary["execution"] | {"overlap": False} == told.summary["execution"]
        for one, other in zip(told.metrics(), tuned.metrics(), strict=True):
            assert one["train"] == other["train"] and one["test"] == other["test"]
