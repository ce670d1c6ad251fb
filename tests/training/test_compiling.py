"""How steps are computed: the fixed rules, compiled parts that change neither results nor files, and what is undone."""

import contextlib
import copy
import dataclasses
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import codistill as cd
from codistill.core.console import warn_once
from codistill.core.errors import DivergedError, UsageError
from codistill.methods import METHODS
from codistill.networks import NETWORKS
from codistill.settings.config import default_config
from codistill.training import compiling, fleet
from codistill.training.compiling import (
    PAID_BACK_STEPS,
    Execution,
    choose_execution,
    compiled,
    missing_compiler,
    parts_of,
)
from codistill.training.step import TrainStep
from codistill.training.trial import try_method

from .. import tiny
from ..faults.running import in_child
from . import compile_everything

# torch's own: the compiler looks at .grad of tensors within a network.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def stub_backend(monkeypatch, tmp_path):
    """Trace, but run what was traced in Python."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: None)


def apart(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a fork: where the compiler has run, autograd no longer works in forks, which other tests make."""

    @functools.wraps(test)
    def forked(**fixtures: object) -> None:
        assert in_child(lambda: test(**fixtures) or 0) == 0

    return forked


def independent() -> cd.Method:
    return tiny.method(cd.Independent).train()


def gradients(method: cd.Method, images: Tensor) -> dict[str, Tensor]:
    outputs = method(images)
    method.zero_grad()
    sum(method.losses(outputs, torch.arange(len(images)) % 3, torch.tensor(0.5)).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in method.named_parameters()}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def is_plain(method: cd.Method) -> bool:
    return all(module._compiled_call_impl is None for module in method.modules()) and not method.cohort.streams


# --- the rules ---


@pytest.mark.parametrize(
    ("asked", "device", "steps", "overlap", "expected"),
    [
        ("auto", CUDA, 1, True, Execution(overlap=True)),
        ("auto", CUDA, 1, False, Execution()),
        ("auto", CUDA, PAID_BACK_STEPS, True, Execution(compiled=True, overlap=True)),
        ("auto", CUDA, PAID_BACK_STEPS - 1, True, Execution(overlap=True)),
        ("off", CUDA, PAID_BACK_STEPS, False, Execution()),
        ("on", CUDA, 1, True, Execution(compiled=True, overlap=True)),
        ("auto", CPU, PAID_BACK_STEPS, True, Execution()),
        ("on", CPU, 1, True, Execution(compiled=True)),
    ],
)
def test_how_a_run_computes_its_steps(asked, device, steps, overlap, expected):
    assert choose_execution(cd.ExecutionSettings(compile=asked), device, steps, overlap) == expected


def test_without_a_compiler_auto_does_without_and_a_line_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: "there is no compiler gcc: install one")
    warn_once.cache_clear()
    for _ in range(2):
        assert not choose_execution(cd.ExecutionSettings(), CUDA, PAID_BACK_STEPS).compiled
    choose_execution(cd.ExecutionSettings(), CUDA, 10)
    assert capsys.readouterr().err == (
        "codistill: warning: compile auto: there is no compiler gcc: install one; until then this trains without a "
        "compiler, perhaps more slowly\n"
    )


def test_without_a_compiler_compile_on_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "missing_compiler", missing_compiler)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="compile on: there is no compiler no-such-compiler: install one, or leave"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    assert missing_compiler(CUDA).startswith("Tesla P40 is too old for Triton")


# --- compiled parts ---


@apart
def test_results_are_those_without_a_compiler():
    plain, other = independent(), independent()
    with compiled(other, fullgraph=True):
        before = graphs()
        for size in (6, 6, 4):
            images = torch.randn(size, 3, 8, 8)
            torch.testing.assert_close(gradients(other, images), gradients(plain, images))
    assert graphs() > before
    torch.testing.assert_close(other.state_dict(), plain.state_dict())


