import numpy as np
from sklearn.datasets import load_digits

from codistill.data import dataset


def test_digits_are_split_and_enlarged_the_same_way_every_time():
    first, second = dataset("digits"), dataset("digits")
    assert (len(first.train), len(first.test), first.image_size) == (1437, 360, (32, 32))
    assert first.class_names == tuple("0123456789") and not first.flip
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert first.train.labels[:6].tolist() == [3, 9, 1, 3, 1, 9]
    assert np.bincount(first.test.labels).min() >= 34


def test_no_digit_is_lost_and_grey_covers_the_range():
    data = dataset("digits")
    labels = np.concatenate([data.train.labels, data.test.labels])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(load_digits().target))
    images = np.concatenate([data.train.images, data.test.images])
    assert images.min() == 0 and images.max() > 240
    assert (images == images[..., :1]).all()
    np.testing.assert_allclose(images.mean() / 255, load_digits().data.mean() / 16, atol=0.01)
