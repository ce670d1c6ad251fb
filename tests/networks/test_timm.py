"""Networks of timm and torchvision by name: stages, names, weights, and a cohort of unlike ones from end to end."""

import numpy as np
import pytest
import torch
from torch import Tensor

import codistill as cd
from codistill.cli import main
from codistill.core.errors import CheckpointError, UsageError
from codistill.networks.likeness import alike

from .. import tiny

timm = pytest.importorskip("timm")
UNLIKE = ["resnet18", "mobilenetv3_small_100", "efficientnet_lite0", "convnext_atto", "regnety_002", "ghostnet_100"]
# Channels of timm's feature maps at the ends of its stages (`feature_info`), and of its last one.
WIDTHS = {
    "resnet18": (64, 64, 128, 256, 512),
    "mobilenetv3_small_100": (16, 16, 24, 48, 576),
    "efficientnet_lite0": (16, 24, 40, 112, 320),
    "convnext_atto": (40, 80, 160, 320),
    "regnety_002": (32, 24, 56, 152, 368),
    "ghostnet_100": (16, 24, 40, 112, 960),
    "mobilevit_xxs": (16, 24, 48, 64, 320),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
    "vit_tiny_patch16_224": (192, 192, 192, 192),
    "mixer_s32_224": (512, 512, 512, 512),
}
SIZE = (64, 64)
QUICK = ["mobilenetv3_small_100", "vit_tiny_patch16_224"]


def by_speed(names: list[str]) -> list[object]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def original(name: str, **options: object) -> torch.nn.Module:
    sized = (
        {"img_size": SIZE} if hasattr(timm.create_model(name), "img_size") or "patch" in name or "mixer" in name else {}
    )
    return timm.create_model(name, num_classes=5, **sized, **options)


@pytest.mark.parametrize("name", by_speed([*WIDTHS]))
def test_stages_names_and_logits_are_those_of_timm(name):
    built, theirs = cd.network(f"timm/{name}", 5, image_size=SIZE), original(name)
    assert built.widths == WIDTHS[name]
    theirs.load_state_dict(built.original_state_dict())  # strict: all names, and no other
    images = torch.randn(3, 3, *SIZE)
    with torch.no_grad():
        feature_map = built.eval().feature_map(images)
        torch.testing.assert_close(built(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)
    assert feature_map.ndim == 4 and feature_map.shape[1] == built.widths[-1] and feature_map.shape[2] > 1
    again = cd.network(built.spec, 5, image_size=SIZE)
    assert alike(again.stages, built.stages)


@pytest.mark.parametrize("name", [QUICK[0], pytest.param(QUICK[1], marks=pytest.mark.slow)])
def test_checkpoints_of_timm_load_by_name(name, tmp_path):
    theirs = original(name)
    torch.save({"epoch": 3, "arch": name, "state_dict": theirs.state_dict()}, tmp_path / "model_best.pth.tar")
    built = cd.network(f"timm/{name}", 5, image_size=SIZE, weights=tmp_path / "model_best.pth.tar")
    assert all(torch.equal(each, built.original_state_dict()[key]) for key, each in theirs.state_dict().items())


def test_options_are_those_of_timm_and_are_in_the_spec():
    built = cd.network("timm/mobilenetv3_small_100:drop_rate=0.3", 5, drop_path_rate=0.1)
    assert built.spec == "timm/mobilenetv3_small_100:drop_path_rate=0.1,drop_rate=0.3"
    rates = {each.drop_prob for each in built.modules() if hasattr(each, "drop_prob")}
    assert max(rates) > 0.05
    assert any(isinstance(each, torch.nn.Dropout) and each.p == 0.3 for each in built.head.modules())


def test_weights_are_drawn_as_timm_draws_them_and_repeat_under_a_seed():
    torch.manual_seed(3)
    first = cd.network("timm/mobilenetv3_small_100", 5)
    torch.manual_seed(3)
    theirs = timm.create_model("mobilenetv3_small_100", num_classes=5)
    assert all(torch.equal(each, first.original_state_dict()[key]) for key, each in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("timm/mobilenetv3_smal_100", "unknown network timm/mobilenetv3_smal_100: did you mean mobilenetv3_small_100"),
        ("timm/?", r"unknown network timm/\?: timm.list_models\(\) shows all"),
        ("timm/resnet18:width=3", r"network timm/resnet18: timm cannot make it: TypeError: .*'width'"),
        ("torchvision/resnet19", "unknown network torchvision/resnet19: did you mean resnet18"),
        ("torchvision/vit_b_16", "its tokens are no map: name one of timm's: timm/vit_tiny_patch16_224"),
        ("torchvision/resnet18:width=3", "torchvision cannot make it: TypeError: .*'width'"),
        ("tim/resnet18", "unknown network 'tim/resnet18'"),
    ],
)
def test_what_is_not_there_says_so(spec, says):
    with pytest.raises(UsageError, match=says):
        cd.network(spec, 5)


@pytest.mark.slow
def test_what_cannot_be_cut_says_what_to_do():
    with pytest.raises(
        UsageError, match=r"^network timm/deit_tiny_distilled_patch16_224 cannot be cut into .*: make a N"
    ):
        cd.network("timm/deit_tiny_distilled_patch16_224", 5, image_size=SIZE)


