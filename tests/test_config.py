"""Settings: their bounds, and the way through recipes, JSON and flags and back."""

import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import codistill as cd
from codistill import cli
from codistill.config import RunConfig, TrainSettings, default_config, mapping_arguments, parse_config, read_recipe
from codistill.errors import UsageError
from codistill.methods import METHODS
from codistill.optim import learning_rate_at

from . import tiny

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.toml") if not path.stem.startswith("sweep-"))

BAD_VALUES = [
    ("epochs", 0),
    ("epochs", -3),
    ("batch_size", 0),
    ("batch_size", -1),
    ("batch_size", 1),
    ("learning_rate", 0.0),
    ("learning_rate", -0.1),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("momentum", 1.5),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("momentum", float("nan")),
    ("weight_decay", -1e-4),
    ("weight_decay", 2.0),
    ("weight_decay", float("nan")),
    ("learning_rate_decay", 1.1),
    ("learning_rate_decay", -0.5),
    ("learning_rate_decay", float("nan")),
    ("milestones", (3, 2)),
    ("milestones", (2, 2)),
    ("milestones", (0, 2)),
    ("milestones", (-1,)),
    ("milestones", (2, 5)),
    ("padding", -1),
    ("train_limit", 0),
    ("validation", -1),
    ("seed", -1),
    ("seed", 2**32),
    ("threads", 0),
]
BAD_METHOD_VALUES = [
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("ramp_up", -0.1),
    ("ramp_up", 1.5),
    ("fusion_weight_decay", -1e-5),
    ("target_epsilon", 1.0),
]


def named(key: str, value: object) -> str:
    shown = list(value) if isinstance(value, tuple) else value
    return rf"\b{key} (is|are) {re.escape(str(shown))}; "


def as_flags(key: str, value: object, prefix: str = "") -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{prefix}{key.replace('_', '-')}", *map(str, values)]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_bad_values_are_refused(key, value):
    with pytest.raises(UsageError, match=named(key, value)):
        TrainSettings(**({"epochs": 5} | {key: value}))
    with pytest.raises(UsageError, match=named(key, value)):
        parse_config("mfef", ["--epochs", "5", *as_flags(key, value)])


@pytest.mark.parametrize(("key", "value"), BAD_METHOD_VALUES)
def test_bad_values_of_a_method_are_refused(key, value):
    with pytest.raises(UsageError, match=named(f"method.{key}", value)):
        parse_config("mfef", as_flags(key, value, "method."))


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 1},
        {"batch_size": 2},
        {"momentum": 0.0},
        {"weight_decay": 0.0},
        {"learning_rate_decay": 1.0},
        {"milestones": ()},
        {"milestones": (1, 299)},
        {"padding": 0},
        {"train_limit": 1},
        {"seed": 2**32 - 1},
        {"threads": 1},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(changes):
    settings = TrainSettings(**changes)
    assert parse_config("mfef", [flag for key in changes for flag in as_flags(key, changes[key])]).train == settings


@pytest.mark.parametrize(
    ("epochs", "falls"),
    [(300, [150, 225]), (200, [100, 150]), (10, [5, 8]), (5, [3, 4]), (4, [2, 3]), (3, [2]), (2, [1]), (1, [])],
)
def test_the_learning_rate_falls_at_one_half_and_three_quarters(epochs, falls):
    settings = TrainSettings(epochs=epochs)
    rates = [learning_rate_at(epoch, 1.0, settings.learning_rate_steps, 0.1) for epoch in range(epochs)]
    assert [epoch for epoch in range(1, epochs) if rates[epoch] < rates[epoch - 1]] == falls
    assert rates[0] == 1 and rates[-1] == pytest.approx(0.1 ** len(falls))


def test_milestones_of_ones_own():
    assert TrainSettings(epochs=10, milestones=(2, 3, 9)).learning_rate_steps == (2, 3, 9)
    assert TrainSettings(epochs=10, milestones=()).learning_rate_steps == ()


def test_augmentation_follows_the_data_set_unless_told():
    data = tiny.data()
    for of_data in (True, False):
        for told in (None, True, False):
            chosen = TrainSettings(flip=told).augmentation(dataclasses.replace(data, flip=of_data))
            assert chosen.flip is (of_data if told is None else told)
    chosen = TrainSettings(padding=3, padding_mode="reflect").augmentation(data)
    assert (chosen.padding, chosen.padding_mode) == (3, "reflect")


def test_reflection_needs_pixels_to_reflect():
    data = tiny.data(size=(9, 8))
    TrainSettings(padding=7, padding_mode="reflect").augmentation(data)
    TrainSettings(padding=8).augmentation(data)
    with pytest.raises(UsageError, match="padding is 8, but reflection needs less than 8 pixels"):
        TrainSettings(padding=8, padding_mode="reflect").augmentation(data)


