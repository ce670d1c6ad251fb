"""Augmentation on the device against the slow way, one image after the other with numpy."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from codistill.core.randomness import generator
from codistill.data import Split, dataset
from codistill.data.augment import Augmentation, BatchIndices, DeviceImages, epoch_indices, seeded_order

from .. import tiny

CPU = torch.device("cpu")
STATISTICS = ((0.3, 0.5, 0.6), (0.2, 0.25, 0.3))
MODES = ("zeros", "reflect")


def random_split(count: int, height: int, width: int) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8), rng.integers(0, 9, count))


def slowly(split: Split, batch: BatchIndices, augmentation: Augmentation) -> np.ndarray:
    """Pad, crop, flip and normalise each image by itself, in float64."""
    height, width = split.images.shape[1:3]
    border = (augmentation.padding, augmentation.padding)
    mode = {"zeros": "constant", "reflect": "reflect"}[augmentation.padding_mode]
    mean, std = map(np.array, STATISTICS)
    done = []
    for image, top, left, mirror in zip(*(table.tolist() for table in batch.tables()), strict=True):
        padded = np.pad(split.images[image], (border, border, (0, 0)), mode=mode)
        crop = padded[top : top + height, left : left + width]
        crop = crop[:, ::-1] if mirror else crop
        done.append(((crop / 255 - mean) / std).transpose(2, 0, 1))
    return np.stack(done)


def every_offset(padding: int, images: int) -> BatchIndices:
    """Each offset with and without a flip; the images in turn."""
    steps = range(2 * padding + 1)
    top, left, mirror = map(torch.tensor, zip(*itertools.product(steps, steps, (False, True)), strict=True))
    return BatchIndices(torch.arange(len(top)) % images, top, left, mirror)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 9), (9, 5)])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_equals_the_slow_way_for_every_offset(height, width, padding, mode):
    split = random_split(7, height, width)
    augmentation = Augmentation(padding=padding, padding_mode=mode)
    batch = every_offset(padding, len(split))
    images, labels = DeviceImages(split, STATISTICS, CPU).augmented(batch, augmentation)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    np.testing.assert_allclose(images.numpy(), slowly(split, batch, augmentation), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(labels.numpy(), split.labels[batch.image.numpy()])


@hypothesis_settings(deadline=None, max_examples=40, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    padding=st.integers(0, 15),
    mode=st.sampled_from(MODES),
    flip=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_equals_the_slow_way_for_any_plan(size, padding, mode, flip, seed):
    if mode == "reflect":
        padding %= min(size)
    split = random_split(5, *size)
    augmentation = Augmentation(padding=padding, padding_mode=mode, flip=flip)
    plan = epoch_indices(5, seed, 0, augmentation, CPU)
    images, _ = DeviceImages(split, STATISTICS, CPU).augmented(plan, augmentation)
    np.testing.assert_allclose(images.numpy(), slowly(split, plan, augmentation), rtol=0, atol=1e-5)


def test_padding_is_black_and_not_grey():
    # Black before normalisation: 0 of 255, not the mean.
    white = Split(np.full((1, 4, 4, 3), 255, np.uint8), np.zeros(1, np.int64))
    batch = BatchIndices(torch.tensor([0]), torch.tensor([0]), torch.tensor([2]), torch.tensor([False]))
    images, _ = DeviceImages(white, STATISTICS, CPU).augmented(batch, Augmentation(padding=2))
    mean, std = map(torch.tensor, STATISTICS)
    black, bright = -mean / std, (1 - mean) / std
    torch.testing.assert_close(images[0, :, :2], black[:, None, None].expand(3, 2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(images[0, :, 2:], bright[:, None, None].expand(3, 2, 4), rtol=0, atol=1e-5)


def test_nothing_to_augment_leaves_the_images_as_they_are():
    split = random_split(11, 6, 7)
    images = DeviceImages(split, STATISTICS, CPU)
    nothing = Augmentation(padding=0, flip=False)
    plan = epoch_indices(11, 3, 0, nothing, CPU)
    assert not plan.top.any() and not plan.left.any() and not plan.mirror.any()
    augmented, labels = images.augmented(plan, nothing)
    plain, in_order = images.batch(0, 11)
    assert torch.equal(augmented, plain[plan.image]) and torch.equal(labels, in_order[plan.image])


def test_normalisation_of_every_pixel_value():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    split = Split(np.repeat(values, 3, axis=3), np.zeros(1, np.int64))
    pixels, _ = DeviceImages(split, STATISTICS, CPU).batch(0, 1)
    expected = (np.arange(256).reshape(16, 16) / 255 - np.reshape(STATISTICS[0], (3, 1, 1))) / np.reshape(
        STATISTICS[1], (3, 1, 1)
    )
    np.testing.assert_allclose(pixels[0].numpy(), expected, rtol=0, atol=1e-6)


def test_batch_gives_a_range_in_order_and_stops_at_the_end():
    split = random_split(10, 4, 4)
    images = DeviceImages(split, STATISTICS, CPU)
    assert len(images) == 10
    pixels, labels = images.batch(8, 20)
    whole, _ = images.batch(0, 10)
    assert torch.equal(pixels, whole[8:]) and labels.tolist() == split.labels[8:].tolist()
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_the_digits_are_normalised_by_their_own_statistics():
    data = dataset("digits")
    pixels, _ = DeviceImages(data.train, data.statistics, CPU).batch(0, len(data.train))
    wide = pixels.double()
    torch.testing.assert_close(wide.mean(dim=(0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(wide.std(dim=(0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5)


def test_augmenting_reads_nothing_back():
    images = DeviceImages(random_split(6, 8, 8), STATISTICS, CPU)
    for mode in MODES:
        augmentation = Augmentation(padding=2, padding_mode=mode)
        plan = epoch_indices(6, 0, 0, augmentation, CPU)
        with tiny.HostReads() as reads:
            images.augmented(plan.part(1, 4), augmentation)
        assert reads.found == []


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_a_read_would_be_found(read):
    with tiny.HostReads() as reads:
        read(torch.arange(3.0))
    assert len(reads.found) == 1


def same(one: BatchIndices, other: BatchIndices) -> bool:
    return all(map(torch.equal, one.tables(), other.tables()))


def test_a_plan_is_a_pure_function_of_seed_and_epoch():
    augmentation = Augmentation()
    plan = epoch_indices(1000, 7, 3, augmentation, CPU)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    torch.set_num_threads(2)
    np.random.seed(5)
    assert same(epoch_indices(1000, 7, 3, augmentation, CPU), plan)
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(epoch_indices(1000, 7, 3, augmentation, CPU)))
    thread.start()
    thread.join()
    assert same(elsewhere[0], plan)
    torch.set_rng_state(state)
    epoch_indices(1000, 8, 3, augmentation, CPU)
    assert torch.equal(torch.get_rng_state(), state)  # and takes nothing from the program's own random numbers


def test_each_seed_and_each_epoch_has_a_plan_of_its_own():
    augmentation = Augmentation()
    plans = {
        (seed, epoch): epoch_indices(500, seed, epoch, augmentation, CPU) for seed in (0, 1, 2) for epoch in range(3)
    }
    for one, other in itertools.combinations(plans, 2):
        for first, second in zip(plans[one].tables(), plans[other].tables(), strict=True):
            assert not torch.equal(first, second), (one, other)


@pytest.mark.parametrize("padding", [1, 4])
def test_order_offsets_and_flips_are_fair(padding):
    count, places = 20_000, 2 * padding + 1
    plan = epoch_indices(count, 0, 0, Augmentation(padding=padding), CPU)
    assert torch.equal(plan.image.sort().values, torch.arange(count))
    assert not torch.equal(plan.image, torch.arange(count))
    for offsets in (plan.top, plan.left):
        found = torch.bincount(offsets, minlength=places)
        assert len(found) == places and int(offsets.min()) == 0
        expected, spread = count / places, (count / places * (1 - 1 / places)) ** 0.5
        assert (found - expected).abs().max() < 5 * spread
    assert abs(int(plan.mirror.sum()) - count / 2) < 5 * (count / 4) ** 0.5
    drawn = torch.stack([plan.top, plan.left, plan.mirror, plan.image]).double()
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 5 / count**0.5


def test_parts_of_a_plan_are_its_steps():
    plan = epoch_indices(10, 0, 0, Augmentation(), CPU)
    parts = [plan.part(start, start + 4) for start in (0, 4, 8)]
    assert [len(part.image) for part in parts] == [4, 4, 2]
    assert same(
        BatchIndices(*(torch.cat(column) for column in zip(*(part.tables() for part in parts), strict=True))), plan
    )


@hypothesis_settings(deadline=None, max_examples=30, derandomize=True)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**63 - 1))
def test_the_seeded_order_is_a_permutation_that_the_seed_fixes(count, seed):
    order = seeded_order(count, seed)
    assert sorted(order.tolist()) == list(range(count))
    assert torch.equal(seeded_order(count, seed), order)


def test_seeded_orders_differ_from_each_other_and_from_the_epochs():
    orders = [seeded_order(200, seed) for seed in range(4)]
    orders += [epoch_indices(200, 0, epoch, Augmentation(), CPU).image for epoch in range(2)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(orders, 2))


def test_a_generator_depends_on_the_seed_and_on_every_part_of_its_stream():
    streams = [(0, 0), (1, 0), (0, 1, 0), (0, 1, 1), (1, 1, 0), (2**63 - 1, 0), (2**63 - 2, 0)]
    drawn = {stream: int(torch.randint(2**62, (), generator=generator(*stream))) for stream in streams}
    assert len(set(drawn.values())) == len(streams)
    assert drawn == {stream: int(torch.randint(2**62, (), generator=generator(*stream))) for stream in streams}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_same_images(mode):
    split = random_split(50, 9, 7)
    augmentation = Augmentation(padding=3, padding_mode=mode)
    plans = [epoch_indices(50, 1, 2, augmentation, device) for device in (CPU, torch.device("cuda"))]
    assert same(plans[0], BatchIndices(*(table.cpu() for table in plans[1].tables())))
    images = [
        DeviceImages(split, STATISTICS, plan.image.device).augmented(plan, augmentation)[0].cpu() for plan in plans
    ]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-6)
