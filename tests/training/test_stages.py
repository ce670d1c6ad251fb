"""Runs of two stages: an initialisation with other losses and other trained parameters, then the main epochs."""

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import codistill as cd
from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.methods.cohort import Outputs
from codistill.methods.losses import squared_distance
from codistill.methods.offline import TwoStageMethod, TwoStageSettings
from codistill.methods.terms import cross_entropy_terms
from codistill.networks import PooledLinear
from codistill.training import loop
from codistill.training import trainer as trainers
from codistill.training.capture import make_fleet
from codistill.training.optim import optimizer_tensors
from codistill.training.resume import resume

from .. import tiny
from ..faults.running import arguments, at_step, end_state, run_here

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages", "follow")
EPOCHS = ("--epochs", "4")  # of 3 steps, of which the first two are the initialisation


@dataclass(frozen=True, kw_only=True)
class FollowSettings(TwoStageSettings):
    initial_share: float = 0.5


class Follow(TwoStageMethod):
    """First the last maps follow the teacher's, then the labels teach."""

    name = "follow"
    settings: FollowSettings

    def connect(self, teacher: nn.Module) -> list[nn.Module]:
        lasts = [pairs[-1] for pairs in self.stage_pairs(teacher)]
        return [nn.Conv2d(own[0], taught[0], 1) for own, taught in lasts]

    def forward(self, images) -> Outputs:
        outputs = super().forward(images)
        pairs = enumerate(zip(self.connectors, outputs.feature_maps, strict=False))
        return replace(outputs, extras={str(index): connector(own) for index, (connector, own) in pairs})

    def initial_losses(self, outputs, labels) -> dict[str, Tensor]:
        return {
            f"hint/teacher->student{index}": 0.01 * squared_distance(each, outputs.teacher_maps[-1])
            for index, each in outputs.extras.items()
        }

    def losses(self, outputs, labels, progress) -> dict[str, Tensor]:
        terms = cross_entropy_terms(outputs.logits, labels)
        return {name: each * (1 + progress) for name, each in terms.items()}


@pytest.fixture
def follow(monkeypatch):
    monkeypatch.setitem(METHODS._entries, "follow", Follow)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(trainers, "keep_pictures", lambda *arguments: None)


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    return str(tiny.write_npz(tmp_path_factory.mktemp("stages") / "colours.npz", tiny.data(train=20, test=21)))


@pytest.fixture(scope="module")
def teacher(colours, tmp_path_factory) -> tuple[str, str]:
    out = tmp_path_factory.mktemp("teacher") / "run"
    with pytest.MonkeyPatch.context() as patch, tiny.registered():
        patch.setattr(trainers, "write_report", lambda *arguments: None)
        assert run_here(arguments(colours, out, method="independent")) == 0
    return "--teacher", str(out)


def trained(colours, out: Path, *more: str) -> cd.Run:
    assert run_here(arguments(colours, out, *EPOCHS, *more, method="follow")) == 0
    return cd.Run(out)


def terms(run: cd.Run) -> list[set[str]]:
    return [{name.partition("/")[0] for name in row["train"]} - {"loss"} for row in run.metrics()]


def test_patience_and_the_best_epoch_count_from_the_end_of_the_initialisation(colours, teacher, tmp_path):
    more = ("--epochs", "8", "--lr", "1e-9", "--validation", "4", "--patience", "2")  # nothing is learned
    run = trained(colours, tmp_path / "run", *teacher, *more)
    assert terms(run) == [{"hint"}] * 4 + [{"ce"}] * 3
    # The first epoch that counts stays the best, although those before it have the same error.
    assert (run.summary["best_epoch"], run.summary["stopped_early"]) == (5, 7)
    assert [each["epoch"] for each in run.checkpoints.entries() if each.get("best")] == [5]


def test_each_stage_has_its_own_terms(colours, teacher, tmp_path):
    run = trained(colours, tmp_path / "run", *teacher)
    assert terms(run) == [{"hint"}, {"hint"}, {"ce"}, {"ce"}]


@pytest.mark.parametrize(
    ("epochs", "share", "initial"),
    [(4, 0.5, 2), (3, 0.01, 1), (3, 0.99, 2), (1, 0.5, 0), (300, 30 / 270, 33), (9, 0, 0)],
)
def test_a_share_of_the_epochs(epochs, share, initial):
    assert tiny.method(Follow, initial_share=share).initial_epochs(epochs) == initial


