"""Recipes: what they stand for beside flags, and what is wrong in them."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import codistill as cd
from codistill.core.errors import UsageError
from codistill.settings.build import build_method
from codistill.settings.config import RunConfig, TrainSettings, default_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.toml") if not path.stem.startswith(("sweep-", "search-")))


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.write_text(f"{text}\n")
        return path

    return write


WHOLE = """
# A recipe with some of everything.
networks = ["resnet20", "wrn-16-2"]
data = "digits"
epochs = 12
learning_rate = 0.05
milestones = [3, 9]
nesterov = false
flip = true
padding_mode = "reflect"

[method]
name = "mfef"
temperature = 4
attention = "none"
head_input = "raw"
shared_stages = 0
"""


def test_a_recipe_is_a_whole_run(parsed, recipe):
    config = parsed("--recipe", str(recipe(WHOLE)))
    assert config == RunConfig(
        networks=("resnet20", "wrn-16-2"),
        data="digits",
        train=TrainSettings(
            epochs=12, learning_rate=0.05, milestones=(3, 9), nesterov=False, flip=True, padding_mode="reflect"
        ),
        method=cd.MFEF.Settings(temperature=4.0, attention="none", head_input="raw", shared_stages=0),
    )


def test_flags_override_the_recipe_wherever_they_stand(parsed, recipe):
    path = str(recipe(WHOLE))
    flags = ["--epochs", "20", "--nesterov", "--networks", "resnet32", "--method.temperature", "2", "--flip", "False"]
    first = parsed("mfef", "--recipe", path, *flags)
    assert (first.train.epochs, first.train.nesterov, first.train.flip) == (20, True, False)
    assert first.networks == ("resnet32",) and first.method.temperature == 2.0
    assert first.train.learning_rate == 0.05 and first.method.attention == "none"
    assert parsed(*flags, f"--recipe={path}") == first


@pytest.mark.parametrize(
    "text", ['method = "ffl"', '[method]\nname = "ffl"', '[method]\nname = "ffl"\ntemperature = 3.0']
)
def test_a_method_is_named_alone_or_in_its_table(parsed, recipe, text):
    assert parsed("--recipe", str(recipe(text))) == default_config("ffl")


def test_a_recipe_may_leave_the_method_to_the_command(parsed, recipe):
    path = str(recipe("epochs = 4"))
    assert parsed("independent", "--recipe", path).method_name == "independent"
    assert parsed("--recipe", path).method_name == "mfef"
    with pytest.raises(UsageError, match="the recipe is for ffl, not for mfef"):
        parsed("mfef", "--recipe", str(recipe('method = "ffl"')))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3\nlearning_rte = 0.1", "PATH:2: unknown key 'learning_rte': did you mean learning_rate"),
        ('# a\n\n  "eposch" = 3', "PATH:3: unknown key 'eposch': did you mean epochs?"),
        ("epochs = 3\nlr = 0.1", "PATH:2: lr is a flag: write learning_rate"),
        ('preset = "mfef"', "PATH:1: preset is a flag: write the settings that it stands for"),
        ("[optimiser]\nlr = 0.1", "PATH:1: optimiser does not exist: choose it with --optimizer: sgd or adamw"),
        ('[method]\nname = "mfef"\n\ntemprature = 3', "PATH:4: unknown key 'temprature': did you mean temperature?"),
        ('[method]\nname = "independent"\nemperature = 3', "PATH:3: unknown key 'emperature': choose from shared"),
        ('[method]\nname = "mfeff"\ntemperature = 3', "PATH:2: unknown method 'mfeff': did you mean mfef?"),
        ("epochs = 3\n[method]\ntemperature = 3", "PATH:2: settings of a method need its name"),
        ("epochs = 3\nprocesses = 2", "PATH:2: processes was removed: .* torchrun --nproc-per-node N"),
        ('kernels = "fused"', "PATH:1: kernels was removed: leave it out; --compile on"),
        ("method = 3", "PATH:1: method must be a name, or a table"),
        ("[epochs]\nx = 1", "PATH:1: epochs is {'x': 1}; it must be a whole number"),
        ('drop_last = "yes"', "PATH:1: drop_last is 'yes'; it must be true or false"),
        ("seed = [1, 2]", r"PATH:1: seed is \[1, 2\]; it must be a whole number"),
        ('epochs = "ten"', "PATH:1: epochs is 'ten'; it must be a whole number"),
        ("epochs = true", "PATH:1: epochs is True; it must be a whole number"),
        ('learning_rate = "fast"', "PATH:1: learning_rate is 'fast'; it must be a number"),
        ("milestones = [1.5]", r"PATH:1: milestones is \[1.5\]; it must be a list of whole numbers"),
        ('padding_mode = "refect"', "PATH:1: padding_mode is 'refect'; it must be one of 'zeros', 'reflect'"),
        ('[method]\nname = "mfef"\nhead_input = "x"', "PATH:3: method.head_input is 'x'; it must be one of 'raw'"),
        (
            '[method]\nname = "mfef"\nattention = true',
            "PATH:3: method.attention is True; .* of true write 'cbam'",
        ),
        (
            '[method]\nname = "mfef"\nmultiscale = false',
            "PATH:3: .* 'hs', .*; in place of false write 'none'",
        ),
        ("seed = 1\nepochs = 0", "PATH:2: epochs is 0; it must be at least 1"),
        ("learning_rate = nan", "PATH:1: learning_rate is nan; "),
        ("seed = 3\nmilestones = [3, 2]", r"PATH:2: milestones are \[3, 2\]; "),
        ("epochs = 3\nepochs = 4", "PATH: .*line 2"),
        ("epochs = ", "PATH: .*line 1"),
        pytest.param("a = " + "[" * 100_000, "PATH: ", id="nested too deeply"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_one_line(parsed, recipe, text, message):
    path = recipe(text)
    with pytest.raises(UsageError, match=message.replace("PATH", f"^recipe {re.escape(str(path))}")) as error:
        parsed("--recipe", str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"method": {"name": "mfef"}, "epoch": 3}', pytest.param("[" * 100_000, id="nested")]
)
def test_what_is_wrong_in_a_json_recipe_is_one_line(parsed, recipe, text):
    path = recipe(text, "config.json")
    with pytest.raises(UsageError, match=f"^recipe {re.escape(str(path))}") as error:
        parsed("--recipe", str(path))
    assert "\n" not in str(error.value)


def test_a_recipe_that_cannot_be_read(parsed, tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "binary.toml"):
        with pytest.raises(UsageError, match=f"^recipe {re.escape(str(path))}: "):
            parsed("--recipe", str(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_runs(parsed, path):
    config = parsed("--recipe", str(path))
    data = {"digits": 10, "cifar10": 10, "cifar100": 100, "cinic10": 10, "folder": 10}[config.data.partition(":")[0]]
    method = build_method(config, data, (32, 32))
    assert len(method.cohort) == len(config.networks) > 0
    assert path.read_text().startswith("# ") and path.stem.startswith(config.method_name)


def test_make_train_is_a_recipe(parsed):
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "codistill train" in line)
    config = parsed(*shlex.split(line.partition("codistill train")[2]))
    assert config == parsed("--recipe", str(ROOT / "recipes" / "mfef-digits.toml"))


def test_the_papers_row_is_its_section_4_1(parsed):
    config = parsed("--recipe", str(ROOT / "recipes" / "mfef-cifar100-resnet32.toml"))
    assert (config.method_name, config.networks) == ("mfef", ("resnet32", "resnet32"))
    train, method = config.train, config.method
    assert (train.epochs, train.batch_size, train.learning_rate, train.momentum) == (300, 128, 0.1, 0.9)
    assert (train.weight_decay, train.learning_rate_decay, train.nesterov, train.padding) == (1e-4, 0.1, True, 4)
    assert (method.temperature, method.ramp_up * 300, method.fusion_weight_decay) == (3.0, 80.0, 1e-5)
    assert config == dataclasses.replace(
        default_config("mfef"),
        networks=config.networks,
        data="cifar100",
        train=TrainSettings(milestones=(150, 225), flip=True),
    )


def test_a_file_of_windows_may_begin_with_a_mark_of_its_byte_order(parsed, tmp_path):
    (tmp_path / "notepad.toml").write_bytes(b'\xef\xbb\xbfdata = "digits"\r\n')
    assert parsed("--recipe", str(tmp_path / "notepad.toml")).data == "digits"
