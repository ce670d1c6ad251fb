"""Two ranks do the step of one process, and what would be another experiment on ranks is refused."""

import dataclasses
import re

import pytest
import torch
from torch import nn

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.networks import Network, PooledLinear
from codistill.settings.config import ExecutionSettings, default_config
from codistill.training.optim import optimizer_tensors
from codistill.training.prepare import check_parts, teaching_of
from codistill.training.ranks import ALONE, Ranks
from codistill.training.step import make_step

from .. import tiny
from ..faults.running import arguments
from .rank_program import forked, program

CPU = torch.device("cpu")
CROPS = Augmentation(padding=1)
METHODS = {
    "dml": (cd.DML, {"update": "alternating", "shared_stages": 0}),
    "pcl": (cd.PCL, {"shared_stages": 1}),
    "kdcl": (cd.KDCL, {"variant": "naive"}),
}


class DoubleImages(DeviceImages):
    """Images in float64, so that sums in another order differ by 1e-16 only."""

    def augmented(self, *given):
        images, labels = super().augmented(*given)
        return images.double(), labels


def plain_student():
    """A network without batch normalisation, whose gradients are means over the batch."""
    stages = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), nn.Sequential(nn.Conv2d(4, 5, 3), nn.Tanh())]
    return Network(stages, PooledLinear(5, 3), (4, 5))


def after_steps(method, ranks):
    """All that a method's state and its optimiser's hold, and the mean terms, after steps of 8, 7 and 5 images."""
    method.double()
    data = tiny.data()
    images = DoubleImages(data.train, data.statistics, CPU)
    step = make_step(method, images, CROPS, cd.TrainSettings(), ranks=ranks)
    plan = epoch_indices(len(images), 0, 0, CROPS, CPU, method.views)
    for start, stop in ((0, 8), (8, 15), (15, 20)):
        step(plan.part(start, stop), torch.tensor(0.5, dtype=torch.float64))
    return {"state": method.state_dict(), "momentum": optimizer_tensors(step.optimizer), "terms": step.sums.means()}


