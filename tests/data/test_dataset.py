"""What a data set must be, and how it is named."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from codistill.core.errors import DataError, UsageError
from codistill.core.registry import parse_spec
from codistill.data import DATASETS, Dataset, Split, dataset
from codistill.data.augment import DeviceImages
from codistill.data.dataset import check_split

from .. import tiny


def images(count: int = 4, shape: tuple[int, ...] = (6, 5, 3), dtype: type = np.uint8) -> np.ndarray:
    return np.zeros((count, *shape), dtype)


def labels(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(images(dtype=np.float32), labels(0, 1, 2, 0)), r"images are float32 \[4, 6, 5, 3\]; .* uint8"),
        (Split(images(shape=(6, 5)), labels(0, 1, 2, 0)), r"images are uint8 \[4, 6, 5\]"),
        (Split(images(shape=(6, 5, 1)), labels(0, 1, 2, 0)), r"images are uint8 \[4, 6, 5, 1\]"),
        (Split(images(shape=(3, 6, 5)), labels(0, 1, 2, 0)), r"images are uint8 \[4, 3, 6, 5\]"),
        (Split(images(), labels(0, 1, 2, 0).astype(np.float64)), r"labels are float64 \[4\]"),
        (Split(images(), labels(0, 1, 2)), r"labels are int64 \[3\]; they must be int64 \[4\]"),
        (Split(images(), labels(0, 1, 2, 0)[:, None]), r"labels are int64 \[4, 1\]"),
        (Split(images(0), labels()), "no images"),
        (Split(images(), labels(0, 1, 2, 0), ("a.png",)), "1 files for 4 images"),
        (Split(images(), labels(0, 1, 3, 7)), r"image 2 has label 3, but there are 3 classes \(labels 0 to 2\)"),
        (Split(images(), labels(0, -1, 2, 0)), "image 1 has label -1"),
    ],
)
def test_what_is_wrong_with_a_split_is_named(split, message):
    with pytest.raises(DataError, match=f"^the place: {message}"):
        check_split(split, 3, "the place")
    whole = Split(images(2), labels(0, 1))
    for part, splits in (("train", (split, whole)), ("test", (whole, split))):
        with pytest.raises(DataError, match=f"^data set mine, {part}: {message}"):
            Dataset("mine", *splits, ("a", "b", "c"))


def test_a_right_split_passes():
    check_split(Split(images(), labels(0, 1, 2, 0)), 3, "the place")


def test_both_splits_have_images_of_one_size():
    with pytest.raises(DataError, match="train images are 6x5 but test images are 5x6"):
        Dataset("mine", Split(images(), labels(0, 1, 0, 1)), Split(images(1, (5, 6, 3)), labels(0)), ("a", "b"))


def test_sizes_and_classes():
    data = tiny.data(size=(6, 9))
    assert (data.num_classes, data.image_size, len(data.train), len(data.test)) == (3, (6, 9), 24, 9)


@hypothesis_settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 30), low=st.integers(0, 255), span=st.integers(1, 256))
def test_statistics_are_those_of_float64(seed, count, low, span):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(low, min(low + span, 256), (count, 5, 7, 3), dtype=np.uint8)
    pixels[..., 2] //= 3
    split = Split(pixels, np.zeros(count, np.int64))
    mean, std = Dataset("mine", split, split, ("a",)).statistics
    wide = pixels.astype(np.float64) / 255
    np.testing.assert_allclose(mean, wide.mean(axis=(0, 1, 2)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(std, np.maximum(wide.std(axis=(0, 1, 2)), 0.05), rtol=0, atol=1e-9)


def test_statistics_ignore_the_order_and_the_test_set():
    first = tiny.data(train=50)
    order = np.random.default_rng(0).permutation(50)
    shuffled = Split(first.train.images[order], first.train.labels[order])
    bright = Split(np.full_like(first.test.images, 255), first.test.labels)
    assert Dataset("mine", shuffled, bright, first.class_names).statistics == first.statistics


@pytest.mark.fault(85)
@pytest.mark.parametrize("kind", ["white", "empty", "all", "one pixel", "two values"])
def test_a_channel_with_hardly_any_spread_is_bounded_and_said(kind):
    train = tiny.data().train
    pixels = train.images.copy()
    pixels[:, :, :, slice(0, 3) if kind == "all" else 2] = 0 if kind == "empty" else 255
    if kind == "one pixel":
        pixels[3, 4, 5, 2] = 0
    if kind == "two values":
        pixels[:, ::2, :, 2] = 254
    whole = tiny.data()
    data = Dataset("mine", Split(pixels, train.labels), whole.test, whole.class_names)
    normalised = (np.array([0, 255])[:, None] / 255 - data.statistics[0]) / data.statistics[1]
    assert np.abs(normalised).max() <= 20.01
    assert "data set mine: hardly any spread in " in data.bounded and "blue (mean " in data.bounded
    assert data.bounded.count("mean") == (3 if kind == "all" else 1)
    if kind != "all":
        assert data.statistics[1][:2] == whole.statistics[1][:2]
    assert whole.bounded == "" and whole.statistics == whole.spread


@pytest.mark.fault(85)
@pytest.mark.parametrize("std", [0.0, -0.1, float("nan"), float("inf")])
def test_a_normalisation_that_cannot_be_is_an_error(std):
    with pytest.raises(DataError, match=r"normalisation by mean .* and std .*: all must be numbers"):
        DeviceImages(tiny.data().train, ((0.5,) * 3, (0.2, std, 0.2)), torch.device("cpu"))


@pytest.fixture
def colours(monkeypatch):
    """A data set with options of each kind; gives what it was called with."""
    calls = []

    def load(root: Path, size: int = 8, check: bool = True) -> Dataset:
        """Load colours."""
        calls.append({"root": root, "size": size, "check": check})
        return tiny.data(size=(size, size))

    monkeypatch.setitem(DATASETS._entries, "colours", load)
    return calls


@pytest.mark.parametrize(
    ("spec", "options", "called"),
    [
        ("colours", {}, (8, True)),
        ("colours:size=6", {}, (6, True)),
        ("colours", {"size": 6, "check": False}, (6, False)),
        ("colours:check=false,size=5", {}, (5, False)),
        ("colours:check=no", {"size": "7"}, (7, False)),
        ("colours:size=6", {"size": 9}, (9, True)),
    ],
)
def test_options_come_from_text_or_keywords(colours, tmp_path, spec, options, called):
    data = dataset(spec, tmp_path, **options)
    assert colours[-1] == {"root": tmp_path, "size": called[0], "check": called[1]}
    assert Path(data.root) == tmp_path and data.image_size == (called[0],) * 2


def test_the_spec_is_the_way_back(colours, tmp_path):
    for spec in ("colours", "colours:size=6", "colours:check=false,size=6"):
        first = dataset(spec, str(tmp_path))
        again = dataset(first.spec, first.root)
        assert colours[-1] == colours[-2]
        assert (again.spec, again.root) == (first.spec, first.root)
        assert parse_spec(first.spec)[0] == "colours"
    assert dataset("colours", tmp_path, size=6, check=False).spec == dataset("colours:check=no,size=6", tmp_path).spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("colour", "unknown data set 'colour': did you mean colours?"),
        ("colours:sise=6", "data set colours: unknown option 'sise': did you mean size?"),
        ("colours:size=six", "data set colours: option size is 'six': write a whole number"),
        ("colours:check=perhaps", "data set colours: option check is 'perhaps': write true or false"),
        ("colours:size", "'colours:size': options are written name:key=value,key=value, not 'size'"),
        ("digits:size=6", "data set digits: unknown option 'size': it has no options"),
    ],
)
def test_wrong_specs_are_one_line_with_the_mend(colours, tmp_path, spec, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        dataset(spec, tmp_path)
    assert colours == []


def test_a_data_set_with_files_must_be_told_where(colours):
    with pytest.raises(UsageError, match=r"^data set colours: .* give --data-dir"):
        dataset("colours")
    assert colours == []


@pytest.mark.fault(46)
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int32, np.uint64, ">i4", list, torch.tensor])
def test_arrays_of_other_forms_are_taken(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    classes = labels(0, 1, 2, 0)
    other = kind(classes.tolist()) if kind in (list, torch.tensor) else classes.astype(kind)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    for values in (
        pixels[..., ::-1],
        pixels.tolist(),
        list(pixels),
        pixels.astype(np.int64),
        frozen,
        torch.tensor(pixels),
    ):
        split = Split(values, other)
        np.testing.assert_array_equal(split.images, np.asarray(values))
        np.testing.assert_array_equal(split.labels, classes)
        assert split.images.flags.c_contiguous and split.images.flags.writeable
        data = Dataset("mine", split, split, ("a", "b", "c"))
        assert (data.train.images.dtype, data.train.labels.dtype) == (np.uint8, np.int64)


@pytest.mark.fault(46)
def test_arrays_that_cannot_be_taken():
    with pytest.raises(DataError, match=r"^images cannot be made an array"):
        Split([images(1)[0], images(1, (5, 5, 3))[0]], [0, 1])
    black = images(2) > 127  # once 0 and 1 of 255
    wrong = ((images(2, dtype=np.int64) - 1, "int64"), (None, "object"), (black, "bool"))
    for values, complaint in ((values, f"images are {kind}") for values, kind in wrong):
        with pytest.raises(DataError, match=complaint):
            check_split(Split(values, [0, 1]), 3, "the place")
    for values in ([0.5, 1], ["a", "b"], None):
        with pytest.raises(DataError, match="labels are"):
            check_split(Split(images(2), values), 3, "the place")


@pytest.mark.fault(46)
def test_class_names_become_texts():
    split = Split(images(2), [0, 1])
    for names in ((0, 1), [0, 1], np.arange(2), np.array(["0", "1"]), [b"0", "1"], range(2), iter("01")):
        assert Dataset("mine", split, split, names).class_names == ("0", "1")
    for names, complaint in (
        ("ab", "class_names is 'ab'"),
        (2, "class_names is 2"),
        ({"ant", "bee"}, "give a list"),  # in another order in every process
        ({0: "ant", 1: "bee"}, "give a list"),
        ([None, 1], "name 0 is None"),
        ([1, "1"], "alike"),
    ):
        with pytest.raises(DataError, match=complaint):
            Dataset("mine", split, split, names)
