"""Every registered data set; one that is added appears here and needs a small fixture of itself."""

import numpy as np
import pytest
from PIL import Image

from codistill.core.errors import DataError, UsageError
from codistill.data import DATASETS, dataset

from .writers import (
    cifar_binary,
    cinic_files,
    image_folder_files,
    random_arrays,
    write_folder,
    write_npz,
)

FIXTURES = {
    "digits": ("digits", lambda root: None),
    "cifar10": ("cifar10:check=false", lambda root: write_folder(root, cifar_binary("cifar10", random_arrays(10)))),
    "cifar100": ("cifar100:check=false", lambda root: write_folder(root, cifar_binary("cifar100", random_arrays(100)))),
    "cinic10": ("cinic10:check=false", lambda root: write_folder(root, cinic_files()[0])),
    "folder": ("folder:resize=8", lambda root: write_folder(root, image_folder_files()[0])),
    "table": ("table", lambda root: write_table(root, image_folder_files()[0])),
    "huggingface": ("huggingface", lambda root: save_with_datasets(root, image_folder_files()[1])),
    "packed": ("packed", lambda root: write_npz(root / "x.npz", random_arrays(3))),
}


def write_table(root, files):
    """Write images, and a table of them."""
    rows = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in files]
    return write_folder(root, {**files, "labels.csv": "\n".join(["path,label,split", *rows]).encode()})


def save_with_datasets(root, arrays):
    """Save a data set as Hugging Face's library does."""
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(arrays.class_names))}
    parts = {}
    for part in ("train", "test"):
        images = [Image.fromarray(each) for each in getattr(arrays, f"{part}_images")]
        columns = {"image": images, "label": getattr(arrays, f"{part}_labels").tolist()}
        parts[part] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(parts).save_to_disk(str(root / "saved"))
    return root / "saved"


@pytest.fixture(params=DATASETS)
def built(request, tmp_path):
    spec, write = FIXTURES[request.param]
    root = write(tmp_path)
    return request.param, dataset(spec, root=root)


def test_arrays_names_and_statistics(built):
    name, data = built
    assert data.name == name and len(data.class_names) == data.num_classes > 1
    for split in (data.train, data.test):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64
        assert split.images.shape == (len(split), *data.image_size, 3)
        assert split.images.flags.c_contiguous and split.images.flags.writeable
        assert set(split.labels.tolist()) == set(range(data.num_classes))
    pixels = data.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(data.statistics[0], pixels.mean(axis=(0, 1, 2)), atol=1e-9)
    np.testing.assert_allclose(data.statistics[1], pixels.std(axis=(0, 1, 2)), atol=1e-9)


def test_spec_and_root_load_it_again(built):
    _, data = built
    again = dataset(data.spec, root=data.root or None)
    np.testing.assert_array_equal(again.train.images, data.train.images)
    np.testing.assert_array_equal(again.test.labels, data.test.labels)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_a_missing_or_empty_place_is_one_line(tmp_path, name):
    with pytest.raises(UsageError, match="--data-dir"):
        dataset(name)
    if name == "huggingface":
        pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(DataError, match=str(root)) as error:
            dataset(name, root=root)
        assert "\n" not in str(error.value)
    assert list((tmp_path / "empty").iterdir()) == [] and not (tmp_path / "none").exists()