def test_the_initialisation_trains_its_parameters_alone(colours, teacher, tmp_path, monkeypatch):
    seen: dict[int, dict[str, Tensor]] = {}
    momentum: dict[int, float] = {}

    def look(number: int):
        def at(step) -> None:
            seen[number] = {name: each.detach().clone() for name, each in step.method.named_parameters()}
            momentum[number] = sum(float(each.abs().sum()) for each in optimizer_tensors(step.optimizer))

        return at

    for number in (1, 6, 7, 12):  # before these steps
        at_step(monkeypatch, number, look(number))
    trained(colours, tmp_path / "run", *teacher)
    for earlier, later, moves in ((1, 6, ("stages", "connectors")), (7, 12, ("stages", "head"))):
        for name, before in seen[earlier].items():
            assert torch.equal(before, seen[later][name]) == (not any(part in name for part in moves)), name
    assert momentum[6] > 0 and momentum[7] == 0


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (2, ()),  # inside the initialisation
        (6, ("--optimizer", "adamw", "--lr", "0.001")),  # before its last step
        (7, ("--ema-decay", "0.9")),  # at the border
        (8, ("--lr", "1e-9")),  # where no epoch is better than the first that counts
    ],
)
def test_a_run_goes_on_across_the_border(colours, teacher, tmp_path, step, more):
    whole = trained(colours, tmp_path / "whole", *teacher, *more)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run_here(arguments(colours, tmp_path / "broken", *EPOCHS, *teacher, *more, method="follow")) == 143
    broken = resume(tmp_path / "broken", show=False)
    assert end_state(broken.path) == end_state(whole.path)
    assert terms(broken) == terms(whole)
    assert broken.summary["best_epoch"] == whole.summary["best_epoch"] > 2


def test_in_bf16_the_heads_stay_too(colours, teacher, tmp_path):
    run = trained(colours, tmp_path / "run", *teacher, "--precision", "bf16")
    assert terms(run) == [{"hint"}, {"hint"}, {"ce"}, {"ce"}]


def test_an_extension_does_not_move_the_border(colours, teacher, tmp_path):
    trained(colours, tmp_path / "run", *teacher)
    assert run_here(["resume", str(tmp_path / "run"), "--epochs", "8"]) == 0
    assert terms(cd.Run(tmp_path / "run")) == [{"hint"}] * 2 + [{"ce"}] * 6


def test_what_was_captured_of_the_initialisation_is_left(colours, teacher, tmp_path, monkeypatch):
    made = []

    def noted(steps):
        made.append(steps[0].method.initialising)
        return make_fleet(steps)

    monkeypatch.setattr(loop, "make_fleet", noted)
    trained(colours, tmp_path / "run", *teacher)
    assert len(made) == 2


@pytest.mark.slow
@pytest.mark.gpu
def test_captured_steps_across_the_border(colours, teacher, tmp_path):
    # Seven steps an epoch: three plain ones, then the graph; and again of the main stage.
    captured = ("--device", "cuda", "--deterministic", "-b", "3", "--epochs", "2")
    run = trained(colours, tmp_path / "alone", *teacher, *captured)
    assert terms(run) == [{"hint"}, {"ce"}]
    seeds = arguments(colours, tmp_path / "both", *EPOCHS, *teacher, *captured, method="follow")
    assert run_here([*seeds, "--seeds", "0", "1"]) == 0
    assert end_state(tmp_path / "both" / "seed0") == end_state(run.path)


def test_a_run_is_evaluated_without_its_teacher(colours, teacher, tmp_path):
    run = trained(colours, tmp_path / "run", *teacher)
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps({**config, "teacher": "/nowhere"}))
    assert run_here(["evaluate", str(run.path), "--data-dir", colours]) == 0
    assert len(cd.Run(run.path).load_method().connectors) == 0


def test_connectors_begin_as_the_seed_says(colours, teacher, tmp_path):
    first = {}
    for name in ("one", "other"):
        torch.rand(3)
        with pytest.MonkeyPatch.context() as patch:
            weights = first.setdefault(name, [])
            at_step(patch, 1, lambda step: weights.extend(each.clone() for each in step.method.connectors.parameters()))  # noqa: B023
            trained(colours, tmp_path / name, *teacher)
    assert first["one"] and all(map(torch.equal, first["one"], first["other"]))


def test_a_teacher_without_stages_is_refused():
    method, teacher = tiny.method(Follow), nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3), nn.Identity())
    with pytest.raises(
        UsageError, match="the teacher is a Sequential without stages, but this method needs their maps"
    ):
        cd.WithTeacher(method, teacher)


def test_stages_are_paired_from_the_last_one_back():
    pairs, _ = tiny.method(Follow).stage_pairs(cd.network("resnet18", 3))
    assert pairs == [((4, 8, 8), (128, 4, 4)), ((6, 8, 8), (256, 2, 2)), ((8, 4, 4), (512, 1, 1))]


def test_a_network_of_one_stage_is_refused():
    flat = cd.Network([nn.Conv2d(3, 4, 1)], PooledLinear(4, 3), [4])
    with pytest.raises(UsageError, match="follow needs networks of at least 2 stages, but Network has 1"):
        cd.WithTeacher(tiny.method(Follow), flat)


def test_without_losses_of_its_own_an_initialisation_is_refused():
    class Silent(cd.Method):
        def initial_epochs(self, epochs: int) -> int:
            return 1

        def losses(self, outputs, labels, progress):
            return cross_entropy_terms(outputs.logits, labels)

    with pytest.raises(UsageError, match="method Silent defines no initial_losses"):
        cd.train(tiny.method(Silent), tiny.data(), settings=tiny.settings(), show=False)
