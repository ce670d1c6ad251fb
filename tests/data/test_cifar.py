import pickle
from dataclasses import replace

import numpy as np
import pytest

from codistill.core.errors import DataError
from codistill.data import cifar, dataset
from codistill.data.cifar_files import CIFAR10, CIFAR100

from .writers import (
    cifar_binary,
    cifar_python,
    listing,
    python2_pickle,
    random_arrays,
    sha256,
    write_archive,
    write_folder,
)

RELEASES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
WRITERS = (cifar_binary, cifar_python)
ARRAYS = {"cifar10": random_arrays(10), "cifar100": random_arrays(100)}

every_release = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in RELEASES for kind in (0, 1)])


def files_of(name, kind):
    return WRITERS[kind](name, ARRAYS[name])


def check_equal(data, expected):
    assert data.class_names == expected.class_names and data.image_size == (32, 32)
    for part in ("train", "test"):
        split = getattr(data, part)
        np.testing.assert_array_equal(split.images, getattr(expected, f"{part}_images"))
        np.testing.assert_array_equal(split.labels, getattr(expected, f"{part}_labels"))


@every_release
def test_extracted_folder_and_archive_each_also_named_directly(tmp_path, name, kind):
    release = RELEASES[name][kind]
    files = files_of(name, kind)
    folder = write_folder(tmp_path / "extracted" / release.folder, files)
    archive = tmp_path / "packed" / release.archive
    archive.parent.mkdir()
    write_archive(archive, release.folder, files)
    for root in (folder, folder.parent, archive, archive.parent):
        check_equal(dataset(name, root=root, check=False), ARRAYS[name])


def test_the_coarse_label_comes_first_and_planes_are_red_green_blue(tmp_path):
    red = bytes([255] * 1024 + [0] * 2048)
    files = files_of("cifar100", 0) | {"train.bin": bytes([3, 77]) + red}
    write_folder(tmp_path, files)
    train = dataset("cifar100:check=false", root=tmp_path).train
    assert train.labels.tolist() == [77] and (train.images == [255, 0, 0]).all()


def test_binary_is_preferred_and_both_datasets_can_share_a_root(tmp_path):
    for name, releases in RELEASES.items():
        write_folder(tmp_path / releases[0].folder, files_of(name, 0))
        write_folder(tmp_path / releases[1].folder, {releases[1].train[0]: b"unread"})
        (tmp_path / releases[0].archive).write_bytes(b"unread")
    for name in RELEASES:
        check_equal(dataset(name, root=tmp_path, check=False), ARRAYS[name])


