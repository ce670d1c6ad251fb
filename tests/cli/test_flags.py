"""Flags: how they may be written, and those that do not exist or were removed."""

import dataclasses

import pytest

from codistill.cli import early
from codistill.cli.flags import option_flags, setting_flags
from codistill.cli.options import OPTIONS
from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.settings.config import SETTINGS, default_config


def test_unknown_flags_name_their_neighbours(parsed):
    with pytest.raises(UsageError, match=r"unknown option --learning-rte: did you mean --learning-rate"):
        parsed("--learning-rte", "0.1")
    with pytest.raises(UsageError, match=r"unknown option --method.temprature=3: did you mean --method.temperature"):
        parsed("--method.temprature=3")
    with pytest.raises(UsageError, match=r"unknown option --method.temperature"):
        parsed("independent", "--method.temperature", "3")


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--launcher=slurm", "does not exist: torchrun starts the ranks"),
        ("--out_dir=x", "does not exist: name the run folder with --out"),
        ("--sched=step", "does not exist: choose it with --schedule: step or cosine"),
        ("--aa=rand", "unknown option --aa=rand: codistill train mfef --help lists them"),
        ("--method.no-attention", "does not exist: write --method.attention none"),
        ("-r", "unknown option -r: codistill train mfef --help lists them"),
    ],
)
def test_flags_of_other_tools_lead_to_ours_or_to_the_help(parsed, flag, message):
    with pytest.raises(UsageError, match=message):
        parsed(flag)


def test_short_names_of_flags(parsed):
    config = parsed("ffl", "-b", "32", "--lr", "0.5", "--wd", "0.01", "--data_dir", "x", "--drop_last")
    assert (config.train.batch_size, config.train.learning_rate, config.train.weight_decay) == (32, 0.5, 0.01)
    assert config.data_dir == "x" and config.train.drop_last


def test_a_choice_that_there_is_not_is_said_once(parsed):
    with pytest.raises(UsageError, match=r"train \S+: invalid choice 'maybe' for argument '--compile'\. Expected"):
        parsed("--compile", "maybe")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs ten", "--epochs is 'ten'; it must be a whole number"),
        ("-b ten", "-b is 'ten'; it must be a whole number"),
        ("--train-limit 1.5", "--train-limit is '1.5'; it must be a whole number"),
        ("--milestones 1 x", "--milestones is '1 x'; it must be a list of whole numbers"),
        ("--method.temperature hot", "--method.temperature is 'hot'; it must be a number"),
        ("--epochs 0", "epochs is 0; it must be at least 1"),
        ("--epochs", "--epochs: name a value after it"),
    ],
)
def test_a_value_of_another_type_is_one_line(parsed, flags, message):
    with pytest.raises(UsageError, match=f"^codistill train mfef: {message}"):
        parsed(*flags.split())


@pytest.mark.parametrize("method", METHODS)
def test_flags_are_known_without_torch(method):
    fields = dataclasses.fields(METHODS[method].Settings)
    wanted = setting_flags(default_config(method).values())
    assert {flag.key for flag in wanted} == {*SETTINGS, *(field.name for field in fields)}
    spelt = {name for flag in wanted for name in flag.spellings()}
    assert {name for flag in early.setting_flags_of_source(method) for name in flag.spellings()} == spelt


def test_every_setting_and_option_has_a_help_text():
    flags = [flag for name in METHODS for flag in setting_flags(default_config(name).values())]
    flags += [flag for kind in OPTIONS.values() for flag in option_flags(kind)]
    assert not {flag.key for flag in flags if not flag.text}
