"""Two processes do the step of one, and what would silently be something else is refused."""

import dataclasses

import pytest
import torch
from torch import nn

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.networks import Network, PooledLinear
from codistill.settings.config import default_config
from codistill.training.fleet import train_fleet
from codistill.training.optim import make_optimizer, momentum_buffers
from codistill.training.ranks import ALONE, Ranks
from codistill.training.step import TrainStep
from codistill.training.train import train_from_config

from .. import tiny

CPU = torch.device("cpu")
CROPS = Augmentation(padding=1)
METHODS = {
    "dml": (cd.DML, {"update": "alternating", "shared_stages": 0}),
    "pcl": (cd.PCL, {"shared_stages": 1}),
    "kdcl": (cd.KDCL, {"variant": "naive"}),
}


def plain_student():
    """A network without batch normalisation, whose gradients are means over the batch."""
    stages = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), nn.Sequential(nn.Conv2d(4, 5, 3), nn.Tanh())]
    return Network(stages, PooledLinear(5, 3), (4, 5))


def after_steps(name, sizes, ranks):
    """All that a method's state and its optimiser's hold, and the mean terms, after a step for each batch size."""
    torch.manual_seed(0)
    kind, settings = METHODS[name]
    students = [plain_student(), plain_student()]
    method = kind(students, 3, kind.Settings(**settings), image_size=(8, 8))
    data = tiny.data()
    images = DeviceImages(data.train, data.statistics, CPU)
    optimizer = make_optimizer(method, 0.1, 0.9, True, 1e-4)
    step = TrainStep(method, images, CROPS, optimizer, ranks=ranks)
    plan, start = epoch_indices(len(images), 0, 0, CROPS, CPU, method.views), 0
    for size in sizes:
        step(plan.part(start, start + size), torch.tensor(0.5))
        start += size
    return {"state": method.state_dict(), "momentum": momentum_buffers(optimizer), "terms": step.sums.means()}


def write_steps(ranks, begun, folder, sizes):
    results = {name: after_steps(name, sizes, ranks) for name in METHODS}
    torch.save(results, folder / f"rank{ranks.number}.pt")


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """What two processes have after steps of 8, 7 and 5 images: their parts are of 4 and 4, 3 and 4, 2 and 3."""
    folder = tmp_path_factory.mktemp("steps")
    launch(write_steps, (folder, (8, 7, 5)), folder, CPU, processes=2, restarts=0)
    return [torch.load(folder / f"rank{number}.pt") for number in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_both_ranks_have_the_same_bits(on_two, name):
    first, second = (each[name] for each in on_two)
    assert all(map(torch.equal, first["state"].values(), second["state"].values()))
    assert all(map(torch.equal, first["momentum"], second["momentum"]))
    assert first["terms"] == second["terms"]


@pytest.mark.parametrize("name", METHODS)
def test_the_steps_are_those_of_one_process_on_whole_batches(on_two, name):
    alone = after_steps(name, (8, 7, 5), ALONE)
    torch.testing.assert_close(on_two[0][name]["state"], alone["state"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(on_two[0][name]["momentum"], alone["momentum"], rtol=1e-4, atol=1e-6)
    assert on_two[0][name]["terms"] == pytest.approx(alone["terms"], rel=1e-4)


@pytest.mark.parametrize("size", [6, 7, 8])
def test_parts_are_contiguous_and_differ_by_an_image_at_most(size):
    batch = epoch_indices(size, 0, 0, CROPS, CPU, views=2)
    parts = [Ranks(number, 3).part(batch) for number in range(3)]
    assert torch.equal(torch.cat([each.image for each in parts], dim=1), batch.image)
    assert torch.equal(torch.cat([each.mirror for each in parts], dim=1), batch.mirror)
    sizes = [each.image.shape[1] for each in parts]
    assert max(sizes) - min(sizes) <= 1


def config(name="mfef", networks=("resnet20", "resnet20"), **settings):
    train = cd.TrainSettings(**({"epochs": 1, "batch_size": 8, "processes": 2} | settings))
    return dataclasses.replace(default_config(name), networks=networks, data="digits", train=train)


def refused(config, words, out, **more):
    with pytest.raises(UsageError, match=words):
        train_from_config(config, out, show=False, **more)
    assert not out.exists()


def test_a_method_that_needs_the_whole_batch_is_refused(tmp_path):
    refused(config("kdcl"), "kdcl with method.variant general .* --processes 1", tmp_path / "run")


def test_devices_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(config(device="auto"), "processes is 2, but this machine has 1 CUDA dev.* --device cpu", tmp_path / "run")
    refused(config(device="cuda:0"), "cuda:0: 2 processes use a GPU each", tmp_path / "run")


def test_no_part_may_have_less_than_two_images():
    with pytest.raises(UsageError, match="batch_size is 8; 5 processes need at least 10"):
        config(processes=5)


def test_a_last_batch_that_is_too_small_is_refused(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(
        UsageError, match="last batch of 27 images would have 3, too few for 2 processes: set drop_last"
    ):
        train_on_processes(config(train_limit=27, device="cpu"), out, {}, show=False, max_restarts=0)
    assert not out.exists()


def test_what_is_for_one_process_is_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match="side by side share one process"):
        train_fleet([config(seed=0), config(seed=1)], [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UsageError, match="only a run that a recipe or a command line describes"):
        cd.train(tiny.method(), tiny.data(), out=tmp_path / "run", settings=tiny.settings(processes=2))
    refused(config(device="cpu"), "max_restarts is -1", tmp_path / "run", max_restarts=-1)
    given = ["train", "mfef", "--networks", "resnet20", "resnet20", "--data", "digits", "--processes", "2"]
    assert main([*given, "--verify-resume", "--out", str(tmp_path / "run")]) == 2
    assert "verify_resume looks at one process" in capsys.readouterr().err
    assert main(["bench", "mfef", "--networks", "resnet20", "resnet20", "--processes", "2"]) == 2
    assert "bench measures one process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
