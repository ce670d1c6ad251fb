"""Settings, names and combinations that cannot work: one line, status 2, nothing written."""

import dataclasses
import errno
import inspect
import math
import os
import re
from pathlib import Path

import pytest
import torch

from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.settings.augment import AugmentSettings
from codistill.settings.config import ExecutionSettings, RunConfig, TeacherSettings, TrainSettings

from .. import tiny
from .asserting import refused

TAUGHT = {name for name in METHODS if METHODS[name].teacher == "required"}
ONLINE = sorted(set(METHODS) - {"independent", "byot"} - TAUGHT)
WRONG_TYPE = {int: '"ten"', float: '"fast"', bool: "1", str: "3"}

GROUPS = {
    "train": TrainSettings,
    "augment": AugmentSettings,
    "execution": ExecutionSettings,
    "teaching": TeacherSettings,
}


@pytest.fixture(autouse=True)
def elsewhere(tiny_registered, tmp_path, monkeypatch):
    """Work in an empty folder, with a network named tiny."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A file of 24 training images of 8x8 pixels."""
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "colours.npz", tiny.data())


def train(place: Path, *more: str, method: str = "mfef", networks: tuple[str, ...] = ("tiny", "tiny")) -> list[str]:
    """Return a command line; the last of equal flags counts."""
    flags = ["--networks", *networks, "--data", "packed", "--data-dir", str(place)]
    return ["train", method, *flags, "--batch-size", "8", "--threads", "1", "--epochs", "5", "--out", "out", *more]


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "recipe.toml").write_text(text)
        return ["train", "--recipe", "recipe.toml", "--out", "out"]

    return write


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("text", "line", "key", "near"),
    [
        ("epochs = 3\nlearning_rte = 0.1", 2, "learning_rte", "learning_rate"),
        ('\n# one\n"eposch" = 3', 3, "eposch", "epochs"),
        ('seed = 1\n[method]\nname = "mfef"\ntemprature = 3', 4, "temprature", "temperature"),
        ("[augmentation]\nflipp = true", 1, "augmentation", "augment"),
    ],
)
def test_an_unknown_key_of_a_recipe(capsys, tmp_path, recipe, text, line, key, near):
    refused(capsys, recipe(text), 2, f"recipe.toml:{line}: unknown key '{key}': ", near, unchanged=tmp_path)


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--learning-rte=0.1", "--learning-rate"),
        ("--method.temprature=3", "--method.temperature"),
        ("--ouput=x", "--out"),
    ],
)
def test_an_unknown_flag(capsys, tmp_path, colours, flag, near):
    refused(capsys, train(colours, flag), 2, f"unknown option {flag}: did you mean ", near, unchanged=tmp_path)


BAD_VALUES = {
    "randaugment_operations": ("0", "17", "-1"),
    "randaugment_magnitude": ("-1", "31"),
    "resized_crop": ("0", "1.5", "-0.1", "nan"),
    "color_jitter": ("-0.1", "1.5", "nan"),
    "random_erasing": ("-0.1", "1.5", "nan"),
    "mixup": ("-0.1", "nan", "inf"),
    "cutmix": ("-0.1", "nan", "inf"),
    "label_smoothing": ("-0.1", "1", "nan"),
    "epochs": ("0", "-3", "99999999999", "1" * 400),
    "batch_size": ("0", "-1", "1"),
    "learning_rate": ("0", "-0.1", "nan", "inf", "-inf"),
    "momentum": ("1.5", "1", "-0.1", "nan", "inf"),
    "weight_decay": ("-0.1", "1.5", "nan", "inf"),
    "learning_rate_decay": ("-0.5", "1.1", "nan"),
    "padding": ("-1",),
    "train_limit": ("0", "-4"),
    "validation": ("-1",),
    "evaluate_every": ("0", "-2"),
    "seed": ("-1", "4294967296"),
    "adam_beta2": ("1", "-0.1", "nan"),
    "min_learning_rate": ("-0.1", "0.2", "nan"),
    "warm_up": ("-1", "5"),
    "clip_norm": ("0", "-1"),
    "ema_decay": ("1", "-0.1", "nan"),
    "patience": ("-1",),
    "threads": ("0", "-1", "100000"),
    "teacher_weight": ("-1", "nan", "inf"),
    "teacher_temperature": ("0", "-3", "nan", "inf"),
}
RANGES = {
    "randaugment_operations": "from 1 to 16",
    "randaugment_magnitude": "from 0 to 30",
    "resized_crop": "above 0 and at most 1",
    "color_jitter": "from 0 to 1",
    "random_erasing": "from 0 to 1",
    "mixup": "a number, at least 0",
    "cutmix": "a number, at least 0",
    "label_smoothing": "from 0 to below 1",
    "epochs": "at least 1|from 1 to 2147483647",
    "batch_size": "at least 2",
    "learning_rate": "a number above 0",
    "momentum": "from 0 to below 1",
    "weight_decay": "from 0 to 1",
    "learning_rate_decay": "from 0 to 1",
    "padding": "at least 0",
    "train_limit": "at least 1",
    "validation": "at least 0",
    "evaluate_every": "at least 1",
    "seed": "from 0 to 4294967295",
    "adam_beta2": "from 0 to below 1",
    "min_learning_rate": "from 0 to the learning rate, 0.1",
    "warm_up": "less than the epochs",
    "clip_norm": "a number above 0",
    "ema_decay": "from 0 to below 1",
    "patience": "at least 0",
    "threads": "from 1 to 1024",
    "teacher_weight": "a number, at least 0",
    "teacher_temperature": "a number above 0",
}


