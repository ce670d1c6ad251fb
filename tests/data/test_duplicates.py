import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

import codistill as cd
from codistill.data.duplicates import Duplicate, duplicates, line_about

NAMES = ("a", "b")


def photos(count, seed, side=24):
    """Smooth random pictures, as photos are."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in small]
    )


def data(train, test, **more):
    splits = {name: cd.Split(images, np.arange(len(images)) % 2) for name, images in (("train", train), ("test", test))}
    return cd.Dataset("mine", splits["train"], splits["test"], NAMES, **more)


def test_equal_images_of_two_splits_are_found():
    train, test = photos(40, 0), photos(10, 1)
    test[3], test[7] = train[5], train[21]
    found = duplicates(data(train, test))
    assert found == [Duplicate("exact", ("test", place), ("train", other)) for place, other in ((3, 5), (7, 21))]
    assert duplicates(data(train, photos(10, 1))) == []


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=85)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize(
    "change",
    [
        jpeg,
        lambda image: np.clip(image.astype(int) + 9, 0, 255).astype(np.uint8),
        lambda image: np.asarray(Image.fromarray(image).resize((17, 17)).resize((24, 24))),
    ],
    ids=["compressed", "brighter", "scaled"],
)
def test_copies_that_were_changed_a_little_are_near(change):
    train, test = photos(40, 0), photos(10, 1)
    test[3] = change(train[5])
    assert duplicates(data(train, test)) == [Duplicate("near", ("test", 3), ("train", 5))]


def test_all_pairs_of_splits_are_compared():
    train, test, validation = photos(30, 0), photos(9, 1), photos(8, 2)
    test[2], validation[4], test[8] = train[1], train[6], validation[7]
    whole = dataclasses.replace(data(train, test), validation=cd.Split(validation, np.arange(8) % 2, tuple("hgfedcba")))
    found = duplicates(whole)
    assert {(each.split, each.other) for each in found} == {
        (("validation", 4), ("train", 6)),
        (("test", 2), ("train", 1)),
        (("test", 8), ("validation", 7)),
    }
    said = line_about(whole, found)
    assert said.startswith("data set mine: 1 validation images are in train, too (1 exactly: d = train 6); ")


def test_images_that_are_held_out_are_compared_with_those_that_are_trained_on():
    train = photos(30, 0)
    train[4], train[5] = train[20], train[7]
    whole = data(train, photos(9, 1))
    assert duplicates(whole) == []
    used, held_out = np.delete(np.arange(30), [4, 9, 7]), np.array([9, 4, 7])
    found = duplicates(whole, used, held_out)
    assert found == [Duplicate("exact", ("validation", place), ("train", other)) for place, other in ((4, 20), (7, 5))]


def test_uniform_images_and_single_ones_are_no_error():
    white = np.full((3, 8, 8, 3), 255, np.uint8)
    assert [each.kind for each in duplicates(data(white[:1], white[:1]))] == ["exact"]
    assert duplicates(data(white[:1], white[:1] - 9)) == []
    assert line_about(data(white, white), []) == ""


def test_digits_are_alike_and_no_duplicates():
    digits = cd.dataset("digits")
    assert len(duplicates(digits)) < 0.01 * len(digits.test)


def test_equal_images_of_a_split_are_found_where_their_labels_differ():
    train = photos(30, 0)
    train[7], train[8], train[12] = train[4], train[4], train[5]  # labels are the parity: 7 and 12 contradict
    whole = data(train, photos(9, 1))
    found = duplicates(whole)
    assert found == [Duplicate("exact", ("train", place), ("train", other)) for place, other in ((7, 4), (12, 5))]
    said = "data set mine: 2 train images are there with another label, too (train 7 = train 4, train 12 = train 5)"
    assert line_about(whole, found) == said
    assert duplicates(whole, training=[4, 8, 12]) == []
    apart = duplicates(whole, training=[4, 8], held_out=[5, 12])
    assert apart == [Duplicate("exact", ("validation", 12), ("validation", 5))]


def test_images_that_only_look_alike_do_not_contradict_each_other():
    train = photos(30, 0)
    train[7] = train[4]
    train[7, 0, 0, 0] ^= 1
    assert duplicates(data(train, photos(9, 1))) == []
