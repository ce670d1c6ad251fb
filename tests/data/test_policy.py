"""What is drawn for the images of an epoch, and what becomes of them, against torchvision on single images."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide
from torchvision.transforms.v2 import functional as F

from codistill.core.errors import UsageError
from codistill.data import Dataset, Split
from codistill.data.augment import Augmentation, DeviceImages
from codistill.data.policy import Policy, Transforms, balanced_order, balanced_weights, paired_order
from codistill.settings.augment import AugmentSettings

CPU = torch.device("cpu")
NO_STATISTICS = ((0.0,) * 3, (1.0,) * 3)
HEIGHT, WIDTH = 20, 24


def split(count: int, height: int = HEIGHT, width: int = WIDTH) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8), np.arange(count) % 3)


def augmentation(padding: int = 0, flip: bool = False, **settings) -> Augmentation:
    own = {name: settings.pop(name) for name in ("class_weights", "sampling", "batch_size") if name in settings}
    transforms = Transforms(policy=Policy(**settings), size=(HEIGHT, WIDTH), classes=3, **own)
    return Augmentation(padding=padding, flip=flip, transforms=transforms)


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation of images whose statistics are 0 and 1."""
    return (images * 255).round().to(torch.uint8)


def augmented(data: Split, chosen: Augmentation, views: int = 1, seed: int = 0):
    """Return the indices, images and labels of an epoch as one batch."""
    images = DeviceImages(data, NO_STATISTICS, CPU)
    plan = images.epoch(seed, 0, chosen, views)
    return plan, *images.augmented(plan, chosen)


def candidates(image: torch.Tensor, wide: bool, level: int) -> dict[tuple[str, float], torch.Tensor]:
    """Return what torchvision makes of an image by each of its operations at a level."""
    kind = TrivialAugmentWide() if wide else RandAugment()
    found = {}
    for name, (strengths, signed) in kind._AUGMENTATION_SPACE.items():
        strength = strengths(31, HEIGHT, WIDTH)
        strength = 0.0 if strength is None else float(strength[level])
        for sign in (1, -1) if signed else (1,):
            found[name, sign] = kind._apply_image_or_video_transform(
                image, name, sign * strength, interpolation=InterpolationMode.NEAREST, fill={torch.Tensor: None}
            )
    return found


@pytest.mark.parametrize("level", [9, 30])
def test_randaugment_does_what_torchvision_does_to_one_image(level):
    data = split(1)
    data.images[:] = data.images * 0.6 + 60
    many = Split(data.images.repeat(400, axis=0), np.zeros(400, np.int64))
    chosen = augmentation(auto_augment="randaugment", randaugment_operations=1, randaugment_magnitude=level)
    _, images, _ = augmented(many, chosen)
    references = candidates(torch.from_numpy(data.images[0]).permute(2, 0, 1), False, level)
    counts = dict.fromkeys(references, 0)
    for image in pixels_of(images):
        far = {name: (image.int() - each.int()).abs().float() for name, each in references.items()}
        nearest = min(far, key=lambda name: far[name].mean().item())
        unlike = (far[nearest] > 1).any(dim=0).float().mean()
        # Of a turned image the pixels whose centres are halfway between two others.
        assert unlike <= (0.03 if nearest[0] in ("Rotate", "ShearX", "ShearY") else 0), nearest
        counts[nearest] += 1
    names = {name: sum(count for (each, _), count in counts.items() if each == name) for name, _ in references}
    assert all(10 <= count <= 50 for count in names.values()), names  # of 400 / 14 = 28.6
    assert all(count >= 3 for (name, _), count in counts.items())


@pytest.mark.slow
def test_trivialaugment_uses_all_levels_of_the_wide_space():
    data = split(1)
    data.images[:] = data.images * 0.6 + 60
    many = Split(data.images.repeat(150, axis=0), np.zeros(150, np.int64))
    _, images, _ = augmented(many, augmentation(auto_augment="trivialaugment"))
    image = torch.from_numpy(data.images[0]).permute(2, 0, 1)
    references = torch.stack([each for level in range(31) for each in candidates(image, True, level).values()])
    far = [(each.int() - references.int()).abs() > 1 for each in pixels_of(images)]
    unlike = [each.any(dim=1).float().mean(dim=(1, 2)) for each in far]
    assert max(each.min() for each in unlike) <= 0.03
    assert len({each.argmin().item() for each in unlike}) > 60


