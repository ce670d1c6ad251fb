"""Settings as flags: written, parsed, and those that do not exist."""

import pytest

from codistill.cli.flags import flag_value, has_flag
from codistill.core.errors import UsageError


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


def test_a_choice_that_there_is_not_is_said_once(parsed):
    with pytest.raises(UsageError, match=r"train \S+: invalid choice 'maybe' for argument '--compile'\. Expected"):
        parsed("--compile", "maybe")


def test_the_last_flag_counts():
    assert flag_value(["--a", "1", "--a=2", "--b", "3"], "--a") == "2"
    assert flag_value(["--a"], "--a") == "" and not has_flag(["--ab"], "--a")
