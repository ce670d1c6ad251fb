"""Settings of papers as a whole: what each sets, how it is overridden, and the networks that it means by a name."""

import dataclasses
import json
import re
import signal

import pytest

from codistill.cli import commands, main
from codistill.methods import METHODS
from codistill.networks import NETWORKS
from codistill.settings.build import build_method
from codistill.settings.config import RunConfig, default_config
from codistill.settings.presets import PRESETS, completed, preset_config

DATA = ["--data", "digits"]
PAIR = ["--networks", "resnet20", "resnet20"]


@pytest.fixture(autouse=True)
def own_handler(tmp_path, monkeypatch):
    """Stand in an empty folder, and give SIGTERM back to pytest."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def chosen(monkeypatch):
    """Return the run that a command line stands for, without training it."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(commands, "train_from_config", lambda config, *_, **__: seen.append(config))
    monkeypatch.setattr(commands, "train_seeds", lambda config, seeds, out: seen.append(config) or [])

    def parse(*arguments: str) -> RunConfig:
        assert main(["train", *arguments, *DATA]) == 0
        return seen.pop()

    return parse


def refused(capsys, tmp_path, message: str, *arguments: str) -> None:
    assert main(["train", *arguments, *DATA]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_all_that_it_says_and_nothing_else(chosen, name):
    preset = PRESETS[name]
    config = chosen("--preset", name, *PAIR)
    default = default_config(preset.method)
    expected = {**preset.run, "milestones": tuple(preset.run["milestones"])}
    assert dataclasses.asdict(config.train) == dataclasses.asdict(default.train) | expected
    assert dataclasses.asdict(config.method) == dataclasses.asdict(default.method) | dict(preset.settings)
    assert config.method_name == preset.method == name and isinstance(config.method, METHODS[name].Settings)
    assert config.teaching == default.teaching
    assert completed(preset, preset_config(preset)) == dataclasses.replace(config, networks=(), data="")
    assert preset.source.strip()


@pytest.mark.parametrize("name", PRESETS)
def test_without_networks_only_these_are_chosen(chosen, name, capsys):
    alone, whole = chosen("--preset", name), chosen("--preset", name, *PAIR)
    assert alone.networks and dataclasses.replace(alone, networks=whole.networks) == whole
    assert re.findall(r" (--[a-z-]+)", capsys.readouterr().err) == ["--networks"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_a_method(chosen, name):
    networks = ["resnet20"] * max(2, METHODS[name].min_students)
    config = chosen("--preset", name, "--networks", *networks)
    method = build_method(config, 10, (32, 32))
    assert method.name == name and len(method.cohort) == len(networks)


def test_what_the_sources_say():
    # Written out once more: epochs, milestones, Nesterov, weight decay; temperature, epsilon, detached teachers.
    said = {
        "mfef": (300, [150, 225], True, 1e-4, 3.0, None, True),
        "ffl": (301, [150, 225], True, 1e-4, 3.0, 1e-7, True),
        "one": (300, [151, 225], False, 1e-4, 3.0, 1e-7, True),
        "okddip": (300, [150, 225], True, 5e-4, 3.0, 1e-7, False),
        "okd-cheap": (300, [150, 225], False, 2e-4, 4.0, None, False),
        "dml": (200, [60, 120, 180], True, 1e-4, 1.0, None, None),
        "kdcl": (300, [150, 225], True, 1e-4, 2.0, None, None),
    }
    for name, preset in PRESETS.items():
        run = tuple(preset.run[key] for key in ("epochs", "milestones", "nesterov", "weight_decay"))
        method = tuple(preset.settings.get(key) for key in ("temperature", "target_epsilon", "detach_teachers"))
        assert run + method == said[name]


def test_mfefs_preset_is_the_default(chosen):
    config = chosen("--preset", "mfef", *PAIR)
    default = chosen(*PAIR)
    assert config.train.milestones == default.train.learning_rate_steps
    same = dataclasses.replace(config, train=dataclasses.replace(config.train, milestones=None))
    assert same == default


def test_a_flag_overrides_one_setting(chosen):
    plain = chosen("--preset", "okddip", *PAIR)
    for flags, changed in (
        (["--wd", "0.001"], {"weight_decay": 0.001}),
        (["--no-nesterov"], {"nesterov": False}),
        (["--padding-mode", "reflect", "--lr", "0.05"], {"padding_mode": "reflect", "learning_rate": 0.05}),
        (["--milestones", "10", "20"], {"milestones": (10, 20)}),
    ):
        for order in ([*flags, "--preset", "okddip"], ["--preset", "okddip", *flags], ["--preset=okddip", *flags]):
            config = chosen(*order, *PAIR)
            assert config == dataclasses.replace(plain, train=dataclasses.replace(plain.train, **changed)), flags
    config = chosen("okddip", "--preset", "okddip", *PAIR, "--method.temperature", "2", "--method.detach-teachers")
    method = dataclasses.replace(plain.method, temperature=2.0, detach_teachers=True)
    assert config == dataclasses.replace(plain, method=method)


def test_a_recipe_overrides_the_preset_and_flags_the_recipe(chosen, tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'networks = ["resnet20", "resnet20"]\nweight_decay = 0.002\nnesterov = false\n'
        '[method]\nname = "okddip"\ntemperature = 5.0\n'
    )
    config = chosen("--preset", "okddip", "--recipe", "recipe.toml", "--wd", "0.003")
    plain = chosen("--preset", "okddip", *PAIR)
    assert config.train == dataclasses.replace(plain.train, weight_decay=0.003, nesterov=False)
    assert config.method == dataclasses.replace(plain.method, temperature=5.0)
    assert config.networks == ("resnet20", "resnet20")


def test_milestones_move_with_the_epochs():
    moved = {
        "mfef": {300: (150, 225), 30: (15, 22), 600: (300, 450), 4: (2, 3), 2: (1,), 1: ()},
        "one": {300: (151, 225), 100: (50, 75)},
        "dml": {200: (60, 120, 180), 20: (6, 12, 18), 3: (1, 2)},
        "ffl": {301: (150, 225), 10: (5, 7)},
    }
    for name, cases in moved.items():
        config = preset_config(PRESETS[name])
        for epochs, milestones in cases.items():
            longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=epochs))
            assert completed(PRESETS[name], longer).train.milestones == milestones