@pytest.mark.fault(2)
@pytest.mark.parametrize("key", BAD_VALUES)
def test_a_value_out_of_range(capsys, tmp_path, colours, recipe, key):
    for value in BAD_VALUES[key]:
        default = next((vars(kind())[key] for kind in GROUPS.values() if key in vars(kind())), None)
        written = type(1 if default is None else default)(value)
        flag = f"--{key.replace('_', '-')}={value}"
        line = refused(capsys, train(colours, flag), 2, f"{key} is {str(written)[:70]}", "; it must be ")
        assert any(words in line for words in (*RANGES[key].split("|"), "a whole number"))
        epochs = "epochs = 5" if key == "warm_up" else ""
        line = recipe(f"{epochs}\n{key} = {value}")
        line = refused(capsys, line, 2, "recipe.toml:2: ", f"{key} is ", "; it must be ")
        assert any(words in line for words in (*RANGES[key].split("|"), "a whole number"))
        assert os.listdir() == ["recipe.toml"]


@pytest.mark.fault(87)
def test_percentages_that_cannot_be_held_out(capsys, tmp_path, colours, recipe):
    words = "it must be a whole number, or a percentage between 0 and 100 as 20%"
    for value in ("0%", "0.0%", "100%", "120%", "-5%", "20 %", "%", "1e1%", "nan%", "0.2", "half"):
        refused(capsys, train(colours, f"--validation={value}"), 2, f"validation is {value!r}; {words}")
        line = f"recipe.toml:1: validation is {value!r}; {words}"
        refused(capsys, recipe(f'validation = "{value}"'), 2, line)
    for value in ("0.2", "true"):
        refused(capsys, recipe(f"validation = {value}"), 2, f"recipe.toml:1: validation is {value.title()}; {words}")
    refused(capsys, train(colours, "--validation", "-5"), 2, "validation is -5; it must be at least 0")
    assert os.listdir() == ["recipe.toml"]


def test_no_bounded_setting_is_forgotten():
    numbers = (int, float, int | None, float | None, int | str)
    settings = [each for kind in GROUPS.values() for each in dataclasses.fields(kind)]
    plain = {each.name for each in settings if getattr(each.type, "__origin__", each.type) in numbers}
    assert plain == set(BAD_VALUES) == set(RANGES)


def own_fields() -> dict[str, list[dataclasses.Field]]:
    """The fields of each method's settings; those that several methods have from one class, of the first of them."""
    seen: set[tuple[type, str]] = set()
    found: dict[str, list[dataclasses.Field]] = {}
    for method, kind in METHODS.items():
        for each in dataclasses.fields(kind.Settings):
            home = next(base for base in kind.Settings.__mro__ if each.name in inspect.get_annotations(base))
            if (home, each.name) not in seen:
                seen.add((home, each.name))
                found.setdefault(method, []).append(each)
    return found