@pytest.mark.slow
@apart
def test_one_part_compiled_for_a_cpu_gives_the_same_numbers(monkeypatch):
    # The only test that runs the real compiler, which takes seconds.
    if missing_compiler(CPU) is not None:
        pytest.skip("no compiler here")
    plain, other = independent(), independent()
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(compiling, "parts_of", lambda method: [method.cohort[0].stages[0]])
    images = torch.randn(4, 3, 8, 8)
    with compiled(other):
        torch.testing.assert_close(gradients(other, images), gradients(plain, images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.state_dict(), plain.state_dict())


@apart
def test_equal_parts_are_compiled_once():
    method = independent()
    with compiled(method):
        before = graphs()
        gradients(method, torch.randn(6, 3, 8, 8))
    # Two equal students of three stages and a head.
    assert len(list(parts_of(method))) == 2 * (3 + 1)
    assert graphs() - before == 4


@pytest.mark.slow
@apart
def test_more_shapes_than_torch_allows_by_default_are_still_compiled():
    method = independent()
    with compiled(method, fullgraph=True):
        gradients(method, torch.randn(20, 3, 8, 8))
        before = graphs()
        for size in range(2, 11):
            gradients(method, torch.randn(size, 3, 8, 8))
    assert graphs() - before == 9 * 4


@apart
def test_evaluation_runs_without_the_compiler():
    method, images = independent(), torch.randn(6, 3, 8, 8)
    with compiled(method):
        before = graphs()
        with torch.no_grad():
            for predictor in method.eval().predictors().values():
                predictor(images)
        assert graphs() == before


@apart
def test_names_copies_pickles_and_exports_stay():
    method = tiny.method(cd.MFEF).train()
    names = list(method.state_dict())
    with compiled(method):
        assert list(method.state_dict()) == names
        try_method(method, tiny.data(), tiny.settings(), "float32", torch.device("cpu"))
        images = torch.randn(4, 3, 8, 8)
        expected = method.eval()(images).fused_logits
        student = method.deployed_student(0)
        for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
            torch.testing.assert_close(other(images), student(images))
            exported = torch.export.export(other, (images,))
            torch.testing.assert_close(exported.module()(images), student(images))
        # A copy has its own weights: training it leaves the original alone.
        twin = copy.deepcopy(method)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        torch.testing.assert_close(method(images).fused_logits, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_made_of_parts(name):
    built = NETWORKS[name](num_classes=3)
    parts = [id(each) for part in parts_of(built) for each in part.parameters()]
    assert set(parts) == {id(parameter) for parameter in built.parameters()} and len(parts) == len(set(parts))


@pytest.mark.slow
def test_no_graph_breaks_in_networks_and_methods():
    # In a process of its own: here the checks of shapes stand in the modules, which no compiler can look through.
    command = [sys.executable, "-m", compile_everything.__name__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [*compile_everything.KINDS, *METHODS]


@pytest.mark.parametrize("own", [True, False], ids=["set by the user", "unset"])
def test_compiled_code_is_kept_in_a_stable_folder(monkeypatch, tmp_path, own):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not own:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with compiled(independent()):
        expected = tmp_path / "inductor" if own else tmp_path / "cache" / "codistill" / "inductor"
        assert Path(compiling.os.environ["TORCHINDUCTOR_CACHE_DIR"]) == expected


def test_a_cache_folder_that_cannot_be_made_is_said_and_survived(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    warn_once.cache_clear()
    with compiled(independent()):
        assert "compiled code is not kept for later runs" in capsys.readouterr().err


# --- whole runs ---


def train(out: Path, method: cd.Method | None = None, choice: str = "on", **changes: object) -> cd.Run:
    execution = cd.ExecutionSettings(compile=choice)
    settings = tiny.settings(**changes)
    return cd.train(
        method or independent(), tiny.data(train=21), out=out, settings=settings, execution=execution, show=False
    )


@apart
def test_a_compiled_run_trains_as_a_plain_one(tmp_path):
    # The whole loop, with evaluation between epochs and a last batch of another size.
    errors = []
    for choice in ("off", "on"):
        before, method = graphs(), independent()
        run = train(tmp_path / choice, method, choice)
        errors.append([row["train"] for row in run.metrics()])
        assert (graphs() > before) is (choice == "on")
        assert run.config.execution.compile == choice and run.summary["execution"]["compiled"] is (choice == "on")
        assert is_plain(method)
    for plain, other in zip(*errors, strict=True):
        assert other == pytest.approx(plain, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("error", [DivergedError, KeyboardInterrupt, RuntimeError])
@apart
def test_compiled_code_is_gone_however_a_run_ends(tmp_path, monkeypatch, error):
    method, call = independent(), TrainStep.__call__

    def breaking(self, *arguments):
        assert not is_plain(method)
        call(self, *arguments)
        if error is not DivergedError:
            raise error

    monkeypatch.setattr(TrainStep, "__call__", breaking)
    with pytest.raises(error):
        train(tmp_path / "run", method, learning_rate=1e30 if error is DivergedError else 0.1)
    assert is_plain(method)


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
    assert is_plain(method)


@apart
def test_compiled_code_of_a_dropped_member_is_gone_too(tmp_path, monkeypatch, tiny_registered):
    data, methods, build = str(tiny.write_npz(tmp_path / "data.npz", tiny.data())), [], fleet.build_taught

    def built(*arguments):
        methods.append(build(*arguments))
        return methods[-1]

    monkeypatch.setattr(fleet, "build_taught", built)
    execution = cd.ExecutionSettings(compile="on", device="cpu")
    base = dataclasses.replace(default_config("independent"), networks=("tiny", "tiny"), data="packed", data_dir=data)
    configs = [
        dataclasses.replace(base, train=tiny.settings(learning_rate=rate), execution=execution) for rate in (0.1, 1e30)
    ]
    runs = fleet.train_fleet(configs, [tmp_path / "a", tmp_path / "b"], show=False)
    assert [run.status for run in runs] == ["finished", "diverged"]
    assert all(run.summary["execution"]["compiled"] for run in runs[:1]) and all(map(is_plain, methods))


@apart
def test_what_a_user_compiled_is_back_after_the_run(tmp_path):
    method = independent()
    stage = method.cohort[0].stages[0]
    stage.compile(backend="eager")
    own = stage._compiled_call_impl
    train(tmp_path / "run", method)
    assert stage._compiled_call_impl is own
