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
        with pytest.raises(DataError, match=r"ant/0\.png: is 9x9 pixels, not 12x10: bring all to one size"):
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


def flat(root, counts, size=(12, 10)):
    rng = np.random.default_rng(1)
    return write_folder(
        root,
        {
            f"{name}/{index:03}.png": encode(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            for name, count in counts.items()
            for index in range(count)
        },
    )


def names(split):
    return [file.split("/")[0] for file in split.files]


@pytest.mark.parametrize("below", ["", "train/"])
def test_without_test_images_each_class_sets_its_share_apart(tmp_path, below):
    root = flat(tmp_path, {f"{below}{name}": count for name, count in (("ant", 20), ("bee", 10), ("cat", 2))})
    (root / "README.txt").write_text("beside the classes there may be others")
    data = dataset("folder", root=root)
    assert data.class_names == ("ant", "bee", "cat") and data.validation is None
    counts = [np.bincount(split.labels).tolist() for split in (data.train, data.test)]
    assert counts == [[17, 8, 1], [3, 2, 1]] and len({*data.train.files, *data.test.files}) == 32
    assert list(data.train.files) == sorted(data.train.files)
    assert data.drawn == "6 of 32 images, of each class its share, drawn with seed 0"
    for split in (data.train, data.test):
        for image, file in zip(split.images, split.files, strict=True):
            np.testing.assert_array_equal(image, open_image(root / file))
    again, other = (dataset(f"folder:split_seed={seed}", root=root) for seed in (0, 1))
    assert again.test.files == data.test.files != other.test.files
    assert len(dataset("folder:test=50%", root=root).test) == 16 == len(dataset("folder:test=16", root=root).test)


def test_val_chooses_epoch_and_student_or_is_the_test_set(root):
    write_folder(root, {name.replace("test/", "Val/"): content for name, content in image_folder_files()[0].items()})
    data = dataset("folder", root=root)
    assert len(data.validation) == 3 and {file.split("/")[0] for file in data.validation.files} == {"Val"}
    shutil.rmtree(root / "test")
    data = dataset("folder", root=root)
    assert data.validation is None and names(data.test) == ["Val"] * 3 and data.drawn == ""


def test_a_class_may_be_called_as_a_split(tmp_path):
    data = dataset("folder", root=flat(tmp_path, {"train": 5, "plane": 5, "test": 5}))
    assert data.class_names == ("plane", "test", "train")


@pytest.mark.fault(130)
@pytest.mark.parametrize(
    ("spec", "places", "complaint"),
    [
        ("folder", ("ant",), "holds one class folder, 'ant': images belong in"),
        ("folder", ("test/ant", "test/bee"), "has test, but no train: images belong in"),
        ("folder", ("train/ant", "valid/ant", "val/ant"), "val and valid are both there: leave one of them"),
        ("folder", ("train/ant", "val/bee"), "class 'ant' is in train but not in val: .*make an empty folder val/ant"),
        ("folder:test=9", ("ant", "bee"), "9 test images cannot be drawn of 10 images, one of each class left"),
        ("folder:test=3", ("train/ant", "test/ant"), "test is 3, but .* has 5 test images of its own: leave test out"),
        ("folder:test=0", ("ant", "bee"), "test is 0: a run needs test images"),
        ("folder:test=20", ("ant", "bee"), "20 test images cannot be drawn"),
        ("folder:test=x", ("ant", "bee"), "data set folder: test is 'x'; it must be a whole number, or a percentage"),
        ("folder:split_seed=-1", ("ant", "bee"), "split_seed is -1; it must be from 0"),
        ("folder:resize=5x", ("ant", "bee"), "resize is 5x: give the side of a square in pixels, or HEIGHTxWIDTH"),
        ("folder:resize=0x9", ("ant", "bee"), "resize is 0x9: "),
        ("folder:interpolation=best", ("ant", "bee"), "option interpolation is 'best': choose from bicubic, bilinear"),
    ],
)
def test_layouts_and_options_that_cannot_be(tmp_path, spec, places, complaint):
    flat(tmp_path, dict.fromkeys(places, 5))
    with pytest.raises((DataError, UsageError), match=complaint) as error:
        dataset(spec, root=tmp_path)
    assert "\n" not in str(error.value)


def test_loose_images_beside_class_folders_are_named(tmp_path):
    write_folder(flat(tmp_path, {"ant": 5, "bee": 5}), {"loose.png": b"x"})
    with pytest.raises(DataError, match=r"loose\.png: is not a folder: images belong in"):
        dataset("folder", root=tmp_path)
    shutil.rmtree(tmp_path / "ant")
    shutil.rmtree(tmp_path / "bee")
    with pytest.raises(DataError, match=r"holds no class folders: .* with a table of labels, name it: --data table"):
        dataset("folder", root=tmp_path)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_images_become_any_size(root, interpolation):
    odd = root / "train" / "bee" / "odd.png"
    odd.write_bytes(encode(np.random.default_rng(0).integers(0, 256, (40, 90), dtype=np.uint8)))  # a grey one
    data = dataset(f"folder:resize=6x9,interpolation={interpolation}", root=root)
    assert data.image_size == (6, 9) and data.interpolation == interpolation
    found = data.train.images[data.train.files.index("train/bee/odd.png")]
    np.testing.assert_array_equal(found, open_image(odd, (6, 9), interpolation))
    assert (found == found[..., :1]).all()
    assert dataset(data.spec, root=root).image_size == (6, 9)
