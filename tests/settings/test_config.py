"""Settings: their bounds, their defaults, and the way through JSON and back."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.methods.method import MethodSettings
from codistill.settings.augment import AugmentSettings
from codistill.settings.config import ExecutionSettings, RunConfig, TeacherSettings, TrainSettings, default_config
from codistill.settings.mapping import run_from_mapping
from codistill.settings.recipe import read_recipe
from codistill.training.optim import learning_rate_at

from .. import tiny

NAN, INF = float("nan"), float("inf")
BAD_VALUES = {
    "epochs": [0, -3],
    "batch_size": [0, -1, 1],
    "learning_rate": [0.0, -0.1, NAN, INF],
    "momentum": [1.5, 1.0, -0.1, NAN],
    "weight_decay": [-1e-4, 2.0, NAN],
    "learning_rate_decay": [1.1, -0.5, NAN],
    "milestones": [(3, 2), (2, 2), (0, 2), (-1,), (2, 5)],
    "padding": [-1],
    "train_limit": [0],
    "validation": [-1],
    "seed": [-1, 2**32],
}
BAD_METHOD_VALUES = {
    "temperature": [0.0, -1.0, NAN, INF],
    "ramp_up": [-0.1, 1.5],
    "fusion_weight_decay": [-1e-5],
    "target_epsilon": [1.0],
}


def named(key: str, value: object) -> str:
    shown = list(value) if isinstance(value, tuple) else value
    return rf"\b{key} (is|are) {re.escape(str(shown))}; "


def run(method: str = "mfef", /, **mapping: object) -> RunConfig:
    return run_from_mapping({"method": {"name": method}} | mapping, lambda key: "here")


@pytest.mark.parametrize("key", BAD_VALUES)
def test_bad_values_are_refused(key):
    for value in BAD_VALUES[key]:
        for make in (TrainSettings, run):
            with pytest.raises(UsageError, match=named(key, value)):
                make(**({"epochs": 5} | {key: value}))


def test_bad_values_of_the_execution_are_refused():
    for key, value in (("threads", 0), ("compile", "yes"), ("precision", "float16")):
        with pytest.raises(UsageError, match=rf"\b{key} is {value!r}"):
            ExecutionSettings(**{key: value})


@pytest.mark.parametrize("key", BAD_METHOD_VALUES)
def test_bad_values_of_a_method_are_refused(key):
    for value in BAD_METHOD_VALUES[key]:
        with pytest.raises(UsageError, match=named(f"method.{key}", value)):
            run(method={"name": "mfef", key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 1, "batch_size": 2, "momentum": 0.0, "weight_decay": 0.0, "learning_rate_decay": 1.0},
        {"milestones": (1, 299), "padding": 0, "train_limit": 1, "seed": 2**32 - 1},
        {"milestones": ()},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(changes):
    assert run(**changes).train == TrainSettings(**changes)


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
    )
    execution = st.builds(
        ExecutionSettings,
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
        execution=draw(execution),
        method=draw(settings_of(METHODS[name].Settings)),
    )


@hypothesis_settings(deadline=None, max_examples=40, derandomize=True)
@given(config=configs())
def test_a_config_survives_being_written_and_read(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps({**config.as_mapping(), "dataset": {}, "environment": {}}))
    recipe = read_recipe(path)
    assert recipe.method == config.method_name
    assert run_from_mapping(recipe.mapping, recipe.where) == config


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
    assert run(name) == config


@pytest.mark.fault(2)
def test_settings_made_in_python_have_the_kinds_of_a_recipe():
    made = TrainSettings(seed=np.int64(3), learning_rate=np.float32(0.5), epochs=np.arange(9)[4], milestones=[1, 2])
    assert made == TrainSettings(seed=3, learning_rate=0.5, epochs=4, milestones=(1, 2))
    assert json.loads(json.dumps(dataclasses.asdict(made)))["seed"] == 3
    assert json.dumps(METHODS["dml"].Settings(temperature=np.float32(3)).temperature) == "3.0"
    assert TeacherSettings(teacher=Path("a/b")).teacher == "a/b"
    for kind, values in (
        (TrainSettings, {"seed": "1"}),
        (TrainSettings, {"epochs": 1.0}),
        (ExecutionSettings, {"threads": "2"}),
        (MethodSettings, {"shared_stages": "2"}),
    ):
        name, value = next(iter(values.items()))
        with pytest.raises(UsageError, match=rf"^(method\.)?{name} is {value!r}; it must be a whole number"):
            kind(**values)
    whole, text = (METHODS["dml"].Settings(temperature=each).temperature for each in (3, 3.0))
    assert (type(whole), whole) == (float, text)  # or else two digests for one setting
    with pytest.raises(UsageError, match=r"^method\.temperature is '3'; it must be a number"):
        METHODS["dml"].Settings(temperature="3")


@pytest.mark.parametrize("name", METHODS)
def test_a_misspelt_choice_of_a_method_is_refused(name):
    for key, kind in get_type_hints(METHODS[name].Settings).items():
        if get_origin(kind) is Literal:
            with pytest.raises(UsageError, match=rf"^method\.{key} is 'wrong': "):
                METHODS[name].Settings(**{key: "wrong"})


@pytest.mark.parametrize("settings", [TrainSettings, ExecutionSettings, TeacherSettings, AugmentSettings])
def test_a_misspelt_choice_of_a_run_is_refused(settings):
    choices = {key: get_args(kind) for key, kind in get_type_hints(settings).items() if get_origin(kind) is Literal}
    assert choices
    for key, (first, *_) in choices.items():
        with pytest.raises(UsageError, match=rf"^{key} is '{first}x': did you mean {first}"):
            settings(**{key: f"{first}x"})
