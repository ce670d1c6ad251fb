"""One pass over a split against the predictors one by one."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import codistill as cd
from codistill.core.errors import DataError, UsageError
from codistill.data.augment import DeviceImages
from codistill.evaluation.evaluation import Evaluation, evaluate
from codistill.runs.evaluate import evaluate_run

from .. import tiny

CPU = torch.device("cpu")


@pytest.fixture(params=[cd.MFEF, cd.FFL, cd.Independent], ids=lambda kind: kind.name)
def trained(request):
    """A method whose running statistics are neither those of a batch nor those of the start."""
    method = tiny.method(request.param)
    for seed in range(3):
        method(3 * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 1)
    return method


@pytest.fixture
def images():
    data = tiny.data(test=50)
    return DeviceImages(data.test, data.statistics, CPU)


def test_one_pass_equals_the_predictors_one_by_one(trained, images):
    found = evaluate(trained, images, batch_size=20)
    pixels, labels = images.batch(0, 50)
    predictors = trained.eval().predictors()
    assert list(found) == list(predictors)
    for name, predictor in predictors.items():
        with torch.no_grad():
            logits = predictor(pixels)
        assert found[name].top1_error == pytest.approx(100 * (logits.argmax(dim=1) != labels).double().mean().item())
        assert found[name].nll == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_uses_running_statistics_and_leaves_everything_as_it_was(trained, images, training):
    trained.train(training)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    # Alone, an image has other batch statistics than among fifty.
    alone, together = (evaluate(trained, images, batch_size=size) for size in (1, 50))
    for name in together:
        for field, value in dataclasses.asdict(together[name]).items():
            assert getattr(alone[name], field) == pytest.approx(value, rel=1e-4), (name, field)
    assert trained.training is training and all(module.training is training for module in trained.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert all(parameter.grad is None for parameter in trained.parameters())


class Convolutions(TorchDispatchMode):
    """Count convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_all_predictors_are_scored_from_one_pass_of_the_trunk_and_of_each_branch(trained, images):
    with Convolutions() as convolutions:
        evaluate(trained, images)
    assert convolutions.count == sum(isinstance(module, torch.nn.Conv2d) for module in trained.modules())


def test_the_host_reads_once(trained, images):
    with tiny.HostReads() as reads:
        evaluate(trained, images, batch_size=7)
    assert reads.found == ["tolist"]


def test_bf16_is_near(trained, images):
    wide, narrow = evaluate(trained, images), evaluate(trained, images, "bf16")
    for name in wide:
        assert narrow[name].nll == pytest.approx(wide[name].nll, rel=0.1)
        assert narrow[name].nll != wide[name].nll


@pytest.fixture(scope="module")
def run(tiny_registered, tmp_path_factory):
    """A finished run of a registered network on a file."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = cd.dataset("packed", tiny.write_npz(folder / "colours.npz", tiny.data()))
    torch.manual_seed(0)
    students = [cd.network("tiny", 3), cd.network("tiny", 3)]
    settings = tiny.settings(epochs=4, learning_rate=0.5, milestones=())
    cd.train(cd.MFEF(students, 3, image_size=(8, 8)), data, out=folder / "run", settings=settings, show=False)
    return cd.Run(folder / "run")


def test_a_run_has_the_scores_that_training_saw(run):
    rows = run.metrics()
    for which, row in (("last", rows[-1]), ("best", rows[run.summary["best_epoch"] - 1])):
        found = evaluate_run(run, which, device="cpu")
        assert list(found) == ["student0", "student1", "ensemble", "fused"]
        for name, scores in found.items():
            assert dataclasses.asdict(scores) == pytest.approx(row["test"][name], rel=1e-4), (which, name)


def test_the_data_may_have_moved(run, tmp_path):
    same = tiny.write_npz(tmp_path / "moved.npz", tiny.data())
    assert evaluate_run(run, data_dir=str(same), device="cpu") == evaluate_run(run, device="cpu")


@pytest.mark.parametrize("other", ["classes", "size"])
def test_other_data_is_refused(run, tmp_path, other):
    data = tiny.data(size=(9, 8)) if other == "size" else tiny.data()
    if other == "classes":
        data = dataclasses.replace(data, class_names=("red", "blue", "green"))
    path = tiny.write_npz(tmp_path / "other.npz", data)
    with pytest.raises(
        DataError,
        match=rf"other {'classes' if other == 'classes' else 'image size'} than those of the run: .* was trained on",
    ):
        evaluate_run(run, data_dir=str(path), device="cpu")


def test_the_normalisation_is_that_of_the_training(run, tmp_path):
    # The same test images beside brighter training images: the statistics of the new file must not count.
    data = tiny.data()
    brighter = cd.Split(np.maximum(data.train.images, 100), data.train.labels)
    path = tiny.write_npz(tmp_path / "brighter.npz", dataclasses.replace(data, train=brighter))
    assert evaluate_run(run, data_dir=str(path), device="cpu") == evaluate_run(run, device="cpu")


def test_a_wrong_device_is_refused(run):
    with pytest.raises(UsageError, match="device 'tpu'"):
        evaluate_run(run, device="tpu")


@pytest.mark.slow
@pytest.mark.gpu
def test_predictions_of_a_captured_pass_are_those_of_the_weights_of_now():
    data, device = tiny.data(test=50), torch.device("cuda")
    method = tiny.method().to(device)
    images = DeviceImages(data.test, data.statistics, device)
    captured, plain = (Evaluation(method, {"test": images}, batch_size=20, captured=each) for each in (True, False))
    for _ in range(3):
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(torch.randn(parameter.shape).to(device), alpha=0.3)
        captured.run()
        plain.run()
        found, wanted = (each.predictions()["test"].predictors for each in (captured, plain))
        for name, ranked in wanted.items():
            assert (found[name].classes == ranked.classes).all()
            np.testing.assert_allclose(found[name].log_probabilities, ranked.log_probabilities, rtol=1e-4, atol=1e-5)
