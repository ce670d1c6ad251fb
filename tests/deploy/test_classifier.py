"""Predictors from run folders and files; hostile and damaged files are refused before any of their code runs."""

import json
import shutil

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

import codistill as cd
from codistill.core.errors import CheckpointError, UsageError
from codistill.data.augment import DeviceImages
from codistill.deploy.classifier import CARD_KEY, Classifier, load_classifier, load_predictor, make_card
from codistill.deploy.export import export_predictor

from .. import tiny

NAMES = ("model.safetensors", "model.onnx")


@pytest.fixture(scope="module")
def run(tiny_registered, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    data = cd.dataset("packed", tiny.write_npz(folder / "colours.npz", tiny.data(test=30)))
    torch.manual_seed(0)
    method = cd.MFEF([cd.network("tiny", 3), cd.network("tiny:width=12", 3)], 3, image_size=(8, 8))
    cd.train(method, data, out=folder / "run", settings=tiny.settings(), show=False)
    return cd.Run(folder / "run")


@pytest.fixture(scope="module")
def files(run):
    return {name: export_predictor(run, "ensemble", run.path / name).path for name in NAMES}


@pytest.fixture
def damaged(files, tmp_path):
    """Copies to damage."""
    return {name: tmp_path / shutil.copy(path, tmp_path / name) for name, path in files.items()}


@pytest.fixture
def images(run):
    return run.load_data().test.images


@pytest.mark.parametrize("name", NAMES)
def test_run_and_files_are_one(run, files, images, name):
    from_run, from_file = load_classifier(run.path, "ensemble"), load_classifier(files[name])
    assert from_file.card == from_run.card
    assert from_file.class_names == ["red", "green", "blue"] and from_file.image_size == (8, 8)
    torch.testing.assert_close(from_file.logits(images), from_run.logits(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(files, images, name):
    classifier = load_classifier(files[name])
    whole = classifier.logits(images)
    torch.testing.assert_close(classifier.logits(images, batch_size=7), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier.logits(images[::-1]), whole.flip(0), rtol=1e-5, atol=1e-5)


def test_large_images_of_a_file_are_read_and_computed_a_few_at_a_time(tmp_path):
    np.save(tmp_path / "images.npy", np.arange(40, dtype=np.uint8).repeat(3 * 256 * 256).reshape(40, 256, 256, 3))
    seen = []

    def compute(planes):
        seen.append(len(planes))
        return planes[:, :2, 0, 0].float()

    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    logits = Classifier({}, compute).logits(mapped)
    assert seen == [32, 8] and logits.tolist() == [[each, each] for each in range(40)]


def test_each_predictor_of_a_run(run, images):
    method = run.load_method()
    normalised, _ = DeviceImages(run.load_data().test, run.load_data().statistics, torch.device("cpu")).batch(0, 30)
    with torch.no_grad():
        expected = method.predictions(method(normalised))
    assert set(expected) == {"student0", "student1", "ensemble", "fused"}
    for name, logits in expected.items():
        torch.testing.assert_close(load_classifier(run.path, name).logits(images), logits, rtol=1e-5, atol=1e-5)
    best = load_classifier(run.path)
    assert best.card["predictor"] == run.best_student()


def test_loading_takes_no_random_numbers(run, files):
    state = torch.get_rng_state()
    for place in (run.path, files["model.safetensors"]):
        card, module = load_predictor(place, "student0" if place == run.path else None)
        assert set(card) == set(make_card(run, "student0"))
        assert all(tensor.device.type == "cpu" for tensor in module.state_dict().values())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [*NAMES, "model.pt2", "folder"])
def test_what_is_not_there(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name}: no such run folder or model file"):
        load_classifier(tmp_path / name)


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "model.pkl", "model", "model.onnx.txt"])
def test_other_kinds_of_files_are_not_opened(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"anything")
    with pytest.raises(
        UsageError, match=r"not a kind of file that is read here.*give \.safetensors, \.onnx or a run"
    ) as error:
        load_classifier(path)
    assert ("can run code" in str(error.value)) is (path.suffix == ".pt2")


RUINS = {
    "random": lambda content: np.random.default_rng(0).bytes(5000),
    "empty": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "text": lambda content: b"hello, world\n" * 10,
    "zeros": lambda content: bytes(len(content)),
    "huge header": lambda content: b"\xff" * 8 + content[8:],
}


@pytest.mark.parametrize("ruin", RUINS)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused(damaged, name, ruin):
    path = damaged[name]
    path.write_bytes(RUINS[ruin](path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{name}: ") as error:
        load_classifier(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def rewrite(path, change=lambda weights, card: None, keep_card: bool = True) -> None:
    """Write a safetensors file again with other weights or another card."""
    weights = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        card = json.loads(file.metadata()[CARD_KEY])
    change(weights, card)
    safetensors.torch.save_file(weights, path, metadata={CARD_KEY: json.dumps(card)} if keep_card else {"x": "y"})


def test_a_file_of_somebody_else_is_refused(damaged):
    rewrite(damaged["model.safetensors"], keep_card=False)
    model = onnx.load(damaged["model.onnx"])
    del model.metadata_props[:]
    onnx.save(model, damaged["model.onnx"])
    for path in damaged.values():
        with pytest.raises(CheckpointError, match="holds no classes and no normalisation: not written by codistill"):
            load_classifier(path)


CHANGES = {
    "another format": (lambda weights, card: card.update(format=2), "of format 2, but this version reads format 1"),
    "no format": (lambda weights, card: card.pop("format"), "damaged, or not written by codistill: KeyError"),
    "an unknown predictor": (lambda weights, card: card.update(predictor="teacher"), "KeyError: 'teacher'"),
    "an unknown network": (
        lambda weights, card: card.update(networks=["tiny21"] * 2),
        "network 'tiny21' is not registered in this program",
    ),
    "an unknown method": (
        lambda weights, card: card["method"].update(name="mfeff"),
        "method 'mfeff' is not registered in this program",
    ),
    "an unknown setting": (lambda weights, card: card["method"].update(tempo=3), "unknown key 'tempo'"),
    "networks of another width": (lambda weights, card: card.update(networks=["tiny", "tiny"]), "model.safetensors: "),
    "other classes": (lambda weights, card: card.update(class_names=["a", "b"]), "size mismatch|shape"),
    "a tensor missing": (
        lambda weights, card: weights.pop(sorted(weights)[0]),
        "ensemble does not fit the networks: .* 1 are missing",
    ),
    "a tensor too many": (
        lambda weights, card: weights.update(x=torch.zeros(1)),
        "ensemble does not fit the networks: x is",
    ),
    "no class names": (lambda weights, card: card.pop("class_names"), "KeyError: 'class_names'"),
    "a card that is a list": (lambda weights, card: card.clear(), "KeyError"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_whose_parts_do_not_fit_is_refused(damaged, change):
    path = damaged["model.safetensors"]
    rewrite(path, CHANGES[change][0])
    with pytest.raises(CheckpointError, match=CHANGES[change][1]) as error:
        load_classifier(path)
    assert "\n" not in str(error.value)


def test_a_rewritten_file_that_is_whole_is_read(damaged, files, images):
    rewrite(damaged["model.safetensors"])
    loaded, original = (load_classifier(place["model.safetensors"]) for place in (damaged, files))
    assert torch.equal(loaded.logits(images), original.logits(images))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_the_predictor_that_is_asked_for_or_is_refused(files, name):
    assert load_classifier(files[name], "ensemble").card["predictor"] == "ensemble"
    with pytest.raises(UsageError, match="holds ensemble, not student1: leave --predictor out, or name the run"):
        load_classifier(files[name], "student1")
