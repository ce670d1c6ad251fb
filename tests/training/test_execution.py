"""Which executions of a step settings leave open, and what is taken where nothing is measured."""

import pytest
import torch

import codistill as cd
from codistill.core.console import warn_once
from codistill.core.errors import UsageError
from codistill.training import compiling, execution
from codistill.training.execution import PAID_BACK_STEPS, Execution

from .. import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STOCK, BESIDE = Execution(), Execution(overlap=True)
FUSED = Execution("fused"), Execution("fused", overlap=True)
COMPILED = Execution(compiled=True), Execution(compiled=True, overlap=True)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setattr(execution, "missing_compiler", lambda device: None)


@pytest.mark.parametrize(
    ("asked", "runs", "expected"),
    [
        ({}, 1, BESIDE),
        ({}, 2, STOCK),
        ({"overlap": "on"}, 2, BESIDE),
        ({"overlap": "off"}, 1, STOCK),
        ({"kernels": "fused"}, 2, FUSED[0]),
        ({"kernels": "stock", "compile": "on"}, 1, COMPILED[1]),
        ({"deterministic": True}, 1, BESIDE),
    ],
)
def test_what_is_taken_without_a_measurement(asked, runs, expected):
    settings = cd.TrainSettings(**asked)
    assert as_asked(settings, CUDA, runs) == expected
    assert choices(settings, CUDA, runs, 1)[0] == expected
    assert not as_asked(settings, CPU, runs).overlap


@pytest.mark.parametrize(
    ("asked", "steps", "expected"),
    [
        ({}, 1, {STOCK, BESIDE, *FUSED}),
        ({}, PAID_BACK_STEPS, {STOCK, BESIDE, *FUSED, *COMPILED}),
        ({"compile": "off"}, PAID_BACK_STEPS, {STOCK, BESIDE, *FUSED}),
        ({"compile": "on"}, 1, {*COMPILED}),
        ({"kernels": "fused"}, PAID_BACK_STEPS, {*FUSED}),
        ({"kernels": "stock"}, 1, {STOCK, BESIDE}),
        ({"overlap": "on"}, 1, {BESIDE, FUSED[1]}),
        ({"kernels": "stock", "overlap": "off"}, 1, {STOCK}),
        ({"deterministic": True}, PAID_BACK_STEPS, {BESIDE}),
        ({"processes": 2}, PAID_BACK_STEPS, {STOCK}),
    ],
)
def test_what_is_open(asked, steps, expected):
    listed = choices(cd.TrainSettings(**asked), CUDA, 1, steps)
    assert set(listed) == expected and len(listed) == len(expected)
    assert len(choices(cd.TrainSettings(**asked), CPU, 1, steps)) == 1


def test_without_a_compiler_the_others_are_open_and_a_line_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(execution, "missing_compiler", lambda device: "there is no compiler gcc: install one")
    warn_once.cache_clear()
    for _ in range(2):
        assert not set(COMPILED) & set(choices(cd.TrainSettings(), CUDA, 1, PAID_BACK_STEPS))
    assert capsys.readouterr().err == (
        "codistill: warning: compile auto: there is no compiler gcc: install one; until then this trains without a "
        "compiler, perhaps more slowly\n"
    )
    choices(cd.TrainSettings(), CUDA, 1, 10)
    assert not capsys.readouterr().err


def test_a_method_is_prepared(monkeypatch):
    prepared = []
    monkeypatch.setattr(execution, "use_fused", lambda method, device: prepared.append("fused"))
    monkeypatch.setattr(execution, "compile_parts", lambda method, device, deterministic: prepared.append("compiled"))
    for each in (BESIDE, FUSED[0], COMPILED[1]):
        each.prepare(tiny.method(), CUDA, False)
    assert prepared == ["fused", "compiled"]


def test_a_method_that_computed_otherwise_before_does_so_no_more(monkeypatch):
    monkeypatch.setattr(compiling, "_keep_compiled_code", lambda: None)
    monkeypatch.setattr(execution, "use_fused", lambda method, device: install_fused(method))
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: None)
    method = cd.MFEF([cd.network("resnet20", 3) for _ in range(2)], 3)
    as_built = [dict(vars(module)) for module in method.modules()]
    FUSED[0].prepare(method, CUDA, False)
    assert [dict(vars(module)) for module in method.modules()] != as_built
    STOCK.prepare(method, CUDA, False)
    assert [dict(vars(module)) for module in method.modules()] == as_built
    COMPILED[0].prepare(method, CUDA, False)
    assert any(module._compiled_call_impl is not None for module in method.modules())
    own = method.cohort[0].head
    own.compile()
    STOCK.prepare(method, CUDA, False)
    assert [module for module in method.modules() if module._compiled_call_impl is not None] == [own]


def test_what_was_asked_for_and_cannot_be_is_refused():
    with pytest.raises(UsageError, match="kernels fused: they need a CUDA device, not cpu"):
        as_asked(cd.TrainSettings(kernels="fused"), CPU, 1).prepare(tiny.method(), CPU, False)


def test_names_for_people():
    assert [str(each) for each in (STOCK, FUSED[1], COMPILED[0])] == [
        "stock kernels",
        "fused kernels, overlapping streams",
        "stock kernels, compiled",
    ]
