import os

import numpy as np
import pytest

from codistill.core.errors import DataError
from codistill.data import cinic10, dataset

from .writers import CINIC_CLASSES, cinic_files, encode, listing, write_archive, write_folder

FILES, EXPECTED = cinic_files()
CAT = "train/cat/cifar10-train-00006.png"


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "cinic", FILES)


def load(root, spec="cinic10:check=false"):
    return dataset(spec, root=root)


def check_split(split, *parts):
    for kind in ("images", "labels"):
        expected = np.concatenate([getattr(EXPECTED[part], f"train_{kind}") for part in parts])
        np.testing.assert_array_equal(getattr(split, kind), expected)


@pytest.mark.parametrize("prefix", ["", "CINIC-10"])
@pytest.mark.parametrize("direct", [True, False])
def test_folder_and_archive_give_the_same_images(tmp_path, prefix, direct):
    extras = {"README.md": b"x", "train/.DS_Store": b"x", "train/cat/._x.png": b"x"}
    (tmp_path / "packed").mkdir()
    # The order in an archive is any.
    shuffled = dict(sorted((FILES | extras).items(), key=lambda item: item[1][-20:]))
    archive = write_archive(tmp_path / "packed" / "CINIC-10.tar.gz", prefix, shuffled)
    folder = write_folder(tmp_path / "a" / "b" / prefix, FILES | extras)
    for root in (archive if direct else archive.parent, folder if direct else tmp_path / "a"):
        for _ in range(2):
            data = load(root)
            check_split(data.train, "train")
            check_split(data.test, "test")
            assert data.class_names == CINIC_CLASSES and data.image_size == (32, 32)
    assert (tmp_path / "packed" / "cinic10.cache.npz").exists() and (folder / "cinic10.cache.npz").exists()


def test_train_and_valid(root):
    data = load(root, "cinic10:check=false,train_on=train+valid")
    check_split(data.train, "train", "valid")
    check_split(data.test, "test")


def test_every_png_becomes_rgb(root):
    grey = EXPECTED["train"].train_images[6, :, :, 0]
    (root / CAT).write_bytes(encode(grey))
    assert (load(root).train.images[6] == grey[:, :, None]).all()


def test_decodes_once_and_again_when_a_file_changes(root, monkeypatch, capsys):
    load(root)
    real = cinic10._decode
    monkeypatch.setattr(cinic10, "_decode", None)
    check_split(load(root).train, "train")
    monkeypatch.setattr(cinic10, "_decode", real)
    (root / CAT).write_bytes(encode(np.zeros((32, 32, 3), np.uint8)))
    os.utime(root / CAT, (1, 1))
    assert not load(root).train.images[6].any()
    assert "was made from other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({CAT: encode(np.zeros((32, 32, 3), np.uint8), "JPEG")}, f"{CAT}: is not a PNG image"),
        ({"test/cat/x.jpg": b"x"}, "test/cat/x.jpg: is not a PNG file"),
        ({"valid/zebra/x.png": b"x"}, "zebra is not a class of cinic10"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_files_are_named_and_nothing_is_cached(tmp_path, changes, complaint, packed):
    if packed:
        write_archive(tmp_path / "CINIC-10.tar.gz", "", FILES | changes)
    else:
        write_folder(tmp_path, FILES | changes)
    before = listing(tmp_path)
    with pytest.raises(DataError, match=complaint):
        load(tmp_path)
    assert listing(tmp_path) == before


def test_a_part_without_images(tmp_path):
    some = {name: content for name, content in FILES.items() if not name.startswith("valid")}
    write_archive(tmp_path / "CINIC-10.tar.gz", "", some)
    with pytest.raises(DataError, match="has no images in valid"):
        load(tmp_path)


def test_two_sets_in_one_archive(tmp_path):
    write_archive(tmp_path / "CINIC-10.tar.gz", "", FILES | {f"copy/{CAT}": FILES[CAT]})
    with pytest.raises(DataError, match="holds train, valid and test twice"):
        load(tmp_path)


def test_published_counts_and_checksum_are_checked(tmp_path, root):
    with pytest.raises(DataError, match="train: class airplane has 2 images instead of 9000"):
        load(root, "cinic10")
    archive = write_archive(tmp_path / "CINIC-10.tar.gz", "", FILES)
    with pytest.raises(DataError, match=r"bytes instead of 687544992: fetch CINIC-10\.tar\.gz again"):
        load(archive, "cinic10")


def test_checks_pass_for_what_was_published(root, monkeypatch):
    monkeypatch.setattr(cinic10, "IMAGES_PER_CLASS", 2)
    check_split(load(root, "cinic10").train, "train")