@pytest.mark.parametrize(("padding", "mode"), [(0, "zeros"), (3, "zeros"), (3, "reflect")])
def test_crops_and_flips_are_those_without_other_operations(padding, mode):
    # Magnitude 0 leaves an image as it is, but for its colours.
    data = split(30)
    plain = Augmentation(padding=padding, padding_mode=mode, flip=True)
    still = augmentation(padding, True, auto_augment="randaugment", randaugment_magnitude=0)
    still = dataclasses.replace(still, padding_mode=mode)
    images = DeviceImages(data, NO_STATISTICS, CPU)
    plan = images.epoch(3, 1, still, 1)
    before, after = images.epoch(3, 1, plain, 1), plan
    assert all(map(torch.equal, before.tables(), after.tables()[:4]))
    plan.drawn[still.transforms.rows["operation0"]] = 0
    plan.drawn[still.transforms.rows["operation1"]] = 0
    assert torch.equal(images.augmented(before, plain)[0], images.augmented(plan, still)[0])


def test_a_resized_crop_is_torchvisions():
    data = split(60)
    chosen = augmentation(resized_crop=0.2, flip=True)
    plan, images, _ = augmented(data, chosen)
    boxes = plan.drawn[chosen.transforms.rows["crop"]].T.int().tolist()
    areas = []
    for box, place, mirror, image in zip(boxes, plan.image, plan.mirror, pixels_of(images), strict=True):
        top, left, height, width = box
        assert top >= 0 and left >= 0 and top + height <= HEIGHT and left + width <= WIDTH
        areas.append(height * width / (HEIGHT * WIDTH))
        whole = torch.from_numpy(data.images[place]).permute(2, 0, 1)
        expected = F.resized_crop(whole, *box, [HEIGHT, WIDTH], antialias=True)
        expected = F.horizontal_flip(expected) if mirror else expected
        assert (image.int() - expected.int()).abs().max() <= 1
    assert 0.15 < min(areas) < 0.4 and 0.7 < max(areas) <= 1


def test_jitter_moves_brightness_contrast_and_saturation_by_at_most_its_strength():
    chosen = augmentation(color_jitter=0.4)
    plan, images, _ = augmented(split(200), chosen)
    rows = chosen.transforms.rows
    factors = torch.cat([plan.drawn[rows[f"factor{stage}"]] for stage in range(3)])
    orders = torch.cat([plan.drawn[rows[f"operation{stage}"]] for stage in range(3)]).T.int().tolist()
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4
    assert {tuple(sorted(each)) for each in orders} == {(1, 2, 7)} and len({tuple(each) for each in orders}) == 6
    steps = {1: F.adjust_brightness, 2: F.adjust_contrast, 7: F.adjust_saturation}
    for index in range(5):
        expected = torch.from_numpy(split(200).images[plan.image[index]]).permute(2, 0, 1)
        for number, factor in zip(orders[index], factors[:, index].tolist(), strict=True):
            expected = steps[number](expected, factor)
        assert (pixels_of(images)[index].int() - expected.int()).abs().max() <= 3  # each step rounds