def without_batch_statistics(name):
    torch.manual_seed(0)
    kind, settings = METHODS[name]
    return kind([plain_student(), plain_student()], 3, kind.Settings(**settings), image_size=(8, 8))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """The ends of both ranks; their parts are of 4 and 4, 3 and 4, 2 and 3 images."""
    folder = tmp_path_factory.mktemp("steps")

    def work():
        with Ranks.from_environment() as ranks:
            ends = {name: after_steps(without_batch_statistics(name), ranks) for name in METHODS}
            ends["batch statistics"] = after_steps(tiny.method(), ranks)
            torch.save(ends, folder / f"rank{ranks.number}.pt")
        return 0

    assert forked(work) == [0, 0]
    return [torch.load(folder / f"rank{number}.pt") for number in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_the_steps_are_those_of_one_process_on_whole_batches(on_two, name):
    alone = after_steps(without_batch_statistics(name), ALONE)
    for end in on_two:
        # Sums in another order; everything is in float64 but the augmentation, which is the same.
        torch.testing.assert_close(end[name]["state"], alone["state"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(end[name]["momentum"], alone["momentum"], rtol=1e-9, atol=1e-12)
        assert end[name]["terms"] == pytest.approx(alone["terms"], rel=1e-5)  # which are summed in float32


def test_ranks_have_the_same_weights_and_batch_statistics_of_their_own(on_two):
    first, second = (end["batch statistics"]["state"] for end in on_two)
    own = [name for name in first if "running" in name]
    assert own and not any(torch.equal(first[name], second[name]) for name in own)
    assert all(torch.equal(first[name], second[name]) for name in first.keys() - set(own))


@pytest.mark.parametrize("size", [6, 7, 8])
def test_parts_are_contiguous_and_differ_by_an_image_at_most(size):
    batch = epoch_indices(size, 0, 0, CROPS, CPU, views=2)
    parts = [Ranks(number, 3).part(batch) for number in range(3)]
    assert torch.equal(torch.cat([each.image for each in parts], dim=1), batch.image)
    assert torch.equal(torch.cat([each.mirror for each in parts], dim=1), batch.mirror)
    sizes = [each.image.shape[1] for each in parts]
    assert max(sizes) - min(sizes) <= 1


def config(name="mfef", **settings):
    train = cd.TrainSettings(**({"epochs": 1, "batch_size": 8} | settings))
    return dataclasses.replace(default_config(name), train=train)


@pytest.mark.parametrize(
    ("config", "ranks", "words"),
    [
        (config("cd"), 2, "cd with method.guided_weight above 0 .* omit torchrun"),
        (config("kdcl"), 2, "kdcl with method.variant general .* omit torchrun"),
        (config(), 5, "batch_size is 8; 5 ranks need at least 10"),
        (config(batch_size=128), 14, "there are 27 training images; 14 ranks need at least 28, two images each"),
        (config(), 2, "last batch of 27 images would have 3, too few for 2 ranks: set drop_last"),
    ],
)
def test_what_would_be_another_experiment_is_refused(config, ranks, words):
    with pytest.raises(UsageError, match=words):
        check_parts(config, 27, Ranks(0, ranks))


def test_a_teacher_attached_in_python_needs_the_full_batch_as_a_named_one_does():
    method = tiny.method(cd.DML)
    cd.WithTeacher(method, tiny.network(3), kl="dist")
    settings = dataclasses.replace(config("dml"), teaching=teaching_of(method))
    with pytest.raises(UsageError, match="dml with teacher_kl dist needs the full batch"):
        check_parts(settings, 28, Ranks(0, 2), method)


def test_batches_that_leave_two_images_to_each_rank_pass():
    check_parts(config(), 28, Ranks(0, 2))
    plain = dataclasses.replace(config("cd"), method=cd.CD.Settings(guided_weight=0.0))
    check_parts(plain, 28, Ranks(0, 2))
    check_parts(config(drop_last=True), 27, Ranks(0, 2))
    check_parts(config(), 24, Ranks(0, 4))


@pytest.fixture
def under_torchrun(monkeypatch):
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


ONE_PROCESS = (
    "train mfef --networks resnet20 resnet20 --data digits --seeds 0 1",
    "train mfef --networks resnet20 resnet20 --data digits --verify-resume",
    "bench mfef --networks resnet20 resnet20",
    "sweep spec.toml --out sweep",
    "export run",
    "evaluate run",
    "predict run image.png",
    "list",
)


@pytest.mark.parametrize("line", ONE_PROCESS)
def test_what_one_process_does_is_refused_in_one_line(under_torchrun, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"codistill: error: .*one process only: start it without torchrun\n", error)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(line.split()) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "1"), ("LOCAL_RANK", "")])
def test_what_is_not_several_ranks_is_an_ordinary_run(under_torchrun, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with Ranks.from_environment() as ranks:
        assert ranks is ALONE


@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_gpus_are_counted(monkeypatch, tmp_path, device, capfd):
    def work():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with Ranks.from_environment() as ranks:
            try:
                ranks.choose_device(ExecutionSettings(device=device))
            except UsageError as error:
                (tmp_path / "error").write_text(f"{ranks.number} {error}")
                return error.exit_status
            except SystemExit as end:
                return end.code
        return 0

    assert forked(work) == [2, 2]
    assert re.match(
        rf"0 device {device}: 2 ranks on .* need a GPU each of its 1: use", (tmp_path / "error").read_text()
    )


def test_patience_ends_all_ranks_after_the_same_epoch(tmp_path):
    colours = tiny.write_npz(tmp_path / "colours.npz", tiny.data(train=20, test=21))
    more = ("--lr", "1e-9", "--epochs", "9", "--validation", "4", "--patience", "2")  # hardly anything is learned
    assert forked(lambda: program(arguments(str(colours), tmp_path / "run", *more, method="dml"))) == [0, 0]
    run = cd.Run(tmp_path / "run")
    assert run.finished and len(run.metrics()) == run.summary["stopped_early"] == run.summary["best_epoch"] + 2 < 9
