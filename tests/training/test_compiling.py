"""How steps are computed: the fixed rules, compiled chains that change no results, and what is undone."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.core.console import warn_once
from codistill.core.errors import DivergedError, UsageError
from codistill.networks import chains
from codistill.networks.chains import Compiler
from codistill.settings.config import default_config
from codistill.training import compiling, fleet
from codistill.training.compiling import PAID_BACK_PIXELS, Execution, choose_execution, missing_compiler
from codistill.training.step import TrainStep

from .. import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[str]:
    """Chains run as the functions that they are; their names are noted down."""
    called: list[str] = []

    class Noting(Compiler):
        def compile(self, function, arguments):
            def noted(*given):
                called.append(function.__name__)
                return function(*given)

            return noted

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: None)
    monkeypatch.setattr(compiling, "compiler", lambda *given: Noting({}))
    return called


def independent() -> cd.Method:
    return tiny.method(cd.Independent).train()


# --- the rules ---


@pytest.mark.parametrize(
    ("asked", "device", "pixels", "overlap", "expected"),
    [
        ("auto", CUDA, PAID_BACK_PIXELS, True, Execution(overlap=True)),
        ("auto", CUDA, PAID_BACK_PIXELS, False, Execution()),
        ("off", CUDA, PAID_BACK_PIXELS, False, Execution()),
        ("on", CUDA, 1, True, Execution(compiled=True, overlap=True)),
        ("auto", CPU, PAID_BACK_PIXELS, True, Execution(compiled=True)),
        ("auto", CPU, PAID_BACK_PIXELS - 1, True, Execution()),
        ("off", CPU, PAID_BACK_PIXELS, True, Execution()),
        ("on", CPU, 1, True, Execution(compiled=True)),
    ],
)
def test_how_a_run_computes_its_steps(asked, device, pixels, overlap, expected, calls):
    assert choose_execution(cd.ExecutionSettings(compile=asked), device, pixels, overlap) == expected


def test_without_a_compiler_auto_does_without_and_a_line_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: "there is no compiler g++: install one")
    warn_once.cache_clear()
    for _ in range(2):
        assert not choose_execution(cd.ExecutionSettings(), CPU, PAID_BACK_PIXELS).compiled
    choose_execution(cd.ExecutionSettings(), CPU, 10)
    assert capsys.readouterr().err == (
        "codistill: warning: compile auto: there is no compiler g++: install one; until then this trains without a "
        "compiler, more slowly\n"
    )


def test_without_a_compiler_compile_on_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="compile on: there is no compiler no-such-compiler: install one, or leave"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    assert missing_compiler(CUDA).startswith("Tesla P40 is too old for Triton")


def test_code_is_that_of_a_number_of_threads():
    assert compiling.compiler("cpu", 2, False) is compiling.compiler("cpu", 2, False)
    assert compiling.compiler("cpu", 2, False).options == {"compile_threads": 1, "cpp.threads": 2}
    assert compiling.compiler("cuda", 2, True).options == {"compile_threads": 1, "deterministic": True}


@pytest.mark.parametrize("own", [True, False], ids=["set by the user", "unset"])
def test_compiled_code_is_kept_in_a_stable_folder(calls, monkeypatch, tmp_path, own):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not own:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with Execution(compiled=True).on(independent(), CPU):
        expected = tmp_path / "inductor" if own else tmp_path / "cache" / "codistill" / "inductor"
        assert Path(compiling.os.environ["TORCHINDUCTOR_CACHE_DIR"]) == expected


def test_a_cache_folder_that_cannot_be_made_is_said_and_survived(calls, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    warn_once.cache_clear()
    with Execution(compiled=True).on(independent(), CPU):
        assert "compiled code is not kept for later runs" in capsys.readouterr().err


# --- whole runs ---


def train(out: Path, method: cd.Method | None = None, choice: str = "on", **changes: object) -> cd.Run:
    execution = cd.ExecutionSettings(compile=choice, threads=1)
    settings = tiny.settings(**changes)
    return cd.train(
        method or independent(), tiny.data(train=21), out=out, settings=settings, execution=execution, show=False
    )


def test_a_compiled_run_trains_as_a_plain_one(tmp_path, calls):
    # The whole loop, with evaluation between epochs and a last batch of another size.
    errors = []
    for choice in ("off", "on"):
        assert not calls
        run = train(tmp_path / choice, tiny.method(cd.MFEF), choice)
        errors.append([row["train"] for row in run.metrics()])
        assert run.config.execution.compile == choice and run.summary["execution"]["compiled"] is (choice == "on")
    assert {"pool_forward", "weigh_backward", "gate_backward"} <= set(calls)
    assert calls.count("forward") == calls.count("backward") > 0
    for plain, other in zip(*errors, strict=True):
        assert other == pytest.approx(plain, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("error", [DivergedError, KeyboardInterrupt, RuntimeError])
def test_chains_are_off_however_a_run_ends(tmp_path, monkeypatch, calls, error):
    method, call = independent(), TrainStep.__call__

    def breaking(self, *arguments):
        assert chains.on(method)
        call(self, *arguments)
        if error is not DivergedError:
            raise error

    monkeypatch.setattr(TrainStep, "__call__", breaking)
    with pytest.raises(error):
        train(tmp_path / "run", method, learning_rate=1e30 if error is DivergedError else 0.1)
    assert not chains.on(method.train())


@pytest.mark.gpu
@pytest.mark.parametrize("error", [None, DivergedError, KeyboardInterrupt])
def test_streams_of_branches_are_gone_however_a_run_ends(tmp_path, monkeypatch, error):
    method, call = independent(), TrainStep.__call__

    def breaking(self, *arguments):
        assert len(method.cohort.streams) == 2
        call(self, *arguments)
        if error is KeyboardInterrupt:
            raise error

    monkeypatch.setattr(TrainStep, "__call__", breaking)
    with pytest.raises(error) if error else contextlib.nullcontext():
        train(tmp_path / "run", method, "off", learning_rate=1e30 if error is DivergedError else 0.1)
    assert not method.cohort.streams


def test_a_dropped_member_leaves_the_others_compiled(tmp_path, calls, tiny_registered):
    data = str(tiny.write_npz(tmp_path / "data.npz", tiny.data()))
    execution = cd.ExecutionSettings(compile="on", device="cpu", threads=1)
    base = dataclasses.replace(default_config("independent"), networks=("tiny", "tiny"), data="packed", data_dir=data)
    configs = [
        dataclasses.replace(base, train=tiny.settings(learning_rate=rate), execution=execution) for rate in (0.1, 1e30)
    ]
    runs = fleet.train_fleet(configs, [tmp_path / "a", tmp_path / "b"], show=False)
    assert [run.status for run in runs] == ["finished", "diverged"] and calls
    assert runs[0].summary["execution"]["compiled"] and not chains.on(independent())


def test_a_compilation_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def failing(*given):
        raise RuntimeError("g++: internal compiler error")

    monkeypatch.setattr(chains, "inductor", failing)
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: None)
    monkeypatch.setattr(compiling, "compiler", lambda *given: Compiler({}))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    warn_once.cache_clear()
    assert train(tmp_path / "run").finished
    line = "compilation failed, training goes on without a compiler, more slowly: RuntimeError: g++: internal compiler"
    assert capsys.readouterr().err.count(line) == 1


def test_stages_that_a_user_compiled_stay_as_they_are(tmp_path, calls):
    method = independent()
    stage = method.cohort[0].stages[0]
    stage.compile(backend="eager")
    own = stage._compiled_call_impl
    train(tmp_path / "run", method)
    assert stage._compiled_call_impl is own and calls
    torch._dynamo.reset()