def test_erasing_fills_a_rectangle_of_a_share_of_the_images_with_the_mean():
    chosen, data = augmentation(random_erasing=0.5), split(400)
    images = DeviceImages(data, ((0.5,) * 3, (0.25,) * 3), CPU)
    plan = images.epoch(0, 0, chosen, 1)
    plain, done = (images.augmented(plan, each)[0] for each in (augmentation(), chosen))
    assert done.is_contiguous(memory_format=torch.channels_last)
    boxes = plan.drawn[chosen.transforms.rows["erased"]].int().T.tolist()
    for box, before, after in zip(boxes, plain, done, strict=True):
        top, left, bottom, right = box
        before[:, top:bottom, left:right] = 0
        assert torch.equal(before, after)
    shares = [(bottom - top) * (right - left) / (HEIGHT * WIDTH) for top, left, bottom, right in boxes]
    assert 160 < sum(share > 0 for share in shares) < 240
    assert max(shares) <= 0.36 and 0 < min(share for share in shares if share) < 0.05


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.3, 0.0), (0.0, 1.0), (0.3, 1.0)])
@pytest.mark.parametrize("views", [1, 2])
def test_mixing_blends_images_and_labels_by_the_same_share(mixup, cutmix, views):
    # The share of white in an image of black and white ones is that of their class in its label.
    data = split(100)
    data.images[data.labels == 0] = 255
    data.images[data.labels > 0] = 0
    plan, images, targets = augmented(data, augmentation(mixup=mixup, cutmix=cutmix), views)
    assert targets.shape == (100, 3) and torch.allclose(targets.sum(dim=1), torch.ones(100))
    for view in images if views > 1 else [images]:
        torch.testing.assert_close(view.mean(dim=(1, 2, 3)), targets[:, 0], rtol=0, atol=1e-5)
    own = data.labels[plan.image.flatten()[:100]]
    partner = own[::-1]
    for label, other, target in zip(own, partner, targets, strict=True):
        assert all(target[index] == 0 for index in {0, 1, 2} - {label, other})
    one = images[0] if views > 1 else images
    blended = ((one > 0.01) & (one < 0.99)).any(dim=(1, 2, 3)).float().mean()
    assert blended > 0.1 if mixup else blended == 0


def test_each_view_is_drawn_by_itself_but_mixed_alike():
    chosen = augmentation(auto_augment="randaugment", random_erasing=0.5, color_jitter=0.3, mixup=1.0, cutmix=1.0)
    plan, images, _ = augmented(split(40), chosen, views=2)
    assert images.shape[:2] == (2, 40) and not torch.equal(images[0], images[1])
    for name, numbers in chosen.transforms.named(plan.drawn).items():
        assert torch.equal(numbers[:, 0], numbers[:, 1]) == (name in ("share", "blend", "pasted")), name


def test_numbers_are_a_function_of_seed_and_epoch_and_parts_do_not_move_each_other():
    whole = augmentation(auto_augment="trivialaugment", random_erasing=0.5, mixup=1.0).transforms
    fewer = augmentation(auto_augment="trivialaugment", mixup=1.0).transforms
    state = np.random.get_state()[1].copy()
    drawn = {place: whole.named(whole.draw(50, 1, *place)) for place in itertools.product((0, 1), (0, 1))}
    assert np.array_equal(np.random.get_state()[1], state)
    again, others = whole.named(whole.draw(50, 1, 1, 0)), fewer.named(fewer.draw(50, 1, 1, 0))
    assert all(torch.equal(numbers, drawn[1, 0][name]) for name, numbers in (*again.items(), *others.items()))
    for one, other in itertools.combinations(drawn.values(), 2):
        assert all(not torch.equal(one[name], other[name]) for name in one)


def test_balanced_sampling_takes_equally_many_of_each_class():
    labels = np.array([0] * 90 + [1] * 9 + [3] * 3)
    orders = [balanced_order(labels, 0, epoch) for epoch in range(3)]
    for order in orders:
        assert np.bincount(labels[order], minlength=4).tolist() == [34, 34, 0, 34]
        assert len(set(order[labels[order] == 0])) == 34  # none twice
        for small in (1, 3):
            times = np.bincount(order, minlength=len(labels))[labels == small]
            assert times.max() - times.min() <= 1
    assert len(set(np.concatenate(orders))) > 60  # other ones in each epoch
    assert not np.array_equal(orders[0], balanced_order(labels, 1, 0))
    images = DeviceImages(Split(np.zeros((102, 4, 4, 3), np.uint8), labels), NO_STATISTICS, CPU)
    part = images.subset(torch.arange(0, 102, 3))
    plan = part.epoch(0, 0, augmentation(sampling="balanced"), 1)
    assert set(plan.image.tolist()) <= set(part.positions.tolist())
    assert sorted(np.bincount(labels[plan.image], minlength=4).tolist()) == [0, 11, 11, 12]


