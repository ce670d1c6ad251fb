import shutil
import unicodedata

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
        places = [[part, data.class_names[each]] for each in split.labels]
        assert [file.split("/")[:2] for file in split.files] == places


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
        ("train/ant/notes.txt", r"train/ant/notes\.txt: is not an image file by its name: remove it"),
        ("train/ant/more/x.png", "train/ant/more: is a folder in a class: remove it"),
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


def test_a_broken_link_is_called_one(root):
    (root / "train/ant/link.png").symlink_to(root / "gone.png")
    with pytest.raises(DataError, match=r"link\.png: is a broken link: remove it"):
        dataset("folder", root=root)


def test_a_part_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: holds no class folders"):
        dataset("folder", root=tmp_path)


def test_a_negative_resize_is_a_wrong_setting(root):
    with pytest.raises(UsageError, match="resize is -1"):
        dataset("folder:resize=-1", root=root)


@pytest.mark.fault(42)
def test_files_of_operating_systems_are_passed_over(root):
    names = ["Thumbs.db", "desktop.ini", "Desktop.ini", ".DS_Store", "Icon\r", "000.png:Zone.Identifier", "._000.png"]
    write_folder(root, {f"{place}/{name}": b"x" for place in ("train", "train/ant", "test/bee") for name in names})
    write_folder(root, {"train/__MACOSX/._ant": b"x", "test/@eaDir/x": b"x"})
    data = dataset("folder", root=root)
    assert len(data.train) == 6 and data.class_names == ("ant", "bee", "cat")


@pytest.mark.fault(43)
def test_a_class_without_test_images_is_said_once(root, capsys):
    shutil.rmtree(root / "test/bee")
    with pytest.raises(DataError, match=r"class 'bee' is in train but not in test: .* make an empty folder test/bee"):
        dataset("folder", root=root)
    (root / "test/bee").mkdir()
    data = dataset("folder", root=root)
    assert data.class_names == ("ant", "bee", "cat") and sorted(data.test.labels) == [0, 2]
    assert capsys.readouterr().err.count("no test images of 'bee'") == 1
    for name in ("ant", "cat"):
        shutil.rmtree(root / "test" / name)
        (root / "test" / name).mkdir()
    with pytest.raises(DataError, match="test/ant: holds no images"):
        dataset("folder", root=root)


@pytest.mark.fault(44)
def test_all_bad_files_are_named_at_once_or_left_out(root, capsys):
    image = encode(np.zeros((12, 10, 3), np.uint8))
    bad = {f"train/ant/bad{index:02}.png": image[:40] for index in range(22)} | {"test/cat/notes.txt": b"x"}
    sound = dataset("folder", root=root)
    write_folder(root, bad)
    with pytest.raises(
        DataError, match=r": 23 files cannot be used: .*notes\.txt: is not .*bad18\.png.*; and 3 more"
    ) as e:
        dataset("folder", root=root)
    assert "bad19" not in str(e.value) and "--skip-bad, or --data folder:skip_bad=true" in str(e.value)
    data = dataset("folder:skip_bad=true", root=root)
    assert "23 bad files are left out: test/cat/notes.txt, train/ant/bad00.png, " in (said := capsys.readouterr().err)
    assert said.endswith("train/ant/bad18.png and 3 more\n") and data.left_out == tuple(sorted(bad))
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(data, part).images, getattr(sound, part).images)
        np.testing.assert_array_equal(getattr(data, part).labels, getattr(sound, part).labels)


@pytest.mark.fault(44)
def test_what_skipping_cannot_repair(root):
    write_folder(root, {"train/ant/0.png": encode(np.zeros((9, 9, 3), np.uint8))})
    for spec in ("folder", "folder:skip_bad=true"):
        with pytest.raises(DataError, match=r"ant/0\.png: is 9x9 pixels, but most images are 12x10"):
            dataset(spec, root=root)
    (root / "train/ant/0.png").unlink()
    for path in (root / "train/bee").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="train/bee: holds no images"):
        dataset("folder:skip_bad=true", root=root)


@pytest.mark.fault(45)
def test_class_names_of_two_unicode_forms_are_one_class(root):
    for part, forms in (("train", ("NFC", "NFD")), ("test", ("NFD",))):
        for form in forms:
            name = unicodedata.normalize(form, "caf\u00e9")
            write_folder(root, {f"{part}/{name}/{form}.png": encode(np.full((12, 10, 3), 7, np.uint8))})
    data = dataset("folder", root=root)
    assert data.class_names == ("ant", "bee", "caf\u00e9", "cat")
    assert (data.train.labels == 2).sum() == 2 and (data.test.labels == 2).sum() == 1
