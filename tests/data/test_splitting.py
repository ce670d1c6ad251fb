import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.core.errors import UsageError
from codistill.data.augment import seeded_order
from codistill.data.splitting import checked_part, divided, part_of


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_each_class_holds_out_its_share_and_keeps_an_image(sizes, part, seed):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    wanted = round(part * len(labels))
    kept, out = divided(labels, wanted, seed)
    assert len(out) == wanted and sorted([*kept, *out]) == list(range(len(labels)))
    left, held = (np.bincount(labels[each], minlength=len(sizes)) for each in (kept, out))
    spare = np.array(sizes) - 1
    if wanted <= spare.sum():
        assert left.min() >= 1
    if (spare > 0).sum() <= wanted:
        assert (held[spare > 0] >= 1).all()


@given(st.integers(1, 9), st.integers(2, 30), st.integers(0, 9))
def test_equal_classes_hold_out_equally_many(classes, size, seed):
    labels = np.tile(np.arange(classes), size)
    _, out = divided(labels, classes * (size // 2), seed)
    assert np.bincount(labels[out]).tolist() == [size // 2] * classes


def test_shares_are_rounded_to_the_whole_number():
    labels = np.repeat([0, 1, 2], [100, 50, 7])  # shares of 31 images: 19.7, 9.9, 1.4
    _, out = divided(labels, 31, 0)
    assert np.bincount(labels[out]).tolist() == [20, 10, 1]
    assert np.bincount(labels[divided(labels, 1, 0)[1]]).tolist() == [1]  # fewer than classes: the largest


def test_the_last_of_the_seeded_order_of_each_class_are_taken():
    order = seeded_order(12, 5).numpy()
    labels = np.zeros(12, np.int64)
    kept, out = divided(labels, 4, 5)
    assert kept.tolist() == order[:8].tolist() and out.tolist() == order[8:].tolist()
    other = divided(labels, 4, 6)[1]
    assert set(other) != set(out)


@pytest.mark.parametrize("part", ["20", "0%", "100%", "20 %", "x", "-5%"])
def test_what_is_no_part(part):
    with pytest.raises(UsageError, match=r"test is '.*'; it must be a whole number, or a percentage"):
        checked_part("test", part)
    with pytest.raises(UsageError, match="test is -1; it must be at least 0"):
        checked_part("test", -1)


def test_a_percentage_is_at_least_one_image():
    assert [part_of(24, part) for part in ("25%", "12.5%", "0.01%", 7)] == [6, 3, 1, 7]