@pytest.mark.parametrize("batch_size", [4, 6, 16])
def test_batches_by_pairs_have_two_images_of_each_class(batch_size):
    labels = np.array([0] * 40 + [1] * 9 + [3] * 3 + [4] * 2 + [7] * 7)  # 61, so that the last batch is odd
    orders = [paired_order(labels, batch_size, 0, epoch) for epoch in range(3)]
    for order in orders:
        assert len(order) == len(labels)
        batches = np.split(order, range(batch_size, len(order), batch_size))
        for batch in batches:
            counts = np.bincount(labels[batch])
            assert sum(counts % 2) == len(batch) % 2 and counts.max() <= 2 * math.ceil(len(batch) / 10)
            if len(batch) <= 10:
                assert len(set(batch.tolist())) == len(batch)
        for own in (0, 1, 7):
            times = np.bincount(order, minlength=len(labels))[labels == own]
            assert times.max() - times.min() <= 1 + (own != 0)  # an odd image waits for another round
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[0], paired_order(labels, batch_size, 0, 0))
    assert not np.array_equal(orders[0], paired_order(labels, batch_size, 1, 0))


def test_an_epoch_of_used_images_is_sampled_by_pairs():
    labels = np.arange(40) % 4
    images = DeviceImages(Split(np.zeros((40, 4, 4, 3), np.uint8), labels), NO_STATISTICS, CPU)
    part = images.subset(torch.arange(0, 40, 3))
    plan = part.epoch(0, 0, augmentation(sampling="class-pairs", batch_size=6), 1)
    assert set(plan.image.tolist()) <= set(part.positions.tolist())
    assert all(
        sorted(np.bincount(labels[plan.image[start : start + 6]], minlength=4)) == [0, 2, 2, 2] for start in (0, 6)
    )


@pytest.mark.parametrize(
    ("batch_size", "training", "line"),
    [
        (7, range(9), "batch_size is 7: use an even one"),
        (4, (0, 3, 1, 4, 2), "two training images of each class, but of c there is one: train on more images"),
        (4, (0, 1, 2), "of a, b, c there is one"),
    ],
)
def test_classes_that_cannot_be_paired_are_refused(batch_size, training, line):
    data = Dataset("own", split(9), split(6), ("a", "b", "c"))
    with pytest.raises(UsageError, match=line):
        AugmentSettings(sampling="class-pairs").transforms(data, torch.tensor(training), batch_size)


def test_balanced_weights_have_the_mean_one():
    labels = np.array([0] * 6 + [1] * 3 + [3] * 1)
    weights = balanced_weights(labels, 4)
    assert weights == (10 / 18, 10 / 9, 0.0, 10 / 3)
    assert np.mean(np.array(weights)[labels]) == pytest.approx(1)


def test_smoothing_and_weights_make_the_targets():
    data = split(9)
    _, images, targets = augmented(data, augmentation(label_smoothing=0.3, class_weights=(0.5, 1.0, 2.0)))
    own = data.labels[DeviceImages(data, NO_STATISTICS, CPU).epoch(0, 0, augmentation(), 1).image]
    expected = np.array([0.5, 1.0, 2.0])[own][:, None] * (0.7 * np.eye(3)[own] + 0.1)
    np.testing.assert_allclose(targets.numpy(), expected, rtol=0, atol=1e-6)
    plain = augmented(data, augmentation())
    assert torch.equal(images, plain[1]) and plain[2].dtype == torch.int64


def test_nothing_chosen_is_no_transform():
    data = Dataset("own", split(6), split(6), ("a", "b", "c"))
    assert AugmentSettings().transforms(data) is None
    weighted = AugmentSettings(class_weights="balanced").transforms(data, torch.tensor([0, 1, 3]))
    assert weighted.class_weights == (0.75, 1.5, 0.0)