def settings_of(kind: type) -> st.SearchStrategy:
    """Draw values for the simple fields of a method's settings."""
    of_type = {bool: st.booleans(), float: st.floats(0.01, 0.9), int: st.integers(2, 9)}
    fields = {field.name: of_type[field.type] for field in dataclasses.fields(kind) if field.type in of_type}
    return st.builds(kind, **fields, shared_stages=st.none() | st.integers(0, 3))


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    epochs = draw(st.integers(1, 400))
    milestones = st.lists(st.integers(1, epochs - 1), unique=True, max_size=4) if epochs > 1 else st.just([])
    settings = st.builds(
        TrainSettings,
        epochs=st.just(epochs),
        batch_size=st.integers(2, 4096),
        drop_last=st.booleans(),
        learning_rate=st.floats(0, 1e6, exclude_min=True),
        momentum=st.floats(0, 1, exclude_max=True),
        nesterov=st.booleans(),
        weight_decay=st.floats(0, 1),
        milestones=st.none() | milestones.map(lambda each: tuple(sorted(each))),
        learning_rate_decay=st.floats(0, 1),
        padding=st.integers(0, 16),
        padding_mode=st.sampled_from(["zeros", "reflect"]),
        flip=st.none() | st.booleans(),
        train_limit=st.none() | st.integers(1, 10**6),
        validation=st.integers(0, 10**6),
        seed=st.integers(0, 2**32 - 1),
        device=st.sampled_from(["auto", "cpu", "cuda:1"]),
        precision=st.sampled_from(["float32", "bf16"]),
        threads=st.none() | st.integers(1, 64),
    )
    name = draw(st.sampled_from(sorted(METHODS)))
    networks = st.lists(st.sampled_from(["resnet20", "wrn-16-2", "resnet20:shortcut=A", ""]), max_size=4)
    place = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20).map(lambda text: f"/{text}")
    return RunConfig(
        method_name=name,
        networks=tuple(draw(networks)),
        data=draw(st.sampled_from(["", "digits", "folder:resize=64", "colours of my own"])),
        data_dir=draw(st.none() | place),
        train=draw(settings),
        method=draw(settings_of(METHODS[name].Settings)),
    )


@hypothesis_settings(deadline=None, max_examples=40, derandomize=True)
@given(config=configs())
def test_a_config_survives_being_written_and_read(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps({**config.as_mapping(), "dataset": {}, "environment": {}}))
    name, arguments = read_recipe(path)
    assert name == config.method_name
    assert parse_config(name, arguments) == config


def test_what_is_written_is_plain_json():
    config = dataclasses.replace(default_config("mfef"), networks=("a", "b"), train=TrainSettings(milestones=(2, 3)))
    mapping = config.as_mapping()
    assert json.loads(json.dumps(mapping, allow_nan=False)) == mapping
    assert mapping["networks"] == ["a", "b"] and mapping["milestones"] == [2, 3]
    assert {"method", "data", "data_dir", *(each.name for each in dataclasses.fields(TrainSettings))} <= set(mapping)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_method(name):
    config = default_config(name)
    assert config.method == METHODS[name].Settings() and config.train == TrainSettings()
    assert parse_config(name, []) == config


@pytest.fixture
def parsed(monkeypatch):
    """Parse a whole command line as `codistill train` does, without training."""

    def parse(*arguments: str) -> RunConfig:
        seen = []
        # By its full name, for `codistill.train` is the function.
        module = importlib.import_module("codistill.train")
        monkeypatch.setattr(module, "train_from_config", lambda config, *_, **__: seen.append(config))
        cli.train_command([*arguments])
        return seen[0]

    return parse


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
attention = false
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
        method=cd.MFEF.Settings(temperature=4.0, attention=False, head_input="raw", shared_stages=0),
    )


