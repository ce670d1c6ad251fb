"""Every predictor in every format: the file alone answers as the run does, or it is removed."""

import copy
import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import nn

import codistill as cd
from codistill.cli import main
from codistill.core.errors import CheckpointError, CodistillError, DataError, ResourceError, UsageError
from codistill.deploy import export
from codistill.deploy.classifier import CARD_KEY, Classifier, load_classifier
from codistill.deploy.export import Exported, choose_format, export_predictor
from codistill.networks import NETWORKS

from .. import tiny

PREDICTORS = ("student0", "ensemble", "fused")
FORMATS = tuple(export.WRITERS)


@pytest.fixture(scope="module")
def exported(digits_run):
    """Export a predictor of the run to a format, once."""
    done: dict[tuple[str, str], Exported] = {}

    def export_once(predictor: str, format: str) -> Exported:
        if (predictor, format) not in done:
            done[predictor, format] = export_predictor(digits_run, predictor, format=format)
        return done[predictor, format]

    return export_once


@pytest.fixture(scope="module")
def pixels(digits_run):
    """Test images as the files take them: uint8 [images, 3, height, width]."""
    return np.ascontiguousarray(digits_run.load_data().test.images.transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def expected(digits_run, pixels):
    """The logits of each predictor, computed from the checkpoint with nothing of export's."""
    data, method = digits_run.load_data(), digits_run.load_method()
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in data.statistics)
    with torch.no_grad():
        outputs = method((torch.from_numpy(pixels) / 255 - mean) / std)
        return method.predictions(outputs)


TOLERANCE = 1e-4  # absolute and relative: float32 sums in another order


def test_the_run_tells_images_apart(expected):
    # Or the comparisons below would pass with the logits of any other image.
    for name in PREDICTORS:
        allowed = TOLERANCE * (1 + expected[name].abs().max())
        assert expected[name].std(dim=0).min() > 10 * allowed, name


# Slow where several networks are traced; tiny ones are, in test_networks_and_data_of_ones_own.
TRACED = itertools.product(("ensemble", "fused"), ("onnx", "torch-export"))
CASES = [*itertools.product(["student0"], FORMATS), ("ensemble", "safetensors"), ("fused", "safetensors")]
CASES += [pytest.param(*each, marks=pytest.mark.slow) for each in TRACED]


