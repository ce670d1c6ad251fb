"""Training with everything that augmentation offers: resumed, captured beside other runs, and on several ranks."""

import signal

import pytest
import torch

import codistill as cd
from codistill.core.randomness import seed_draws
from codistill.data import augment
from codistill.data.augment import Augmentation, DeviceImages
from codistill.data.colour import recolour
from codistill.settings.augment import AugmentSettings
from codistill.training.capture import make_fleet
from codistill.training.ranks import ALONE, Ranks
from codistill.training.resume import resume
from codistill.training.step import make_step

from .. import tiny
from ..faults.running import arguments, at_step, end_state, run_here
from .rank_program import forked
from .test_ranks import DoubleImages, without_batch_statistics

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")
CPU = torch.device("cpu")
ALL = {
    "auto_augment": "randaugment",
    "resized_crop": 0.5,
    "color_jitter": 0.3,
    "random_erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "sampling": "balanced",
}
FLAGS = [part for key, value in ALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
BALANCED = [*FLAGS[:-2], "--class-weights", "balanced", "--method.views-per-student"]


def augmentation(**settings) -> Augmentation:
    transforms = AugmentSettings(**(ALL | settings)).transforms(tiny.data())
    return Augmentation(padding=1, transforms=transforms)


@pytest.mark.parametrize(
    ("more", "step"),
    [
        pytest.param(FLAGS, 2, id="sampling", marks=pytest.mark.slow),
        pytest.param(BALANCED, 6, id="weights and views"),
        pytest.param(["--sampling", "class-pairs"], 2, id="pairs"),
    ],
)
def test_an_augmented_run_resumes_bit_for_bit(tmp_path, more, step):
    colours = str(tiny.write_npz(tmp_path / "colours.npz", tiny.data(train=20, test=9)))
    assert run_here(arguments(colours, tmp_path / "whole", *more)) == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(signal.SIGTERM))
        assert run_here(arguments(colours, tmp_path / "broken", *more)) == 143
    resume(tmp_path / "broken", show=False)
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")
    assert cd.Run(tmp_path / "whole").config.augment != AugmentSettings()


@pytest.mark.slow
def test_the_same_images_without_augmentation_are_another_run(tmp_path):
    colours = str(tiny.write_npz(tmp_path / "colours.npz", tiny.data(train=20, test=9)))
    ends = []
    for name, more in (("plain", []), ("off", ["--mixup", "0", "--auto-augment", "none"]), ("all", FLAGS)):
        assert run_here(arguments(colours, tmp_path / name, *more)) == 0
        ends.append(end_state(tmp_path / name)[0])
    assert ends[0] == ends[1] != ends[2]


def ends_of_steps(name: str, ranks: Ranks) -> dict:
    method = without_batch_statistics(name).double()
    data, chosen = tiny.data(), augmentation()
    images = DoubleImages(data.train, data.statistics, CPU)
    step = make_step(method, images, chosen, cd.TrainSettings(), ranks=ranks)
    plan = images.epoch(0, 0, chosen, method.views)
    for start, stop in ((0, 8), (8, 15)):
        step(plan.part(start, stop), torch.tensor(0.5, dtype=torch.float64))
    return {"state": method.state_dict(), "terms": step.sums.means()}


def test_the_partner_of_an_image_is_the_same_on_several_ranks(tmp_path):
    def work():
        with Ranks.from_environment() as ranks:
            torch.save({name: ends_of_steps(name, ranks) for name in ("dml", "pcl")}, tmp_path / f"{ranks.number}.pt")
        return 0

    assert forked(work) == [0, 0]
    for name in ("dml", "pcl"):
        alone = ends_of_steps(name, ALONE)
        for end in (torch.load(tmp_path / f"{number}.pt")[name] for number in range(2)):
            # Sums in another order; in float64 but the augmentation, which is the same.
            torch.testing.assert_close(end["state"], alone["state"], rtol=1e-9, atol=1e-12)
            assert end["terms"] == pytest.approx(alone["terms"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.gpu
def test_captured_steps_of_augmented_runs_beside_a_plain_one_equal_plain_steps():
    device, data = torch.device("cuda"), tiny.data()
    kinds = [augmentation(), Augmentation(padding=1)]

    def members():
        found = []
        for seed, each in enumerate(kinds):
            method = tiny.method(cd.DML, seed=seed, views_per_student=seed == 0)
            images = DeviceImages(data.train, data.statistics, device)
            found.append(make_step(method, images, each, tiny.settings()))
        return found

    plain, fast = members(), members()
    fleet = make_fleet(fast)
    for number in range(5):  # three plain ones, one that is captured, one replay
        progress = torch.tensor(number / 5, device=device)
        batches = [
            member.images.epoch(seed, number, member.augmentation, member.method.views).part(0, 8)
            for seed, member in enumerate(fast)
        ]
        for member, batch, seed in zip(plain, batches, range(2), strict=True):
            seed_draws(seed, device)
            member(batch, progress)
        fleet(batches, progress, range(2))
    for one, other in zip(plain, fast, strict=True):
        state = other.method.state_dict()
        for key, tensor in one.method.state_dict().items():
            torch.testing.assert_close(tensor, state[key], rtol=1e-5, atol=1e-6)


def test_no_tensor_is_read_by_the_host_in_a_dense_step(monkeypatch):
    reads = tiny.HostReads()
    monkeypatch.setattr(augment, "recolour", lambda *given: recolour(*given, dense=True))
    chosen, data = augmentation(sampling="shuffled", class_weights="balanced"), tiny.data()
    images = DeviceImages(data.train, data.statistics, CPU)
    images.tables(chosen)
    plan = images.epoch(0, 0, chosen, 2)
    with reads:
        dense = images.augmented(plan.part(0, 8), chosen)
    monkeypatch.undo()
    few = images.augmented(plan.part(0, 8), chosen)
    assert not reads.found
    assert all(map(torch.equal, dense, few))
