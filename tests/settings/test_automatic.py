"""A recipe for a data set of which nothing else is known."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import codistill as cd
from codistill.cli import commands, main
from codistill.core.errors import DataError
from codistill.settings import automatic
from codistill.settings.automatic import Known, look_up
from codistill.settings.mapping import run_from_mapping


def chosen(known: Known, given=None, spec: str = "folder", method: str = "mfef") -> dict:
    return {each.key: each.value for each in automatic.automatic(known, spec, given or {}, method)}


COUNTED = functools.cache(automatic.forward_flops)


@pytest.fixture
def machine(monkeypatch):
    """A machine with two cores and no GPU."""
    monkeypatch.setattr(automatic, "forward_flops", COUNTED)
    monkeypatch.setattr(automatic, "cores", lambda: 2)
    monkeypatch.setattr(automatic.torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_a_recipe_by_hand(machine):
    found = chosen(Known(5000, (32, 32), resized=True))
    # 2 students x 81.8 MFLOP forward, three times as many in training; 30 minutes of 2 cores at 50 GFLOP/s.
    operations = automatic.forward_flops(("resnet20", "resnet20"), (32, 32))
    assert 2 * 80e6 < operations < 2 * 84e6
    assert found["epochs"] == int(1800 * 2 * 50e9 / (3 * operations * 5000)) < 200
    assert found["networks"] == ("resnet20", "resnet20") and "data" not in found
    assert (found["batch_size"], found["learning_rate"], found["schedule"]) == (128, 0.1, "cosine")
    assert (found["validation"], found["weight_decay"], found["precision"]) == ("10%", 5e-4, "auto")
    assert found["warm_up"] == round(found["epochs"] / 20)


@pytest.mark.parametrize("images", [500, 2000, 5000])
def test_adamw_has_its_own_rate(machine, images):
    found = chosen(Known(images, (8, 8)), {"optimizer": "adamw"})
    assert found["learning_rate"] == 0.001
    run_from_mapping({key: each for key, each in found.items() if key != "data"}, str)


def test_no_epoch_ends_with_a_batch_of_one_image(machine):
    assert chosen(Known(33, (8, 8)))["drop_last"] is True  # 32 and 1
    assert all("drop_last" not in chosen(Known(count, (8, 8))) for count in (32, 34))
    # Of 1068 images 107 are held out and 961 trained on, 15 batches of 64 and one image.
    assert "drop_last" not in chosen(Known(1069, (8, 8))) and chosen(Known(1068, (8, 8)))["drop_last"] is True
    assert chosen(Known(5000, (8, 8)), {"train_limit": 129, "batch_size": 128})["drop_last"] is True


def test_a_small_machine_has_a_small_recipe(machine):
    many = Known(50_000, (32, 32))
    epochs = {}
    for count in (1, 64):
        machine.setattr(automatic, "cores", lambda count=count: count)
        epochs[count] = chosen(many)["epochs"]
    assert epochs == {1: 10, 64: 40}
    machine.setattr(automatic.torch.cuda, "is_available", lambda: True)
    assert chosen(many)["epochs"] == 40 and chosen(many)["networks"] == ("resnet32", "resnet32")
    assert chosen(many, {"device": "cpu"})["networks"] == ("resnet20", "resnet20")


def test_photos_become_smaller_and_of_one_size(machine):
    assert chosen(Known(3000, (480, 640), True, True))["data"] == "folder:resize=64"
    assert chosen(Known(3000, (50, 70), False, True))["data"] == "folder:resize=48"
    assert chosen(Known(3000, (20, 30), False, True))["data"] == "folder:resize=32"
    assert "data" not in chosen(Known(3000, (64, 48), True, True))
    assert "data" not in chosen(Known(3000, (480, 640)))  # it has no such option


def test_what_is_set_stays_and_the_rest_goes_with_it(machine):
    given = {"networks": ("resnet8",), "batch_size": 32, "milestones": (3,), "epochs": 5, "validation": 0}
    found = chosen(Known(5000, (32, 32)), given)
    assert not found.keys() & {*given, "schedule"}
    assert found["learning_rate"] == 0.025 and found["warm_up"] == 1
    assert "warm_up" not in chosen(Known(5000, (32, 32)), {"epochs": 1})
    assert "validation" not in chosen(Known(100, (32, 32)))
    assert "validation" not in chosen(Known(5000, (32, 32), validation=True))
    assert len(chosen(Known(5000, (32, 32)), method="okddip")["networks"]) == 3
    # A tenth of 1437 images is 144.
    assert "validation" in chosen(Known(1437, (32, 32)), {"train_limit": 1293})
    assert "validation" not in chosen(Known(1437, (32, 32)), {"train_limit": 1294})


@settings(deadline=None, max_examples=20)
@given(st.integers(4, 10**7), st.integers(8, 512), st.integers(8, 512), st.booleans(), st.booleans())
def test_any_data_set_has_a_recipe(images, height, width, alike, resized):
    known = Known(images, (height, width), alike, resized)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(automatic, "forward_flops", lambda networks, size: 1e8)
        found = chosen(known)
    run = run_from_mapping({"data": "folder", **found}, str)
    assert (run.augment.auto_augment == "trivialaugment") == (resized and found["epochs"] >= 100)
    assert found["epochs"] >= 10 and 0 < found["warm_up"] < found["epochs"] and found["batch_size"] <= 128


def pictures(folder, *sizes) -> None:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(folder / f"{number}.png")


def test_what_is_looked_up_of_a_folder(tmp_path):
    pictures(tmp_path / "photos/train/a", (8, 9), (8, 9))
    pictures(tmp_path / "photos/train/b", (8, 9), (7, 9))
    pictures(tmp_path / "photos/test/a", (1, 1))
    (tmp_path / "photos/test/b").mkdir()
    (tmp_path / "photos/train/a/bad.png").write_bytes(b"no image")
    assert look_up("folder", str(tmp_path / "photos")) == Known(5, (8, 9), False, True)
    for name in ("a", "b"):
        pictures(tmp_path / "flat" / name, *[(8, 9)] * 5)
    assert look_up("folder", str(tmp_path / "flat")) == Known(8, (8, 9), True, True)
    assert look_up("folder:resize=4", str(tmp_path / "flat")).size == (4, 4)
    assert look_up("digits", None).size == (32, 32)


def test_a_photo_that_lies_on_its_side_has_the_size_of_what_is_decoded(tmp_path):
    pictures(tmp_path / "photos/a", *[(8, 9)] * 5)
    pictures(tmp_path / "photos/b", *[(8, 9)] * 3)
    for turn, shape in ((6, (8, 9)), (3, (9, 8))):
        exif = Image.Exif()
        exif[0x112] = turn
        Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / f"photos/b/turned{turn}.jpg", exif=exif)
    assert look_up("folder:test=4", str(tmp_path / "photos")) == Known(6, (8, 9), False, True)
    with pytest.raises(DataError) as error:
        cd.dataset("folder", tmp_path / "photos")
    names = [str(tmp_path / f"photos/b/turned{turn}.jpg") for turn in (3, 6)]
    fault = "is 9x8 pixels, not 8x9: bring all to one size with --data folder:resize=9"
    assert f": 2 files cannot be used: {', '.join(names)}: {fault}" in str(error.value)


def test_a_picture_whose_header_says_nothing_is_decoded(tmp_path, monkeypatch):
    pictures(tmp_path / "photos/a", (8, 9), (8, 9))
    pictures(tmp_path / "photos/b", (8, 9))
    (tmp_path / "photos/b/1.heic").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic")
    monkeypatch.setattr(automatic, "decode_image", lambda content, where: np.zeros((7, 5, 3), np.uint8))
    assert look_up("folder:test=2", str(tmp_path / "photos")) == Known(2, (8, 9), False, True)


def test_what_is_looked_up_of_a_table(tmp_path):
    pictures(tmp_path / "photos", (8, 9), (8, 9), (8, 9), (6, 9), (5, 9))
    lines = [f"photos/{number}.png,{'ab'[number % 2]}" for number in range(5)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class", *lines]))
    assert look_up("table", str(tmp_path / "labels.csv")) == Known(4, (8, 9), False, True)
    splits = ("train", "train", "train", "val", "test")
    lines = [f"{line},{split}" for line, split in zip(lines, splits, strict=True)]
    (tmp_path / "splits.tsv").write_text("\n".join(["file,which,split", *lines]).replace(",", "\t"))
    asked = f"table:label=which,images={tmp_path}"
    assert look_up(asked, str(tmp_path / "splits.tsv")) == Known(3, (8, 9), True, True, validation=True)


def test_what_is_looked_up_of_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    photos = [Image.new("RGB", (9, 8 + number // 4)) for number in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    saved = datasets.Dataset.from_dict({"image": photos, "label": [0, 1, 0, 1, 0]}, features=features)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "saved"))
    assert look_up("huggingface", str(tmp_path / "saved")) == Known(5, (8, 9), False, True)


def test_a_folder_without_images_is_one_line(tmp_path):
    with pytest.raises(DataError, match="holds no class folders"):
        look_up("folder", str(tmp_path))
    for root in (tmp_path / "none", tmp_path / "file.txt"):
        (tmp_path / "file.txt").write_text("no folder")
        with pytest.raises(DataError, match=str(root)):
            look_up("folder", str(root))
    for name in ("a", "b"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "bad" / name / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the images .* can be read, such as a/.\.png"):
        look_up("folder", str(tmp_path / "bad"))


def test_one_command_with_nothing_else_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for name in ("a", "b"):
            pictures(tmp_path / "photos" / part / name, *[(40, 50 + number % 2) for number in range(8)])
    assert main(["train", "--data", "folder", "--data-dir", "photos", "--epochs", "1", "--out", "run"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "  --" in line]
    assert [line.split()[1] for line in lines][:2] == ["--data", "--networks"] and "--epochs" not in str(lines)
    config = cd.Run("run").asked
    assert config.data == "folder:resize=40" and config.networks == ("resnet20", "resnet20")
    assert config.train.batch_size == 32 and config.train.learning_rate == 0.025 and config.train.epochs == 1
    # Its config.json repeats it, and nothing is chosen again.
    assert main(["train", "--recipe", "run/config.json", "--out", "again"]) == 0
    assert "recipe for" not in capsys.readouterr().err
    assert cd.Run("again").summary["top1_error"] == cd.Run("run").summary["top1_error"]


def test_a_flag_and_a_recipe_come_before_what_is_chosen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('data = "digits"\nbatch_size = 100\n')
    monkeypatch.setattr(commands, "train_from_config", lambda config, out: asked.append(config))
    asked: list = []
    assert main(["train", "dml", "--recipe", "mine.toml", "--lr", "0.02"]) == 0
    (config,) = asked
    assert (config.method_name, config.data, config.train.batch_size) == ("dml", "digits", 100)
    assert (config.train.learning_rate, config.train.schedule) == (0.02, "cosine")
    assert "--batch-size" not in capsys.readouterr().err
    # A flag with the value that is a default counts, too: what goes with it is chosen for it.
    assert main(["train", "--data", "digits", "--batch-size", "128", "--epochs", "300"]) == 0
    assert (asked[-1].train.batch_size, asked[-1].train.learning_rate) == (128, 0.1)
    assert (asked[-1].train.epochs, asked[-1].train.warm_up) == (300, 15)