def test_flags_override_the_recipe_wherever_they_stand(parsed, recipe):
    path = str(recipe(WHOLE))
    flags = ["--epochs", "20", "--nesterov", "--networks", "resnet32", "--method.temperature", "2", "--flip", "False"]
    first = parsed("mfef", "--recipe", path, *flags)
    assert (first.train.epochs, first.train.nesterov, first.train.flip) == (20, True, False)
    assert first.networks == ("resnet32",) and first.method.temperature == 2.0
    assert first.train.learning_rate == 0.05 and first.method.attention is False
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
        ("[optimizer]\nlr = 0.1", "PATH:1: unknown key 'optimizer': choose from "),
        ('[method]\nname = "mfef"\n\ntemprature = 3', "PATH:4: unknown key 'temprature': did you mean temperature?"),
        (
            '[method]\nname = "independent"\ntemperature = 3',
            "PATH:3: unknown key 'temperature': choose from shared_stages",
        ),
        ('[method]\nname = "mfeff"\ntemperature = 3', "PATH:2: unknown method 'mfeff': did you mean mfef?"),
        ("epochs = 3\n[method]\ntemperature = 3", "PATH:2: settings of a method need its name"),
        ("method = 3", "PATH:1: method must be a name, or a table"),
        ("[method]\nname = 3", "PATH:1: method must be a name, or a table"),
        ("[epochs]\nx = 1", "PATH:1: epochs is {'x': 1}; it must be a whole number"),
        ('drop_last = "yes"', "PATH:1: drop_last is 'yes'; it must be true or false"),
        ("nesterov = 1", "PATH:1: nesterov is 1; it must be true or false"),
        ("seed = [1, 2]", r"PATH:1: seed is \[1, 2\]; it must be a whole number"),
        ('epochs = "ten"', "PATH:1: epochs is 'ten'; it must be a whole number"),
        ("epochs = 1.5", "PATH:1: epochs is 1.5; it must be a whole number"),
        ("epochs = true", "PATH:1: epochs is True; it must be a whole number"),
        ('learning_rate = "fast"', "PATH:1: learning_rate is 'fast'; it must be a number"),
        ("milestones = [1.5]", r"PATH:1: milestones is \[1.5\]; it must be a list of whole numbers"),
        ('flip = "maybe"', "PATH:1: flip is 'maybe'; it must be true or false"),
        ('padding_mode = "refect"', "PATH:1: padding_mode is 'refect'; it must be one of 'zeros', 'reflect'"),
        (
            '[method]\nname = "mfef"\nhead_input = "msef"',
            "PATH:3: method.head_input is 'msef'; it must be one of 'raw'",
        ),
        ("seed = 1\nepochs = 0", "PATH:2: epochs is 0; it must be at least 1"),
        ("learning_rate = nan", "PATH:1: learning_rate is nan; "),
        ("learning_rate = -inf", "PATH:1: learning_rate is -inf; "),
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


def test_unknown_flags_name_their_neighbours(parsed):
    with pytest.raises(UsageError, match=r"unknown option --learning-rte: did you mean --learning-rate"):
        parsed("--learning-rte", "0.1")
    with pytest.raises(UsageError, match=r"unknown option --method.temprature=3: did you mean --method.temperature"):
        parsed("--method.temprature=3")
    with pytest.raises(UsageError, match=r"unknown option --method.temperature"):
        parsed("independent", "--method.temperature", "3")


def test_short_names_of_flags(parsed):
    config = parsed("ffl", "-b", "32", "--lr", "0.5", "--wd", "0.01", "--data_dir", "x", "--drop_last")
    assert (config.train.batch_size, config.train.learning_rate, config.train.weight_decay) == (32, 0.5, 0.01)
    assert config.data_dir == "x" and config.train.drop_last


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_runs(parsed, path):
    config = parsed("--recipe", str(path))
    data = {"digits": 10, "cifar10": 10, "cifar100": 100, "cinic10": 10}[config.data.partition(":")[0]]
    method = cd.run.build_method(config, data, (32, 32))
    assert len(method.cohort) == len(config.networks) > 0
    assert path.read_text().startswith("# ") and path.stem.startswith(config.method_name)


def test_make_train_is_a_recipe(parsed):
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "codistill train" in line)
    config = parsed(*shlex.split(line.partition("codistill train")[2]))
    assert config == parsed("--recipe", str(ROOT / "recipes" / "mfef-digits.toml"))


def test_the_papers_row_is_its_section_4_1(parsed):
    config = parsed("--recipe", str(ROOT / "recipes" / "mfef-cifar100-resnet32.toml"))
    assert (config.method_name, config.networks, config.data) == ("mfef", ("resnet32", "resnet32"), "cifar100")
    train, method = config.train, config.method
    assert (train.epochs, train.batch_size, train.learning_rate, train.momentum, train.nesterov) == (
        300,
        128,
        0.1,
        0.9,
        True,
    )
    assert (train.learning_rate_steps, train.learning_rate_decay, train.weight_decay) == ((150, 225), 0.1, 1e-4)
    assert (train.padding, train.flip, train.drop_last, train.train_limit) == (4, True, False, None)
    assert (method.temperature, method.ramp_up * 300, method.fusion_weight_decay) == (3.0, 80.0, 1e-5)
    assert config == dataclasses.replace(
        default_config("mfef"),
        networks=config.networks,
        data="cifar100",
        train=TrainSettings(milestones=(150, 225), flip=True),
    )


def test_settings_of_a_file_are_flags():
    flags = mapping_arguments({"epochs": 3, "data_dir": None}, {"attention": False}, "mfef", lambda key: "here")
    assert flags == ["--epochs=3", "--data-dir=None", "--method.no-attention"]