@pytest.mark.fault(2)
@pytest.mark.parametrize(("method", "fields"), own_fields().items(), ids=list(own_fields()))
def test_no_number_of_a_method_may_be_nan_infinite_or_negative(capsys, tmp_path, colours, method, fields):
    for each in fields:
        if each.type is float:
            refused(
                capsys,
                train(colours, f"--method.{each.name}=nan", method=method),
                2,
                f"method.{each.name} is nan; it must",
            )
            for value in (math.nan, math.inf, -1.0):
                with pytest.raises(UsageError, match=f"method.{each.name} is {value}; it must"):
                    METHODS[method].Settings(**{each.name: value})
        elif each.type in (int, int | None):
            students = ("tiny",) * max(2, METHODS[method].min_students)
            line = refused(
                capsys, train(colours, f"--method.{each.name}=-1", method=method, networks=students), 2, "-1"
            )
            assert each.name.rpartition("_")[2] in line
    assert os.listdir() == []


@pytest.mark.fault(2)
@pytest.mark.parametrize("method", [None, *own_fields()])
def test_a_value_of_the_wrong_type(capsys, tmp_path, recipe, method):
    if method is None:
        fields = [each for kind in (*GROUPS.values(), RunConfig) for each in dataclasses.fields(kind)]
        head, prefix = "", ""
    else:
        fields, head, prefix = own_fields()[method], f'[method]\nname = "{method}"', "method."
    fields = [each for each in fields if each.name not in ("method_name", "method", *GROUPS)]
    for each in fields:
        wrong = [WRONG_TYPE.get(getattr(each.type, "__origin__", each.type), '["a", 3]'), "{ a = 1 }", "1979-05-27"]
        for value in wrong:
            found = f"recipe.toml:{head.count(chr(10)) + 2}: {prefix}{each.name} is "
            refused(capsys, recipe(f"{head}\n{each.name} = {value}"), 2, found, "; it must be ")
    assert os.listdir() == ["recipe.toml"]


@pytest.mark.fault(2)
def test_a_flag_overrides_a_bad_value_of_a_recipe_and_a_bad_flag_is_named_alone(capsys, tmp_path, colours, recipe):
    arguments = [*recipe("epochs = 0"), *train(colours, "--epochs", "1")[2:]]
    assert main(arguments) == 0
    capsys.readouterr()
    line = refused(capsys, [*recipe("epochs = 3"), "--epochs", "0"], 2, "epochs is 0; ")
    assert "recipe.toml" not in line


@pytest.mark.fault(3)
@pytest.mark.parametrize("steps", [(3, 2), (2, 2), (0, 2), (-1,), (2, 5), (7,)])
def test_milestones_that_cannot_be(capsys, tmp_path, colours, recipe, steps):
    said = f"milestones are {list(steps)}; they must rise and lie between 1 and epochs - 1"
    refused(capsys, train(colours, "--milestones", *map(str, steps)), 2, said, unchanged=tmp_path)
    text = f"epochs = 5\nmilestones = {list(steps)}"
    refused(capsys, recipe(text), 2, f"recipe.toml:2: {said}")
    assert os.listdir() == ["recipe.toml"]


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("resnet21", ["resnet20"]),
        ("resnet33", ["resnet32"]),
        ("wrn-16-3", ["wrn-16-2"]),
        ("alexnet", ["choose from", "densenet-40-12", "mobilenetv2", "resnet110", "wrn-40-2"]),
        ("resnet20x", ["did you mean resnet20"]),
    ],
)
def test_a_network_that_does_not_exist(capsys, tmp_path, colours, name, hints):
    refused(
        capsys, train(colours, networks=("tiny", name)), 2, f"unknown network '{name}': ", *hints, unchanged=tmp_path
    )


@pytest.mark.fault(4)
def test_options_methods_and_data_sets_that_do_not_exist(capsys, tmp_path, colours, recipe):
    refused(capsys, train(colours, networks=("resnet20:shortcut=C",)), 2, "shortcut is 'C': choose from A, B")
    refused(capsys, train(colours, networks=("resnet20:depth=21",)), 2, "network resnet20: unknown option 'depth'")
    refused(capsys, train(colours, "--data", "cifar11"), 2, "unknown data set 'cifar11': did you mean cifar10")
    refused(capsys, train(colours, method="mefe"), 2, "unknown method 'mefe': did you mean mfef")
    refused(capsys, recipe('seed = 1\nmethod = "mefe"'), 2, "recipe.toml:2: unknown method 'mefe': did you mean mfef")
    assert os.listdir() == ["recipe.toml"]


