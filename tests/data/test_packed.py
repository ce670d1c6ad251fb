import io
import zipfile

import numpy as np
import pytest

from codistill.core.errors import DataError
from codistill.data import dataset

from .writers import listing, random_arrays, write_npz

ARRAYS = random_arrays(3, size=(6, 5))
IMAGES, LABELS = ARRAYS.train_images, ARRAYS.train_labels


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.npz"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_reads_arrays_with_labels_of_any_integer_type(path, dtype):
    write_npz(path, ARRAYS, train_labels=LABELS.astype(dtype))
    data = dataset("packed", root=path)
    np.testing.assert_array_equal(data.train.images, IMAGES)
    np.testing.assert_array_equal(data.test.images, ARRAYS.test_images)
    np.testing.assert_array_equal(data.train.labels, LABELS)
    assert data.train.labels.dtype == np.int64 and data.class_names == ARRAYS.class_names


def test_class_names_may_be_absent_or_bytes(path):
    assert dataset("packed", root=write_npz(path, ARRAYS, class_names=None)).class_names == ("0", "1", "2")
    write_npz(path, ARRAYS, class_names=np.array([b"a", b"b", b"c"]))
    assert dataset("packed", root=path).class_names == ("a", "b", "c")


def test_grey_images_have_three_equal_channels(path):
    for grey in (IMAGES[..., 0], IMAGES[..., :1]):
        data = dataset(
            "packed", root=write_npz(path, ARRAYS, train_images=grey, test_images=ARRAYS.test_images[..., 0])
        )
        np.testing.assert_array_equal(data.train.images, IMAGES[..., [0, 0, 0]])
        np.testing.assert_array_equal(data.test.images, ARRAYS.test_images[..., [0, 0, 0]])


def test_it_may_have_a_validation_split(path):
    data = dataset("packed", root=write_npz(path, ARRAYS, validation_images=IMAGES[:2], validation_labels=LABELS[:2]))
    np.testing.assert_array_equal(data.validation.images, IMAGES[:2])
    np.testing.assert_array_equal(data.validation.labels, LABELS[:2])
    assert list(data.splits) == ["train", "validation", "test"]


def test_compressed_files_and_fortran_order(path):
    content = {**vars(ARRAYS), "train_images": np.asfortranarray(IMAGES)}
    np.savez_compressed(path, **content)
    np.testing.assert_array_equal(dataset("packed", root=path).train.images, IMAGES)


def test_a_folder_with_one_file_will_do(path):
    write_npz(path, ARRAYS)
    assert len(dataset("packed", root=path.parent).train) == 6
    write_npz(path.with_name("other.npz"), ARRAYS)
    with pytest.raises(DataError, match=r"holds 2 \.npz files: name the file itself"):
        dataset("packed", root=path.parent)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"test_labels": None}, r"has no array test_labels \(it has class_names, test_images, train_images"),
        (
            {"train_images": IMAGES[:, :, 0, 0]},
            r"train_images is uint8 \[6, 6\]; it must be uint8 .*or without the 3 for",
        ),
        ({"train_images": IMAGES[:, :, :, :2]}, r"train_images is uint8 \[6, 6, 5, 2\]"),
        ({"validation_images": IMAGES}, r"has no array validation_labels"),
        (
            {"validation_images": IMAGES[:, :4], "validation_labels": LABELS},
            "train images are 6x5 but validation images",
        ),
        ({"train_images": IMAGES[:5]}, r"train_labels is int64 \[6\]; it must be whole numbers \[5\]"),
        ({"train_labels": LABELS[:, None]}, r"train_labels is int64 \[6, 1\]"),
        ({"test_labels": np.array([0, 9, 2]), "class_names": None}, "a label is 9, more than there are images"),
        ({"test_images": ARRAYS.test_images[:, :4]}, "train images are 6x5 but test images are 4x5"),
        ({"class_names": np.array(["a", "a", "b"])}, "class_names has a name twice"),
        ({"class_names": np.array([1, 2, 3])}, r"class_names is int64 \[3\]"),
        ({"class_names": np.array([b"\xff", b"b", b"c"])}, "class_names: cannot be read"),
    ],
)
def test_wrong_arrays_are_named_with_type_and_shape(path, changes, complaint):
    write_npz(path, ARRAYS, **changes)
    with pytest.raises(DataError, match=complaint):
        dataset("packed", root=path)


def test_damage(path):
    with pytest.raises(DataError, match=r"data\.npz: no such file: make it with numpy\.savez"):
        dataset("packed", root=path)
    content = write_npz(path, ARRAYS).read_bytes()
    bad = [b"", b"hello", content[: len(content) // 2], content[:-1]]
    flipped = bytearray(content)
    flipped[content.index(IMAGES.tobytes()) + 100] ^= 1
    for content in (*bad, bytes(flipped)):
        path.write_bytes(content)
        before = listing(path.parent)
        with pytest.raises(DataError, match=r"data\.npz: cannot be read"):
            dataset("packed", root=path)
        assert listing(path.parent) == before


def test_a_header_that_claims_more_than_there_is_costs_no_memory(path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 32, 32, 3)})
    write_npz(path, ARRAYS, train_images=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_images.npy", header.getvalue() + bytes(64))
    with pytest.raises(DataError, match=r"train_images is uint8 \[1000000000, 32, 32, 3\] but has 64 bytes"):
        dataset("packed", root=path)
