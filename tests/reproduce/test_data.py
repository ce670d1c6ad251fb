"""What a data set is, in whatever file, and the part of one that a protocol takes."""

import numpy as np
import pytest

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.runs.metadata import data_digests
from codistill.sweeps.reproduce import data as module
from codistill.sweeps.reproduce.cells import contents, protocols, rules
from codistill.sweeps.reproduce.data import data_name, located, write_subset

from .. import tiny


def test_a_data_set_is_known_by_its_loader_or_by_its_arrays():
    assert data_name("cifar100:download=true", {}) == "cifar100"
    assert data_name("cinic10:train_on=train+valid", {}) == "cinic10:train_on=train+valid"
    arrays = rules()["data"]["cifar100"]["sha256"]
    assert sorted(arrays) == ["test images", "test labels", "training images", "training labels"]
    assert data_name("packed", arrays | {"positions of held-out images": "1"}) == "cifar100"
    assert data_name("packed", arrays | {"test labels": "0"}) == "packed"
    assert data_name("packed", rules()["data"]["cifar100-small"]["sha256"]) == "cifar100-small"


def shuffled(data, seed):
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(split)) for split in (data.train, data.test)]
    parts = (cd.Split(s.images[o], s.labels[o]) for s, o in zip((data.train, data.test), orders, strict=True))
    return cd.Dataset("cifar100", *parts, data.class_names)


@pytest.fixture
def whole(monkeypatch):
    """A data set of 3 classes in place of CIFAR-100, of which the protocol takes 4 images a class."""
    data = cd.Dataset("cifar100", tiny.split(60, 0), tiny.split(12, 1), tiny.CLASSES)
    known = {
        "cifar100": {"sha256": data_digests(data)},
        "cifar100-small": {"of": "cifar100", "each": 4, "sha256": {"a": 1}},
    }
    monkeypatch.setattr(module, "rules", lambda: {"data": known})
    return data


def test_the_part_is_the_same_in_any_order_and_has_as_many_of_each_class(whole, tmp_path):
    files = [
        write_subset(data, "cifar100-small", tmp_path / f"{i}.npz")
        for i, data in enumerate((whole, shuffled(whole, 5)))
    ]
    first, second = (cd.dataset("packed", str(file)) for file in files)
    assert data_digests(first) == data_digests(second)
    assert np.bincount(first.train.labels).tolist() == [4, 4, 4] and len(first.test) == 12
    pairs = {(image.tobytes(), int(label)) for image, label in zip(whole.train.images, whole.train.labels, strict=True)}
    assert {(i.tobytes(), int(n)) for i, n in zip(first.train.images, first.train.labels, strict=True)} <= pairs


def test_a_protocol_takes_its_part_of_the_whole_or_of_the_part(whole, tmp_path, monkeypatch):
    cells = contents("table1", protocols()["small"]).cells
    file = tiny.write_npz(tmp_path / "cifar100.npz", whole)
    kept, place = located(cells, protocols()["small"], "packed", str(file), tmp_path / "out")
    part = tmp_path / "out" / "cifar100-small.npz"
    assert kept == cells and place == {"data": "packed", "data_dir": str(part)}
    known = {"sha256": data_digests(cd.dataset("packed", str(part)))}
    monkeypatch.setattr(module, "rules", lambda: {"data": {"cifar100-small": known | {"of": "cifar100", "each": 4}}})
    assert located(cells, protocols()["small"], "packed", str(part), tmp_path) == (cells, place)
    with pytest.raises(UsageError, match="data set packed: the cells are of cifar100-small: name other cells"):
        located(cells, protocols()["small"], "packed", str(file), tmp_path)


def test_rows_of_other_data_sets_are_left_out(whole, tmp_path):
    cells = contents("table1", protocols()["paper"], ("resnet20/*",)).cells
    file = tiny.write_npz(tmp_path / "cifar100.npz", whole)
    kept, place = located(cells, protocols()["paper"], "packed", str(file), tmp_path)
    assert {cell.row for cell in kept} == {"resnet20/cifar100"} and place["data_dir"] == str(file)
    assert located(cells, protocols()["paper"], None, "data", tmp_path) == (cells, {"data_dir": "data"})


def test_a_dry_run_needs_no_images(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "methods", "--protocol", "small", "--dry-run", "--seeds", "0", "--slots", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 runs of teachers to train\n") and "runs of students to train" in said
    assert "mfef-resnet20x2" in said and tiny.listing(tmp_path) == {}
