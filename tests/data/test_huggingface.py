import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from codistill.core.errors import DataError, UsageError
from codistill.data import dataset

datasets = pytest.importorskip("datasets")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 4, 6, 3), dtype=np.uint8)


def rows(start=0, stop=12, names=("ant", "bee"), **changes):
    """Rows of images and classes, which alternate."""
    columns = {
        "picture": [Image.fromarray(each) for each in PIXELS[start:stop]],
        "kind": [place % 2 for place in range(start, stop)],
        "note": ["x"] * (stop - start),
    }
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("string")
    features = {"picture": datasets.Image(), "kind": label, "note": datasets.Value("string")}
    return datasets.Dataset.from_dict({**columns, **changes}, features=datasets.Features(features))


@pytest.fixture
def saved(tmp_path):
    """Save a data set, and return its folder."""

    def save(content):
        content.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return save


def test_splits_of_a_dict(saved):
    parts = {"train": rows(0, 6), "validation": rows(6, 8), "test": rows(8, 12)}
    data = dataset("huggingface", root=saved(datasets.DatasetDict(parts)))
    assert data.class_names == ("ant", "bee") and data.own
    for part, (start, stop) in {"train": (0, 6), "validation": (6, 8), "test": (8, 12)}.items():
        np.testing.assert_array_equal(data.splits[part].images, PIXELS[start:stop])
        np.testing.assert_array_equal(data.splits[part].labels, np.arange(start, stop) % 2)
    assert data.test.files[0] == "test/000000"


def test_a_single_data_set_sets_images_apart(saved):
    root = saved(rows())
    data = dataset("huggingface:resize=3x5", root=root)
    assert data.drawn == "2 of 12 images, of each class its share, drawn with seed 0" and data.image_size == (3, 5)
    assert sorted(data.train.files + data.test.files) == [f"train/{place:06}" for place in range(12)]
    plain = dataset("huggingface", root=root)
    for split in (plain.train, plain.test):
        for file, image in zip(split.files, split.images, strict=True):
            np.testing.assert_array_equal(image, PIXELS[int(file[-6:])])


def test_classes_may_be_texts_and_columns_named(saved):
    root = saved(rows(names=None, kind=["10", "9"] * 6, note=["b", "a"] * 6))
    assert dataset("huggingface:label=kind", root=root).class_names == ("9", "10")
    assert dataset("huggingface:label=note,image=picture", root=root).class_names == ("a", "b")


@pytest.mark.fault(132)
@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        (
            lambda: rows(names=None, kind=["a"] * 12),
            "",
            r"no columns of type ClassLabel \(it has picture \(Image\)",
        ),
        (lambda: rows(), "label=sort", "has no column 'sort'"),
        (lambda: rows(), "image=note", r"column note holds no images .*: cast it to datasets\.Image\(\)"),
        (lambda: datasets.DatasetDict(other=rows()), "", "has the splits other: keep at most one called as each of"),
        (lambda: datasets.DatasetDict(val=rows(), valid=rows()), "", "has the splits val, valid: keep at most one"),
        (lambda: datasets.DatasetDict(test=rows()), "", r"has no split train \(it has test\)"),
        (
            lambda: datasets.DatasetDict(train=rows(), test=rows().remove_columns("kind")),
            "",
            "split test has no column 'kind'",
        ),
        (lambda: rows(kind=[0] * 12, names=("ant", "bee", "cat")), "", "'bee' in train: holds no images"),
        (lambda: rows(), "test=50%,resize=x", "data set huggingface: resize is x"),
    ],
)
def test_what_cannot_be_used(saved, content, options, complaint):
    with pytest.raises((DataError, UsageError), match=complaint) as error:
        dataset(f"huggingface:{options}", root=saved(content()))
    assert "\n" not in str(error.value)


@pytest.mark.fault(132)
def test_all_bad_rows_are_named_at_once_or_left_out(saved):
    cut = {"bytes": b"\x89PNG\r\n\x1a\n", "path": None}
    images = [Image.fromarray(each) for each in PIXELS[:9]] + [cut, None, Image.fromarray(PIXELS[0])]
    root = saved(rows(picture=images, kind=[0, 1] * 5 + [0, None]))
    with pytest.raises(DataError, match="3 files cannot be used: ") as error:
        dataset("huggingface", root=root)
    for part in ("train/000009: cannot be read", "train/000010: holds no image", "train/000011: has no class"):
        assert part in str(error.value)
    data = dataset("huggingface:skip_bad=true", root=root)
    assert len(data.train) + len(data.test) == 9 and data.left_out == ("train/000009", "train/000010", "train/000011")


@pytest.mark.fault(132)
def test_folders_that_are_missing_half_made_or_others(saved, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file: give a folder that save_to_disk"):
        dataset("huggingface", root=tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"has neither dataset_dict\.json nor state\.json"):
        dataset("huggingface", root=tmp_path / "other")
    root = saved(rows())
    arrow = next(root.glob("*.arrow"))
    whole = arrow.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"x" * 99, None):
        arrow.unlink()
        if content is not None:
            arrow.write_bytes(content)
        with pytest.raises(DataError, match="saved") as error:
            dataset("huggingface", root=root)
        assert "\n" not in str(error.value)
        arrow.write_bytes(whole)
    for name in ("state.json", "dataset_info.json"):
        text = (root / name).read_text()
        (root / name).write_text(text[: len(text) // 2])
        with pytest.raises(DataError, match="saved: cannot be read"):
            dataset("huggingface", root=root)
        (root / name).write_text(json.dumps(json.loads(text)))
    shutil.rmtree(root)


@pytest.mark.fault(132)
def test_without_the_package_the_line_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"the package datasets is not installed here: .* pip install .*datasets"):
        dataset("huggingface", root=tmp_path)