def test_epochs_of_recipes_and_flags_move_the_milestones(chosen, tmp_path):
    (tmp_path / "recipe.toml").write_text("epochs = 3\n")
    for flags, epochs, milestones in (
        (["--epochs", "7", "--epochs", "30"], 30, (15, 22)),
        (["--epochs=30"], 30, (15, 22)),
        (["--recipe", "recipe.toml"], 3, (2,)),
        (["--recipe", "recipe.toml", "--epochs", "30"], 30, (15, 22)),
        (["--epochs", "30", "--milestones", "5"], 30, (5,)),  # those that are written stay
    ):
        train = chosen("--preset", "mfef", *PAIR, *flags).train
        assert (train.epochs, train.milestones) == (epochs, milestones), flags


def test_networks_are_renamed_where_the_papers_code_builds_others(chosen):
    four = ("--networks", "resnet110", "resnet110", "resnet56", "resnet20")
    names = {name: chosen("--preset", name, *four).networks for name in PRESETS}
    plain = ("resnet110", "resnet110", "resnet56", "resnet20")
    assert names.pop("okddip") == ("resnet110-bottleneck", "resnet110-bottleneck", "resnet56", "resnet20")
    one = ("resnet164-bottleneck", "resnet164-bottleneck", "resnet83-bottleneck", "resnet20")
    assert names.pop("one") == one
    assert set(names.values()) == {plain}
    assert chosen("okddip", *four).networks == plain
    # A second time, with the names that a run folder has, nothing changes.
    assert chosen("--preset", "one", "--networks", *one).networks == one
    for preset in PRESETS.values():
        assert {*preset.networks, *preset.networks.values()} <= set(NETWORKS)
        assert not set(preset.networks) & set(preset.networks.values())


def test_networks_of_a_recipe_are_renamed(chosen, tmp_path):
    (tmp_path / "recipe.toml").write_text('networks = ["resnet110"]\n')
    assert chosen("--preset", "one", "--recipe", "recipe.toml", "--seeds", "0").networks == ("resnet164-bottleneck",)


def test_an_unknown_preset_is_refused(capsys, tmp_path):
    refused(capsys, tmp_path, "unknown preset 'okdip': did you mean okddip", "--preset", "okdip", *PAIR)
    every = "dml, ffl, kdcl, mfef, okd-cheap, okddip, one"
    refused(capsys, tmp_path, f"unknown preset 'x': choose from {every}", "--preset=x", *PAIR)
    refused(capsys, tmp_path, "--preset: name a value after it", *PAIR, "--preset")


def test_a_preset_of_another_method_is_refused(capsys, tmp_path):
    message = "preset okddip is for okddip, not for mfef: leave the method or the preset out"
    refused(capsys, tmp_path, message, "mfef", "--preset", "okddip", *PAIR)
    (tmp_path / "recipe.toml").write_text('method = "mfef"\n')
    assert main(["train", "--recipe", "recipe.toml", "--preset", "okddip", *PAIR, *DATA]) == 2
    assert message in capsys.readouterr().err


def test_list_shows_the_presets(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name, preset in PRESETS.items():
        (block,) = re.findall(rf"^--preset {name}: (.*)\n  (.*)$", out, flags=re.MULTILINE)
        assert block[0] == preset.source
        assert f"weight_decay {preset.run['weight_decay']}" in block[1] and "method.temperature " in block[1]
        for network, other in preset.networks.items():
            assert f"{network} is {other}" in block[1]


def test_list_as_json_has_presets_within_methods(capsys):
    assert main(["list", "--json"]) == 0
    found = {
        each["name"]: each["preset"] for each in json.loads(capsys.readouterr().out)["methods"] if "preset" in each
    }
    assert {name: each["source"] for name, each in found.items()} == {
        name: each.source for name, each in PRESETS.items()
    }
    sets = found["okddip"]["sets"]
    assert (sets["weight_decay"], sets["method.detach_teachers"]) == (5e-4, False)
    assert found["okddip"]["networks"] == {"resnet110": "resnet110-bottleneck"}


def test_the_help_names_every_preset(capsys):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    said = re.search(r"All settings of a paper: (.*?); codistill list", text)
    assert set(re.split(r", | or ", said[1])) == set(PRESETS)