def test_pretrained_weights_that_cannot_be_fetched_are_one_line(monkeypatch, capsys):
    def offline(*arguments: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    for spec in ("timm/mobilenetv3_small_100:pretrained=true", "torchvision/squeezenet1_1:pretrained=true"):
        with pytest.raises(CheckpointError, match=r"its pretrained weights: .*no network.*: --weights st") as found:
            cd.network(spec, 5)
        assert "\n" not in str(found.value)
    # What is read from a run needs none.
    assert cd.network("timm/mobilenetv3_small_100:pretrained=true", 5, fresh=False).spec.endswith("pretrained=True")
    assert capsys.readouterr().err.count("\n") == 2


def test_pretrained_weights_of_torchvision_but_for_the_classifier(monkeypatch):
    from torchvision import models

    torch.manual_seed(1)
    theirs = models.squeezenet1_1(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: theirs)
    built = cd.network("torchvision/squeezenet1_1:pretrained=true", 5)
    state = built.original_state_dict()
    assert all(torch.equal(each, state[key]) for key, each in theirs.items() if "classifier" not in key)
    assert state["classifier.1.weight"].shape[0] == 5


def pictures(count: int, seed: int, classes: int = 3) -> cd.Split:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    colours = tiny.COLOURS[labels][:, None, None] + rng.integers(-60, 61, (count, *SIZE, 3))
    return cd.Split(colours.astype(np.uint8), labels.astype(np.int64))


@pytest.fixture
def packed(tmp_path, monkeypatch, no_pages):
    monkeypatch.chdir(tmp_path)
    tiny.write_npz(tmp_path / "data.npz", cd.Dataset("pictures", pictures(12, 0), pictures(9, 1), tiny.CLASSES))
    return ["--data", "packed", "--data-dir", "data.npz", "--epochs", "2", "-b", "6", "--lr", "0.01", "--threads", "1"]


def weights(run: cd.Run) -> dict[str, Tensor]:
    return run.load_method().state_dict()


def compared(run: cd.Run, predictor: str) -> None:
    """An ONNX file answers as the run does, for batches of 1, 2 and 7 images."""
    pytest.importorskip("onnxruntime")
    run.export(predictor, f"{predictor}.onnx")
    loaded, own = cd.load_classifier(f"{predictor}.onnx"), cd.load_classifier(run.path, predictor)
    images = run.load_data().test.images
    for batch in (1, 2, 7):
        torch.testing.assert_close(loaded.logits(images[:batch]), own.logits(images[:batch]), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_six_unlike_networks_in_one_cohort_of_mfef(packed):
    names = [f"timm/{name}" for name in UNLIKE]
    assert main(["train", "mfef", "--networks", *names, *packed, "--verify-resume", "--out", "whole"]) == 0
    run = cd.Run("whole")
    assert run.metadata["networks"] == names and run.finished
    method = run.load_method()
    assert method.cohort.shared_stages == 0
    initial = cd.network(names[0], 3)
    assert set(method.cohort[0].original_state_dict()) == set(initial.original_state_dict())
    for predictor in ("student5", "fused"):  # the fused classifier has all six in it
        compared(run, predictor)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("method", "names"),
    [
        (
            "mfef",
            ["timm/mobilenetv3_small_100:drop_rate=0.2,drop_path_rate=0.1", "timm/vit_tiny_patch16_224:drop_rate=0.1"],
        ),
        ("dml", ["timm/vit_tiny_patch16_224:drop_path_rate=0.2", "torchvision/squeezenet1_1"]),
        ("one", ["timm/regnety_002:drop_path_rate=0.1", "timm/regnety_002:drop_path_rate=0.1"]),
    ],
)
def test_a_resumed_run_is_bitwise_the_same(packed, method, names):
    command = ["train", method, "--networks", *names, *packed]
    assert main([*command, "--out", "whole", "--verify-resume"]) == 0
    assert main([*command, "--out", "again"]) == 0
    first, second = weights(cd.Run("whole")), weights(cd.Run("again"))
    assert all(torch.equal(each, second[name]) for name, each in first.items())
    for predictor in ("student0", "student1"):
        compared(cd.Run("whole"), predictor)


@pytest.mark.parametrize("name", by_speed(list(WIDTHS)))
def test_an_exported_network_takes_any_batch(name):
    built, images = cd.network(f"timm/{name}", 3, image_size=SIZE).eval(), torch.randn(7, 3, *SIZE)
    batches = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        exported = torch.export.export(built, (images[:2],), dynamic_shapes=batches).module()
        for count in (1, 7):
            torch.testing.assert_close(exported(images[:count]), built(images[:count]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_equal_networks_of_timm_share_their_low_stages_and_a_teacher_of_timm_teaches(packed):
    torch.manual_seed(0)
    theirs = timm.create_model("mobilenetv3_small_100", num_classes=3)
    torch.save(theirs.state_dict(), "teacher.pth")
    teacher = ["--teacher", "teacher.pth", "--teacher-network", "timm/mobilenetv3_small_100"]
    names = ["timm/resnet18", "timm/resnet18"]
    assert main(["train", "mfef", "--networks", *names, *packed, *teacher, "--out", "run"]) == 0
    method = cd.Run("run").load_method()
    assert method.cohort.shared_stages == 4
    assert method.cohort[0].stages[3] is method.cohort[1].stages[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "swin_t", "densenet121"])
def test_stages_names_and_logits_are_those_of_torchvision(name):
    from torchvision import models

    built = cd.network(f"torchvision/{name}", 5)
    theirs = models.get_model(name, weights=None, num_classes=5)
    theirs.load_state_dict(built.original_state_dict())
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(built.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)
        assert built.feature_map(images).shape[1] == built.widths[-1]
    assert len(built.stages) >= 4
