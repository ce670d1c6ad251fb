"""The fixed rules by which a run's steps are computed."""

import pytest
import torch

import codistill as cd
from codistill.core.console import warn_once
from codistill.core.errors import UsageError
from codistill.training import compiling
from codistill.training.compiling import PAID_BACK_STEPS, Execution, choose_execution

from .. import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: None)


@pytest.mark.parametrize(
    ("asked", "device", "runs", "steps", "expected"),
    [
        ("auto", CUDA, 1, 1, Execution(overlap=True)),
        ("auto", CUDA, 2, 1, Execution()),
        ("auto", CUDA, 1, PAID_BACK_STEPS, Execution(compiled=True, overlap=True)),
        ("auto", CUDA, 2, PAID_BACK_STEPS, Execution(compiled=True)),
        ("auto", CUDA, 1, PAID_BACK_STEPS - 1, Execution(overlap=True)),
        ("off", CUDA, 2, PAID_BACK_STEPS, Execution()),
        ("on", CUDA, 1, 1, Execution(compiled=True, overlap=True)),
        ("auto", CPU, 1, PAID_BACK_STEPS, Execution()),
        ("on", CPU, 1, 1, Execution(compiled=True)),
    ],
)
def test_how_a_run_computes_its_steps(asked, device, runs, steps, expected):
    assert choose_execution(cd.ExecutionSettings(compile=asked), device, runs, steps) == expected


def test_without_a_compiler_auto_does_without_and_a_line_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: "there is no compiler gcc: install one")
    warn_once.cache_clear()
    for _ in range(2):
        assert not choose_execution(cd.ExecutionSettings(), CUDA, 1, PAID_BACK_STEPS).compiled
    choose_execution(cd.ExecutionSettings(), CUDA, 1, 10)
    assert capsys.readouterr().err == (
        "codistill: warning: compile auto: there is no compiler gcc: install one; until then this trains without a "
        "compiler, perhaps more slowly\n"
    )


def test_without_a_compiler_compile_on_is_an_error(monkeypatch):
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: "there is no compiler gcc: install one")
    execution = choose_execution(cd.ExecutionSettings(compile="on"), CPU, 1, 1)
    with pytest.raises(UsageError, match=r"^compile on: there is no compiler gcc: install one, or leave --compile out"):
        execution.prepare(tiny.method(), CPU, False)