@pytest.mark.parametrize(("predictor", "format"), CASES)
def test_a_file_answers_as_the_run_does(exported, digits_run, expected, pixels, predictor, format):
    done = exported(predictor, format)
    assert done.path == digits_run.path / "exports" / f"{predictor}{export.SUFFIXES[format]}"
    assert (done.predictor, done.images, done.agreement) == (predictor, 40, 1.0)
    assert done.difference < 1e-4
    assert done.parameters == digits_run.summary["parameters"][predictor]
    if format == "torch-export":
        logits = torch.export.load(done.path).module()(torch.from_numpy(pixels))
    elif format == "onnx":
        session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(["logits"], {"images": pixels})[0])
    else:
        logits = load_classifier(done.path).logits(digits_run.load_data().test.images)
    torch.testing.assert_close(logits, expected[predictor], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_says_what_it_is(exported, digits_run, format):
    path = exported("student0", format).path
    if format == "safetensors":
        with safetensors.safe_open(path, "pt") as file:
            card = json.loads(file.metadata()[CARD_KEY])
    elif format == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        card = json.loads(session.get_modelmeta().custom_metadata_map[CARD_KEY])
    else:
        extra = {f"{CARD_KEY}.json": ""}
        torch.export.load(path, extra_files=extra)
        card = json.loads(extra[f"{CARD_KEY}.json"])
    data = digits_run.load_data()
    assert (card["predictor"], card["networks"], card["image_size"]) == ("student0", ["resnet20"] * 2, [32, 32])
    assert card["class_names"] == [f"digit {digit}" for digit in range(10)]
    assert (tuple(card["mean"]), tuple(card["std"])) == data.statistics
    assert card["method"]["name"] == "mfef" and card["trained_on"] == "packed"
    assert card["environment"]["torch"] == torch.__version__


def test_weights_alone_are_those_of_the_student_and_no_others(exported, digits_run):
    with safetensors.safe_open(exported("student0", "safetensors").path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert not [name for name in weights if "peer" in name or "fusion" in name or "student" in name]
    assert {name.partition(".")[0] for name in weights} == {"stages", "head"}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    trained = {name: tensor for name, tensor in weights.items() if not name.endswith(buffers)}
    assert sum(tensor.numel() for tensor in trained.values()) == digits_run.summary["parameters"]["student0"]
    # They load into a network made by hand: student 0 with its components before the classifier.
    student = digits_run.load_method().predictors()["student0"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in student.state_dict().items())
    assert weights.keys() == student.state_dict().keys()


def test_a_predictor_is_one_file_that_others_may_read(exported):
    for format in FORMATS:
        path = exported("student0", format).path
        assert path.stat().st_mode & 0o444 == 0o444, format
    known = {f"{name}{suffix}" for name in PREDICTORS for suffix in export.SUFFIXES.values()}
    assert {each.name for each in path.parent.iterdir()} <= known


def test_an_onnx_file_tells_nothing_of_the_machine_that_wrote_it(exported):
    content = exported("student0", "onnx").path.read_bytes()
    assert b"/site-packages/" not in content and str(Path(export.__file__).parent).encode() not in content


@pytest.mark.parametrize("batch", [1, 3, 300])
def test_onnx_takes_pixels_in_batches_of_any_size(exported, pixels, expected, batch):
    session = onnxruntime.InferenceSession(exported("student0", "onnx").path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    chosen = np.arange(batch) % 40
    (logits,) = session.run(["logits"], {"images": pixels[chosen]})
    np.testing.assert_allclose(logits, expected["student0"][chosen].numpy(), rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="uint8"):
        session.run(["logits"], {"images": pixels[chosen].astype(np.float32)})


@pytest.fixture(scope="module")
def tiny_run(tiny_registered, tmp_path_factory):
    """A run whose best and last epochs differ."""
    folder = tmp_path_factory.mktemp("export")
    data = tiny.data(train=96, test=30)
    path = tiny.write_npz(
        folder / "colours.npz",
        dataclasses.replace(data, test=cd.Split(data.test.images, (data.test.labels + 1) % 3)),
    )
    torch.manual_seed(0)
    method = cd.MFEF([cd.network("tiny", 3), cd.network("tiny", 3)], 3, image_size=(8, 8))
    settings = tiny.settings(epochs=4, milestones=(), learning_rate=0.02)
    cd.train(method, cd.dataset("packed", path), out=folder / "run", settings=settings, show=False)
    run = cd.Run(folder / "run")
    assert run.summary["best_epoch"] < 4
    return run


def test_last_and_best_weights_are_different_files(tiny_run, tmp_path):
    for which in ("last", "best"):
        path = tmp_path / f"{which}.safetensors"
        export_predictor(tiny_run, "student1", path, which=which)
        student = tiny_run.load_method(which).predictors()["student1"].state_dict()
        with safetensors.safe_open(path, "pt") as file:
            assert all(torch.equal(tensor, file.get_tensor(name)) for name, tensor in student.items())
        line = ["export", str(tiny_run.path), "--predictor", "student1", "--checkpoint", which]
        assert main([*line, "--out", str(tmp_path / f"{which}-too.safetensors")]) == 0
        assert (tmp_path / f"{which}-too.safetensors").read_bytes() == path.read_bytes()
    assert (tmp_path / "last.safetensors").read_bytes() != (tmp_path / "best.safetensors").read_bytes()


def test_the_best_student_is_the_default(tiny_run, tmp_path):
    done = export_predictor(tiny_run, file=tmp_path / "x.safetensors")
    assert done.predictor == tiny_run.best_student()


@pytest.mark.parametrize(
    ("file", "format", "answer"),
    [
        ("x.onnx", None, "onnx"),
        ("x.safetensors", None, "safetensors"),
        ("x.pt2", None, "torch-export"),
        ("x.int8.onnx", None, "onnx-int8"),
        ("x.onnx", "onnx-int8", "onnx-int8"),
        (None, "onnx", "onnx"),
        ("a.b.onnx", "onnx", "onnx"),
        (None, None, "no format: give --format safetensors or onnx or onnx-int8 or torch-export"),
        ("x.txt", None, "no format"),
        ("x", None, "no format"),
        ("x.onnx", "safetensors", "x.onnx: the name of a file in safetensors must end in .safetensors"),
        ("x.onnx", "tflite", "unknown format 'tflite': choose from safetensors, onnx, onnx-int8, torch-export"),
    ],
)
def test_the_format_follows_the_file(file, format, answer):
    file = None if file is None else Path(file)
    if answer in export.SUFFIXES:
        assert choose_format(file, format) == answer
    else:
        with pytest.raises(UsageError, match=answer):
            choose_format(file, format)


def test_an_unknown_predictor_is_refused(tiny_run, tmp_path):
    with pytest.raises(UsageError, match="no predictor 'student2': choose from student0, student1, ensemble, fused"):
        export_predictor(tiny_run, "student2", tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["folder.safetensors", "file/x.safetensors"])
def test_a_place_that_cannot_be_written_is_refused(tiny_run, tmp_path, out):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("precious")
    before = tiny.listing(tmp_path)
    with pytest.raises(UsageError, match="choose another file"):
        export_predictor(tiny_run, "student0", tmp_path / out)
    assert tiny.listing(tmp_path) == before


def perturbing(write, amount: float):
    """Make a writer that writes other weights than it was given."""

    def perturbed(module: nn.Module, card: dict, path: Path) -> None:
        other = copy.deepcopy(module)
        with torch.no_grad():
            next(other.parameters()).add_(amount)
        write(other, card, path)

    return perturbed


@pytest.mark.parametrize(
    ("writer", "suffix", "old"),
    [
        ("safetensors", ".safetensors", None),
        ("safetensors", ".safetensors", b"a good file"),
        ("torch-export", ".pt2", b"a good file"),
    ],
)
def test_a_file_that_answers_otherwise_is_not_kept(tiny_run, tmp_path, monkeypatch, writer, suffix, old):
    path = tmp_path / f"x{suffix}"
    if old is not None:
        path.write_bytes(old)
    before = tiny.listing(tmp_path)
    write = export.WRITERS[writer]
    monkeypatch.setitem(export.WRITERS, writer, perturbing(write, 0.5))
    with pytest.raises(CheckpointError, match=r"not kept, for it differs from the run by up to \d\S* in a logit"):
        export_predictor(tiny_run, "student0", path)
    assert tiny.listing(tmp_path) == before
    # A difference as of rounding is allowed.
    monkeypatch.setitem(export.WRITERS, writer, perturbing(write, 1e-7))
    assert 0 < export_predictor(tiny_run, "student0", path).difference < 1e-4
    assert list(tiny.listing(tmp_path)) == [path.name] and path.read_bytes() != old


@pytest.mark.parametrize("changed", [{"difference": float("nan")}, {"difference": 0.01}, {"agreement": 0.9}])
def test_what_is_not_alike_is_refused(tiny_run, tmp_path, monkeypatch, changed):
    alike = {"images": 30, "difference": 0.0, "allowed": 0.001, "agreement": 1.0}
    monkeypatch.setattr(export, "compare", lambda *_: alike | changed)
    with pytest.raises(CheckpointError, match="not kept"):
        export_predictor(tiny_run, "student0", tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_takes_one_size_of_batch_is_not_kept(tiny_run, tmp_path, monkeypatch):
    def fixed(path, predictor=None):
        whole = load_classifier(tiny_run.path, "student0")
        return Classifier(whole.card, lambda images: whole.compute(images) * (1 if len(images) > 1 else 1.1))

    monkeypatch.setattr(export, "load_classifier", fixed)
    with pytest.raises(CheckpointError, match="not kept"):
        export_predictor(tiny_run, "student0", tmp_path / "x.safetensors")


def test_a_writer_that_breaks_off_leaves_nothing(tiny_run, tmp_path, monkeypatch):
    def fail(module, card, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export.WRITERS, "safetensors", fail)
    (tmp_path / "x.safetensors").write_bytes(b"a good file")
    with pytest.raises(ResourceError, match=r"x\.safetensors: No space left"):
        export_predictor(tiny_run, "student0", tmp_path / "x.safetensors")
    assert tiny.listing(tmp_path) == {"x.safetensors": b"a good file"}


def test_without_the_data_nothing_is_written(tiny_run, tmp_path):
    other = tiny.write_npz(tmp_path / "other.npz", tiny.data(size=(9, 9)))
    for data_dir, message in (
        (tmp_path / "none.npz", "no such file"),
        (other, "other image size than .* was trained on"),
    ):
        with pytest.raises(DataError, match=message):
            export_predictor(tiny_run, "student0", tmp_path / "x.safetensors", data_dir=str(data_dir))
    assert [path.name for path in tmp_path.iterdir()] == ["other.npz"]
    moved = tiny.write_npz(tmp_path / "moved.npz", tiny.data(test=12))
    assert export_predictor(tiny_run, "student0", tmp_path / "x.safetensors", data_dir=str(moved)).images == 12


@pytest.mark.fault(92)
@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_fix(tiny_run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    how = re.escape(f"{sys.executable} -m pip install 'onnx>=")  # codistill itself is in no index
    with pytest.raises(UsageError, match=rf"export to onnx needs the package {package}: {how}"):
        export_predictor(tiny_run, "student0", tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_modules_that_students_share_are_written_once(tiny_registered, tmp_path):
    data = cd.dataset("packed", tiny.write_npz(tmp_path / "colours.npz", tiny.data()))
    students = [cd.network("tiny", 3), cd.network("tiny", 3)]
    method = cd.MFEF(students, 3, cd.MFEF.Settings(share_components=True), (8, 8))
    run = cd.train(method, data, out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    for predictor, module in run.load_method().predictors().items():
        done = export_predictor(run, predictor, format="safetensors")
        written = safetensors.torch.load_file(done.path).values()
        wanted = [*module.parameters(), *module.buffers()]
        assert done.difference < 1e-6 and sum(map(torch.numel, written)) == sum(map(torch.numel, wanted)), predictor


def test_networks_and_data_of_ones_own(tmp_path):
    data, method = tiny.data(test=12), tiny.method()
    run = cd.train(method, data, out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    with pytest.raises(UsageError, match="the run has networks of your own, that have no name: export to onnx"):
        run.export("student0", tmp_path / "student.safetensors")
    path = run.export("fused", tmp_path / "fused.onnx")
    assert path == tmp_path / "fused.onnx"
    logits = load_classifier(path).logits(data.test.images)
    images = cd.data.augment.DeviceImages(data.test, data.statistics, torch.device("cpu"))
    with torch.no_grad():
        expected = method.eval()(images.batch(0, 12)[0]).fused_logits
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fused.onnx", "run"]
    # Another process has neither the networks nor the data.
    with pytest.raises(CodistillError, match="of your own"):
        cd.Run(run.path).export("student0", tmp_path / "student.onnx")


class Scaled(nn.Module):
    """A layer with all that a file of weights lacks, and whose making and pass read values."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.rate, self.plain, self.limit = torch.linspace(0, 1, 3).tolist()[1], torch.full((1, 3, 1, 1), 0.5), limit
        self.register_buffer("unsaved", torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1), persistent=False)

    def forward(self, images):
        scaled = images * self.rate * self.plain * self.unsaved
        return scaled.clamp(max=self.limit) if self.limit and scaled.max() > self.limit else scaled


@pytest.fixture
def run_of_scaled(tmp_path, no_pages, monkeypatch):
    def build(num_classes: int, limit: float = 0.0) -> cd.Network:
        """A tiny network behind `Scaled`."""
        plain = tiny.network(num_classes)
        return cd.Network([Scaled(limit), *plain.stages], plain.head, [3, *plain.widths])

    monkeypatch.setitem(NETWORKS._entries, "scaled", build)
    data = cd.dataset("packed", tiny.write_npz(tmp_path / "colours.npz", tiny.data()))

    def run(spec: str) -> cd.Run:
        method = cd.DML([cd.network(spec, 3) for _ in range(2)], 3, image_size=(8, 8))
        return cd.train(method, data, epochs=1, out=tmp_path / "run", settings=tiny.settings(), show=False)

    return run


@pytest.mark.fault(80)
def test_constants_that_are_no_weights_are_in_what_is_loaded(run_of_scaled, tmp_path):
    run = run_of_scaled("scaled")
    images = tiny.data().test.images
    for path in (run.export("student0", tmp_path / "student.safetensors"), run.path):
        expected = load_classifier(run.path, "student0").logits(images)
        torch.testing.assert_close(load_classifier(path, "student0").logits(images), expected)


@pytest.mark.fault(80)
def test_what_cannot_be_traced_is_refused_in_one_line(run_of_scaled, tmp_path, capfd):
    run = run_of_scaled("scaled:limit=2.5")
    capfd.readouterr()
    with pytest.raises(UsageError, match="cannot trace this predictor"):
        run.export("student0", tmp_path / "student.pt2")
    assert not (tmp_path / "student.pt2").exists() and capfd.readouterr() == ("", "")
    assert run.export("student0", tmp_path / "student.safetensors").exists()