@pytest.mark.fault(4)
def test_paths_and_lists_in_place_of_names(capsys, tmp_path, colours):
    (tmp_path / "photos").mkdir()
    (tmp_path / "images.csv").touch()
    for line, read in (
        (["train", "photos"], "unknown method 'photos': .* --data folder --data-dir photos"),
        (["train", "--data", "photos"], "unknown data set 'photos': .* --data folder --data-dir photos"),
        (["train", "--data", "folder=photos"], "unknown data set 'folder=photos': .* --data folder --data-dir photos"),
        (
            ["train", "--data", "images.csv"],
            "unknown data set 'images.csv': .* table.packed --data-dir images.csv",
        ),
        (
            ["train", "--data", "folder", "--data-dir", "images.csv"],
            "images.csv: is a file, .* --data table",
        ),
        (["train", "--recipe", "photos"], "recipe photos: is a folder: name a file"),
    ):
        assert main(line) in (2, 3)
        said = capsys.readouterr().err
        assert re.search(read, said) and said.count("\n") == 1
    (tmp_path / "photos" / "config.json").touch()
    refused(capsys, ["train", "--recipe", "photos"], 2, "is a folder: name photos/config.json")
    for name in ("x" * 5000, "a/" * 3000, "\udcff"):  # no file can be called so
        for line in (["train", name], ["train", "--data", name], ["train", "--data", "folder", "--data-dir", name]):
            assert main(line) in (2, 3) and capsys.readouterr().err.count("\n") == 1
    for name in ("tiny,tiny", "tiny tiny"):
        refused(capsys, train(colours, networks=(name,)), 2, "separated by spaces, without quotes: tiny tiny")


@pytest.mark.fault(5)
@pytest.mark.parametrize("method", ONLINE)
def test_one_student_alone(capsys, tmp_path, colours, method):
    arguments = train(colours, method=method, networks=("tiny",))
    refused(capsys, arguments, 2, f"{method} needs at least ", "students, got 1: ", unchanged=tmp_path)


@pytest.mark.fault(5)
def test_a_trunk_that_the_students_cannot_share(capsys, tmp_path, colours):
    unlike = train(colours, "--method.shared-stages", "2", networks=("resnet20", "wrn-16-2"))
    refused(capsys, unlike, 2, "cannot share 2 stages of resnet20 + wrn-16-2: ", "unlike networks", unchanged=tmp_path)
    deep = train(colours, "--method.shared-stages", "9", networks=("resnet20", "resnet20"))
    refused(capsys, deep, 2, "cannot share 9 stages of ", "between 0 and 4", unchanged=tmp_path)


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("method", "networks", "said"),
    [
        ("rocket", ("tiny",) * 3, "rocket takes at most 2 students, got 3: name fewer"),
        ("kd", ("tiny",), "kd needs a teacher: give --teacher"),
        ("mfef", (), "no networks: name one for each student"),
        ("mfef", ("tiny", ""), "a network without a name"),
    ],
)
def test_too_many_students_none_or_no_teacher(capsys, tmp_path, colours, method, networks, said):
    refused(capsys, train(colours, method=method, networks=networks), 2, said, unchanged=tmp_path)


@pytest.mark.fault(6)
@pytest.mark.parametrize("groups", [1, 0, 9, 8, 1000])
def test_channel_groups_that_do_not_go_into_the_width(capsys, tmp_path, colours, groups):
    arguments = train(colours, "--method.groups", str(groups))
    refused(capsys, arguments, 2, "multi-scale extraction: ", f"{groups} groups", "8 channels", unchanged=tmp_path)


@pytest.mark.fault(6)
@pytest.mark.parametrize("method", sorted(set(METHODS) - TAUGHT))  # which look for their teacher first
def test_images_too_small_for_a_network(capsys, tmp_path, method):
    place = tiny.write_npz(tmp_path / "small.npz", tiny.data(size=(2, 2)))
    students = min(3, METHODS[method].max_students or 3)
    arguments = train(place, "--padding", "0", method=method, networks=("densenet-40-12",) * students)
    refused(capsys, arguments, 2, "densenet-40-12", "cannot take 2x2 images", "(60x1x1)", unchanged=tmp_path)


@pytest.mark.fault(6)
def test_feature_maps_and_kernels_that_cannot_be_matched(capsys, tmp_path, colours):
    shared = train(colours, "--method.share-components", networks=("resnet20", "wrn-16-2"))
    refused(capsys, shared, 2, "share_components needs feature maps of one width, got [64, 128]", unchanged=tmp_path)
    refused(capsys, train(colours, "--method.attention-kernel", "4"), 2, "kernel_size is 4; it must be odd")
    for more in (["--padding", "9"], ["--padding", "8", "--padding-mode", "reflect"]):
        refused(capsys, train(colours, *more), 2, f"padding is {more[1]}, but", "8 pixels", unchanged=tmp_path)


