import numpy as np
import pytest

from codistill.core.errors import DataError, UsageError
from codistill.data import dataset
from codistill.data.images import open_image

from .writers import encode, image_folder_files, write_folder


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "pictures", image_folder_files()[0])


def test_images_of_one_size_stay_as_they_are(root):
    expected = image_folder_files()[1]
    data = dataset("folder", root=root)
    assert data.class_names == ("ant", "bee", "cat") and data.image_size == (12, 10) and data.flip
    for part in ("train", "test"):
        split = getattr(data, part)
        np.testing.assert_array_equal(split.images, getattr(expected, f"{part}_images"))
        np.testing.assert_array_equal(split.labels, getattr(expected, f"{part}_labels"))


def test_resize_brings_any_image_to_a_square(root):
    odd = root / "train" / "bee" / "odd.JPG"
    odd.write_bytes(encode(np.zeros((40, 90, 3), np.uint8), "JPEG"))
    data = dataset("folder:resize=8", root=root)
    assert data.image_size == (8, 8) and len(data.train) == 7
    first = next(iter(sorted((root / "train" / "ant").iterdir())))
    np.testing.assert_array_equal(data.train.images[0], open_image(first, (8, 8)))
    np.testing.assert_array_equal(data.train.images[4], open_image(odd, (8, 8)))


def test_hidden_files_are_skipped(root):
    for place in (".DS_Store", "train/.DS_Store", "train/ant/._x.png", "test/.cache/x.png"):
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_bytes(b"junk")
    assert len(dataset("folder", root=root).train) == 6


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("train/ant/notes.txt", r"train/ant/notes\.txt: is not an image file \(\.png"),
        ("test/ant/Thumbs.db", r"test/ant/Thumbs\.db: is not an image file"),
        ("train/ant/more/x.png", "train/ant/more: is not an image file"),
        ("train/loose.png", r"train/loose\.png: is not a folder: images belong in"),
        ("train/dog/x.png", "class 'dog' is in train but not in test: give both the same classes"),
        ("test/dog/x.png", "class 'dog' is in test but not in train"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(root, place, complaint):
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).write_bytes(encode(np.zeros((12, 10, 3), np.uint8)))
    with pytest.raises(DataError, match=complaint):
        dataset("folder", root=root)


def test_a_part_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: holds no class folders"):
        dataset("folder", root=tmp_path)


def test_a_negative_resize_is_a_wrong_setting(root):
    with pytest.raises(UsageError, match="resize is -1"):
        dataset("folder:resize=-1", root=root)
