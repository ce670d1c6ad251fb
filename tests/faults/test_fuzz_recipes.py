"""Recipes and config.json of every shape: a run that can be written and read again, or one of codistill's errors."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import codistill as cd
from codistill.core.errors import CheckpointError, UsageError
from codistill.methods import METHODS
from codistill.settings.config import RunConfig
from codistill.settings.mapping import run_from_mapping
from codistill.settings.recipe import read_recipe

from .. import tiny
from .fuzzing import budget, mutations

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
# Whatever was or might have been read wrongly.
CORPUS = (
    b"",
    b"\xef\xbb\xbfepochs = 3",
    b"epochs = 3\r\nseed = 4\r",
    b'data = "--help"',
    b'networks = ["-h"]',
    b'networks = ["--epochs", "0"]',
    b'data_dir = "a\\u0000b"',
    b'data = "a\\nb"',
    b"epochs = 0x" + b"f" * 5000,
    b"epochs = " + b"9" * 5000,
    b"learning_rate = 1e999",
    b"[method]\nname = 'mfef'\n[method.temperature]\nx = 1",
    b"[[method]]\nname = 'mfef'",
    b"method = ['mfef']",
    b"'' = 1",
    b"epochs.x = 1",
    b"milestones = [[1]]",
    b"milestones = " + b"[" * 5000,
    b"a = " + b"{a=" * 5000,
    b"seed = 1979-05-27T07:32:00Z",
    b"codistill = 1\nenvironment = 3\ndataset = []",
    b"x" * 20000 + b" = 1",
    b"{}",
    b"null",
    b'"epochs"',
    b'{"method": null}',
    b'{"epochs": NaN, "seed": Infinity}',
    b'{"epochs": 1' + b"0" * 5000 + b"}",
    b'{"data": "\\ud800"}',
    b'{"data_dir": "\\ud800\\u0000"}',
    b'{"method": {"name": "mfef", "name": "ffl"}}',
    b'{"\\u0000": 1}',
)


def read(path: Path) -> RunConfig | None:
    """Read a recipe as `codistill train --recipe` does; None: it was refused in order."""
    try:
        recipe = read_recipe(path)
        config = run_from_mapping(recipe.mapping, recipe.where)
    except UsageError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 2000 and line.isprintable()
        return None
    again = path.with_name("again.json")
    again.write_text(json.dumps(config.as_mapping(), allow_nan=False))
    recipe = read_recipe(again)
    assert run_from_mapping(recipe.mapping, recipe.where) == config
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.fault(1)
@pytest.mark.fault(2)
@pytest.mark.parametrize("ending", [".toml", ".json"])
@pytest.mark.parametrize("content", CORPUS, ids=lambda content: repr(content[:30]))
def test_nasty_recipes(place, content, ending):
    (place / f"nasty{ending}").write_bytes(content)
    read(place / f"nasty{ending}")


@budget(200)
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "ignore")))
def test_recipes_of_any_bytes(place, content):
    for ending in (".toml", ".json"):
        (place / f"bytes{ending}").write_bytes(content)
        read(place / f"bytes{ending}")


@budget(80)
@given(data=st.data())
def test_damaged_recipes(place, data):
    whole = data.draw(st.sampled_from(RECIPES)).read_bytes()
    (place / "damaged.toml").write_bytes(data.draw(mutations(whole)))
    read(place / "damaged.toml")


KEYS = st.sampled_from(sorted(RunConfig().as_mapping())) | st.text(max_size=8)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 300, 2**31, 2**63, 10**400, 0.1, 1e-320])
TEXTS = st.text(max_size=8) | st.sampled_from(["", "None", "true", "-1", "--help", "zeros", "bf16", "resnet20:=,"])
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4
)


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, object]:
    """Draw settings of a run, most of them named rightly."""
    method = draw(st.sampled_from(sorted(METHODS)))
    settings = st.sampled_from(sorted(METHODS[method].Settings().__dict__)) | st.text(max_size=5)
    whole = draw(st.dictionaries(KEYS, VALUES, max_size=3))
    whole["method"] = draw(
        st.dictionaries(settings, VALUES, max_size=2).map(lambda each: {"name": method, **each})
        | st.just(method)
        | st.just({})
        | VALUES
    )
    return whole


def as_toml(value: object) -> str:
    """Write plain values as TOML; what it cannot say becomes a string."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


@budget(80)
@given(mapping=mappings())
@example(mapping={"epochs": 2**63 - 1, "method": "mfef"})
@example(mapping={"milestones": [], "networks": [], "epochs": 1, "method": {}})
@example(mapping={"flip": None, "data_dir": "", "teacher": "None", "method": {}})
def test_recipes_of_wild_values(place, mapping):
    (place / "wild.json").write_text(json.dumps(mapping))
    config = read(place / "wild.json")
    text = "\n".join(f"{json.dumps(key)} = {as_toml(value)}" for key, value in mapping.items())
    (place / "wild.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        same = tomllib.loads(text) == mapping
    except (ValueError, RecursionError):
        same = False
    if same:
        assert read(place / "wild.toml") == config
    else:
        read(place / "wild.toml")


@pytest.fixture(scope="module")
def record(tiny_registered, tmp_path_factory):
    """A run folder whose config.json may be replaced, and the content of that file."""
    folder = tmp_path_factory.mktemp("record")
    run = cd.train(tiny.method(cd.Independent), tiny.data(), settings=tiny.settings(epochs=1), out=folder, show=False)
    return folder, (run.path / "config.json").read_bytes()


def refused_or_read(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    try:
        run = cd.Run(folder)
        assert isinstance(run.config, RunConfig)
        assert run.class_names and all(isinstance(name, str) for name in run.class_names)
        assert len(run.image_size) == 2 and min(run.image_size) > 0
    except CheckpointError as error:
        assert "config.json" in str(error) and "\n" not in str(error)


@budget(200)
@given(data=st.data())
def test_damaged_records_of_runs(record, data):
    folder, whole = record
    refused_or_read(folder, data.draw(mutations(whole)))


@budget(200)
@given(data=st.data())
def test_records_with_other_values(record, data):
    folder, whole = record
    mapping = json.loads(whole)
    inner = data.draw(st.sampled_from([mapping, mapping["dataset"], mapping["method"]]))
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(VALUES)
    refused_or_read(folder, json.dumps(mapping).encode())
