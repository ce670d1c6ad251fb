"""Class names for image files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from codistill.core.errors import DataError
from codistill.deploy.classifier import Classifier, load_classifier
from codistill.deploy.export import export_predictor
from codistill.deploy.predict import predict

from .. import tiny


@pytest.fixture(scope="module", params=["run", "onnx"])
def classifier(request, digits_run):
    if request.param == "run":
        return load_classifier(digits_run.path, "student0")
    path = digits_run.path / "exports" / "student0.onnx"
    if not path.exists():
        export_predictor(digits_run, "student0", path)
    return load_classifier(path)


@pytest.fixture(scope="module")
def images(digits_run):
    return digits_run.load_data().test.images


@pytest.fixture(scope="module")
def expected(digits_run, images):
    """Softmax probabilities, computed from the checkpoint with nothing of predict's."""
    student = digits_run.load_method().predictors()["student0"]
    facts = digits_run.metadata["dataset"]
    mean, std = (torch.tensor(facts[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return student((torch.from_numpy(images.transpose(0, 3, 1, 2).copy()) / 255 - mean) / std).softmax(dim=1)


def saved(folder, pictures: list[Image.Image], suffix: str = ".png") -> list:
    paths = [folder / f"image{index}{suffix}" for index in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


def assert_answers(predictions, paths, probabilities: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert [each.image for each in predictions] == paths
    for each, row in zip(predictions, probabilities, strict=True):
        assert each.classes[0] == f"digit {int(row.argmax())}"
        assert len(each.classes) == len(set(each.classes)) == 10
        shares = dict(zip(each.classes, each.probabilities, strict=True))
        assert [shares[f"digit {digit}"] for digit in range(10)] == pytest.approx(row.tolist(), abs=tolerance)
        assert list(each.probabilities) == sorted(each.probabilities, reverse=True)


def test_test_images_get_the_answers_of_the_run(classifier, images, expected, tmp_path):
    paths = saved(tmp_path, [Image.fromarray(image) for image in images[:12]])
    assert expected[:12].std(dim=0).min() > 0.001
    assert_answers(predict(classifier, paths, top=10), paths, expected[:12])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_grey_transparent_and_palette_images_are_the_same_pictures(classifier, images, expected, tmp_path, mode):
    paths = saved(tmp_path, [Image.fromarray(image).convert("L").convert(mode) for image in images[:3]])
    assert_answers(predict(classifier, paths, top=10), paths, expected[:3])


def test_images_of_another_size_are_scaled_and_cut(classifier, digits_run, images, expected, tmp_path):
    # Each pixel doubled, then averaged again by the bilinear filter: nearly the old image.
    doubled = [Image.fromarray(image.repeat(2, axis=0).repeat(2, axis=1)) for image in images[:4]]
    # And the same between borders on the left and right, which are to be cut off.
    wide = [Image.new("RGB", (64 + 2 * 30, 64), "white") for _ in doubled]
    for frame, picture in zip(wide, doubled, strict=True):
        frame.paste(picture, (30, 0))
    for name, pictures in (("doubled", doubled), ("wide", wide)):
        folder = tmp_path / name
        folder.mkdir()
        paths = saved(folder, pictures)
        small = np.stack([np.array(each.resize((32, 32), Image.Resampling.BILINEAR)) for each in doubled])
        logits = load_classifier(digits_run.path, "student0").logits(small)
        found = predict(classifier, paths, top=10)
        if name == "doubled":
            assert_answers(found, paths, logits.softmax(dim=1))
        for each, row in zip(found, logits.softmax(dim=1), strict=True):
            shares = dict(zip(each.classes, each.probabilities, strict=True))
            assert [shares[f"digit {digit}"] for digit in range(10)] == pytest.approx(row.tolist(), abs=0.02)


def test_the_order_of_the_images_is_kept(classifier, images, expected, tmp_path):
    paths = saved(tmp_path, [Image.fromarray(image) for image in images[:5]])
    order = [3, 0, 4, 0]
    assert_answers(
        predict(classifier, [paths[index] for index in order], top=10), [paths[i] for i in order], expected[order]
    )


@pytest.mark.parametrize(("top", "count"), [(1, 1), (3, 3), (10, 10), (99, 10)])
def test_as_many_classes_as_asked_for(classifier, images, tmp_path, top, count):
    paths = saved(tmp_path, [Image.fromarray(images[0])])
    (found,) = predict(classifier, paths, top)
    assert len(found.classes) == len(found.probabilities) == count
    if top >= 10:
        assert sum(found.probabilities) == pytest.approx(1)


def test_equal_probabilities_keep_the_order_of_the_classes(tmp_path):
    card = {"class_names": ["b", "a", "c"], "image_size": [8, 8]}
    classifier = Classifier(card, lambda images: torch.zeros(len(images), 3))
    paths = saved(tmp_path, [Image.fromarray(tiny.data().test.images[0])])
    (found,) = predict(classifier, paths)
    assert found.classes == ("b", "a", "c") and found.probabilities == pytest.approx((1 / 3,) * 3)


def test_a_bad_image_is_named(classifier, images, tmp_path):
    paths = saved(tmp_path, [Image.fromarray(image) for image in images[:3]])
    paths[1].write_bytes(paths[1].read_bytes()[:-30])
    (tmp_path / "empty").mkdir()
    for path in (paths[1], tmp_path / "none.png", tmp_path / "empty"):
        with pytest.raises(DataError, match=f"^{path}: ") as error:
            predict(classifier, [paths[0], path])
        assert "\n" not in str(error.value)
        missing = ": no such file or folder: name an image, or a folder of images"
        assert str(error.value).endswith(missing) == (path.name == "none.png")


@pytest.mark.fault(51)
def test_folders_are_searched_to_any_depth(tmp_path, capsys):
    classifier = Classifier({"class_names": ["a", "b"], "image_size": [8, 8]}, lambda part: torch.zeros(len(part), 2))
    inner = tmp_path / "b" / "c"
    inner.mkdir(parents=True)
    (inner / "loop").symlink_to(tmp_path)
    os.mkfifo(inner / "pipe.png")  # which would be waited for, and for ever
    for name in ("a.png", "b/c/d.PNG", "b/x.jpg", ".hidden.png", "notes.txt"):
        Image.fromarray(tiny.data().test.images[0]).save(tmp_path / name, format="png")
    found = [str(each.image.relative_to(tmp_path)) for each in predict(classifier, [tmp_path])]
    assert found == ["a.png", "b/c/d.PNG", "b/x.jpg"]
    assert capsys.readouterr().err == f"codistill: {tmp_path}: passed over 2 files that are no images by their names\n"