@pytest.mark.fault(7)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_that_is_not_there(capsys, tmp_path, colours, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = f"device '{device}': this machine has 0 CUDA devices: choose --device cpu or auto"
    refused(capsys, train(colours, "--device", device), 2, said, unchanged=tmp_path)


@pytest.mark.fault(7)
@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:-1", "meta", ""])
def test_a_device_that_does_not_exist(capsys, tmp_path, colours, device):
    refused(capsys, train(colours, f"--device={device}"), 2, f"device '{device}': choose cpu, cuda", unchanged=tmp_path)


@pytest.mark.fault(7)
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_gpu_without_bf16(capsys, tmp_path, colours, monkeypatch, device):
    for name, answer in (("is_available", True), ("device_count", 1), ("is_bf16_supported", False)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    arguments = train(colours, "--device", device, "--precision", "bf16")
    refused(capsys, arguments, 2, "precision bf16: Old GPU cannot: use --precision float32", unchanged=tmp_path)


@pytest.mark.fault(8)
@pytest.mark.parametrize("out", ["file", "file/below", "file/further/below", "taken", "a" * 300])
@pytest.mark.parametrize("more", [(), ("--seeds", "0", "1")], ids=["one", "seeds"])
def test_an_output_folder_that_cannot_be_used(capsys, tmp_path, colours, out, more):
    (tmp_path / "file").write_text("mine")
    for seed in ("", "seed0", "seed1"):
        (tmp_path / "taken" / seed).mkdir(parents=True, exist_ok=True)
        (tmp_path / "taken" / seed / "notes.txt").write_text("mine too")
    said = f"run folder {out[:10]}"
    refused(capsys, train(colours, "--out", out, *more), 2, said, "choose another --out", unchanged=tmp_path)


@pytest.mark.fault(8)
def test_a_file_in_the_place_of_the_folder_of_all_runs(capsys, tmp_path, colours):
    (tmp_path / "runs").write_text("mine")
    arguments = train(colours)
    place = arguments.index("--out")
    del arguments[place : place + 2]
    refused(capsys, arguments, 2, "run folder runs/", "choose another --out", unchanged=tmp_path)


@pytest.mark.fault(8)
def test_a_file_system_that_nobody_can_write_to(capsys, tmp_path, colours, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    refused(capsys, train(colours), 2, "run folder out: Read-only file system: choose another", unchanged=tmp_path)


@pytest.mark.fault(8)
def test_another_run_is_never_overwritten(capsys, tmp_path, colours):
    assert main(train(colours, "--epochs", "1", method="independent")) == 0
    before = {name: content for name, content in tiny.listing(tmp_path).items() if not name.endswith(".lock")}
    for more in ((), ("--seed", "1")):
        refused(capsys, train(colours, *more), 2, "run folder out is not empty: ", "nothing was overwritten")
    after = {name: content for name, content in tiny.listing(tmp_path).items() if not name.endswith(".lock")}
    assert after == before


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--train-limit", "1"), "there is one training image, but batch normalisation needs two"),
        (("--batch-size", "23"), "the last batch of 24 images would be a single image"),
        (("--train-limit", "17"), "the last batch of 17 images would be a single image"),
        (("--validation", "7"), "the last batch of 17 images would be a single image"),
        (("--batch-size", "1"), "batch_size is 1; it must be at least 2"),
        (("--train-limit", "25"), "exceed the 24 training images"),
        (("--validation", "24"), "validation is 24, but data set packed has 24 training images"),
    ],
)
def test_batches_that_cannot_be_normalised(capsys, tmp_path, colours, more, said):
    line = refused(capsys, train(colours, *more), 2, said, unchanged=tmp_path)
    assert "single image" not in line or ("drop_last" in line and "batch_size" in line)


@pytest.mark.fault(22)
def test_129_images_in_batches_of_128(capsys, tmp_path):
    place = tiny.write_npz(tmp_path / "many.npz", tiny.data(train=129))
    arguments = train(place, "--batch-size", "128", "--epochs", "1", method="independent")
    refused(
        capsys,
        arguments,
        2,
        "129 images",
        "set drop_last (--drop-last), or another batch_size than 128",
        unchanged=tmp_path,
    )
    assert main([*arguments, "--drop-last"]) == 0