def test_what_python_3_and_numpy_2_pickle_is_read_too(tmp_path):
    names = {b"label_names": [f"n{index}" for index in range(10)]}
    write_folder(tmp_path, files_of("cifar10", 1) | {"batches.meta": pickle.dumps(names)})
    images = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    batch = {"data": images, "labels": np.array([3, 4])}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=4))
    data = dataset("cifar10:check=false", root=tmp_path)
    assert data.class_names[3] == "n3" and data.train.labels[:2].tolist() == [3, 4]
    np.testing.assert_array_equal(data.train.images[1, 0, :, 0], images[1, :32])


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Make a small archive of cifar10 the published one, as far as the module knows."""
    files = files_of("cifar10", 0)
    archive = write_archive(tmp_path / "cifar-10-binary.tar.gz", CIFAR10[0].folder, files)
    content = archive.read_bytes()
    digests = {file: sha256(files[file]) for file in CIFAR10[0].digests}
    small = replace(CIFAR10[0], size=len(content), digest=sha256(content), digests=digests)
    monkeypatch.setattr(cifar, "CIFAR10", (small, CIFAR10[1]))
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 20)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 10)
    return archive


def test_checks_pass_for_what_was_published(published, tmp_path):
    check_equal(dataset("cifar10", root=tmp_path), ARRAYS["cifar10"])
    folder = write_folder(tmp_path / "else" / CIFAR10[0].folder, files_of("cifar10", 0))
    check_equal(dataset("cifar10", root=folder), ARRAYS["cifar10"])


def test_downloads_checks_and_does_not_download_again(published, server, tmp_path):
    server.content = published.read_bytes()
    root = tmp_path / "new"
    data = dataset("cifar10", root=root, download=True, url=server.url)
    check_equal(data, ARRAYS["cifar10"])
    assert [each.name for each in root.iterdir()] == ["cifar-10-binary.tar.gz"]
    dataset("cifar10", root=root, download=True, url=server.url)
    check_equal(dataset(data.spec, root=data.root), ARRAYS["cifar10"])
    assert len(server.ranges) == 1


def test_a_download_does_not_overwrite_a_damaged_archive(published, server, tmp_path):
    published.write_bytes(published.read_bytes()[:-1])
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"has \d+ bytes instead of \d+: delete it and fetch it again"):
        dataset("cifar10", root=tmp_path, download=True, url=server.url)
    assert listing(tmp_path) == before and server.ranges == []


@pytest.mark.parametrize("name", RELEASES)
def test_a_file_of_another_name_is_refused(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file: is not known as an archive of"):
        dataset(name, root=tmp_path / "file", download=True)


def batch(images=ARRAYS["cifar10"].train_images[:4], **changes):
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    content = {b"data": planes, b"labels": [0, 1, 2, 3]} | {key.encode(): value for key, value in changes.items()}
    return python2_pickle({key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("kind", "file", "content", "complaint"),
    [
        (0, "batches.meta.txt", b"a\nb\n", "has 2 class names, not 10 distinct ones"),
        (0, "batches.meta.txt", b"\xff\n" * 10, "cannot be read"),
        (1, "data_batch_2", batch()[:-20], "cannot be read"),
        (1, "data_batch_2", batch(labels=[0, 1, 2, 1 << 70]), "labels is not a list of class indices"),
        (1, "data_batch_2", batch(labels=[0, 1, 2, "x"]), "labels is not a list of class indices"),
        (1, "data_batch_2", batch(labels=[0, 1, 2]), "has 4 images but 3 labels"),
        (1, "data_batch_2", batch(labels=None), "has no list or array 'labels'"),
        (1, "data_batch_2", batch(data=np.zeros((4, 3072), np.int32)), r"data is int32 \[4, 3072\]; it must be uint8"),
        (1, "data_batch_2", batch(images=np.zeros((4, 33, 32, 3), np.uint8)), r"data is uint8 \[4, 3168\]"),
        (1, "data_batch_2", batch(data=[1, 2, 3, 4]), "data is a list"),
        (1, "data_batch_2", pickle.dumps([1]), "holds a list"),
        (1, "batches.meta", python2_pickle({b"label_names": [1] * 10}), "label_names is not a list of names"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_files_are_named(tmp_path, monkeypatch, kind, file, content, complaint, packed):
    monkeypatch.chdir(tmp_path)
    release = CIFAR10[kind]
    files = files_of("cifar10", kind) | {file: content}
    if packed:
        write_archive(tmp_path / release.archive, release.folder, files)
    else:
        write_folder(tmp_path / release.folder, files)
    before = listing(tmp_path)
    with pytest.raises(DataError, match=rf"{file}.*: .*{complaint}") as error:
        dataset("cifar10:check=false", root=tmp_path)
    assert listing(tmp_path) == before and "\n" not in str(error.value)


@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_file_is_named(tmp_path, packed):
    files = files_of("cifar10", 0)
    del files["data_batch_4.bin"]
    if packed:
        write_archive(tmp_path / CIFAR10[0].archive, CIFAR10[0].folder, files)
    else:
        write_folder(tmp_path / CIFAR10[0].folder, files)
    with pytest.raises(DataError, match=r"data_batch_4\.bin"):
        dataset("cifar10:check=false", root=tmp_path)
