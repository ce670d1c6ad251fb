"""Compiled parts: where they are, that they change neither results nor files, and what is said where they cannot be."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import codistill as cd
from codistill.core.console import warn_once
from codistill.core.errors import UsageError
from codistill.methods import METHODS
from codistill.networks import NETWORKS
from codistill.settings.config import TrainSettings
from codistill.training import compiling
from codistill.training.compiling import compile_in_place, compile_parts, missing_compiler, parts_of
from codistill.training.prepare import check_shapes

from .. import tiny
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
def cache_of_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def independent() -> cd.Method:
    return tiny.method(cd.Independent).train()


def gradients(method: cd.Method, images: Tensor) -> dict[str, Tensor]:
    outputs = method(images)
    method.zero_grad()
    sum(method.losses(outputs, torch.arange(len(images)) % 3, torch.tensor(0.5)).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in method.named_parameters()}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("granularity", ["block", "stage"])
def test_results_are_those_without_a_compiler(granularity):
    plain, compiled = independent(), independent()
    assert compile_in_place(compiled, granularity, backend="aot_eager", fullgraph=True) > 0
    before = graphs()
    for size in (6, 6, 4):
        images = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(gradients(compiled, images), gradients(plain, images))
    assert graphs() > before
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


def test_one_part_compiled_for_a_cpu_gives_the_same_numbers():
    # The only test that runs the real compiler, which takes seconds.
    plain, compiled = tiny.network(3).train(), tiny.network(3).train()
    compiled.load_state_dict(plain.state_dict())
    if missing_compiler(CPU) is not None:
        pytest.skip("no compiler here")
    compiling._compile(compiled.stages[0], torch.compile)
    images = torch.randn(4, 3, 8, 8)
    for net in (plain, compiled):
        net(images).square().sum().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


def test_equal_parts_are_compiled_once():
    method = independent()
    parts = compile_in_place(method, backend="aot_eager")
    before = graphs()
    gradients(method, torch.randn(6, 3, 8, 8))
    # Two equal students of three stages and a head.
    assert parts == 2 * (3 + 1)
    assert graphs() - before == 4


def test_more_shapes_than_torch_allows_by_default_are_still_compiled():
    method = independent()
    compile_in_place(method, backend="eager", fullgraph=True)
    gradients(method, torch.randn(20, 3, 8, 8))
    before = graphs()
    for size in range(2, 11):
        gradients(method, torch.randn(size, 3, 8, 8))
    assert graphs() - before == 9 * 4


def test_evaluation_runs_without_the_compiler():
    method = independent()
    compile_in_place(method, backend="aot_eager")
    before = graphs()
    images = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        for predictor in method.eval().predictors().values():
            predictor(images)
    assert graphs() == before
    gradients(method.train(), images)
    assert graphs() > before


def test_names_copies_pickles_and_exports_stay():
    method = tiny.method(cd.MFEF).train()
    names = list(method.state_dict())
    compile_in_place(method, backend="aot_eager")
    assert list(method.state_dict()) == names
    check_shapes(method, tiny.data())
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
    whole = {id(parameter) for parameter in built.parameters()}
    stages = [id(each) for part in parts_of(built, "stage") for each in part.parameters()]
    assert set(stages) == whole and len(stages) == len(whole)
    blocks = list(parts_of(built, "block"))
    assert len(blocks) > len(built.stages) + 1
    assert {id(each) for part in blocks for each in part.parameters()} <= whole


def test_no_graph_breaks_in_networks_and_methods():
    # In a process of its own: here the checks of shapes stand in the modules, which no compiler can look through.
    command = [sys.executable, "-m", compile_everything.__name__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [*compile_everything.KINDS, *METHODS]


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="compile on: there is no compiler no-such-compiler: install one, or leave"):
        compile_parts(independent(), CPU, False)


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    with pytest.raises(UsageError, match="compile on: Tesla P40 is too old for Triton"):
        compile_parts(independent(), CUDA, False)


@pytest.mark.parametrize("own", [True, False], ids=["set by the user", "unset"])
def test_compiled_code_is_kept_in_a_stable_folder(monkeypatch, tmp_path, own):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not own:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_parts(independent(), CPU, False)
    expected = tmp_path / "inductor" if own else tmp_path / "cache" / "codistill" / "inductor"
    assert Path(compiling.os.environ["TORCHINDUCTOR_CACHE_DIR"]) == expected


def test_a_cache_folder_that_cannot_be_made_is_said_and_survived(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    warn_once.cache_clear()
    compile_parts(independent(), CPU, False)
    assert "compiled code is not kept for later runs" in capsys.readouterr().err


def test_a_compiled_run_trains_as_a_plain_one(monkeypatch, tmp_path, tiny_registered):
    # The whole loop, with evaluation between epochs and a last batch of another size.
    monkeypatch.setattr(compiling, "compile_in_place", lambda method, deterministic: compile_eagerly(method))
    errors = []
    for choice in ("off", "on"):
        before = graphs()
        run = cd.train(
            independent(),
            tiny.data(train=21),
            out=tmp_path / choice,
            settings=tiny.settings(),
            execution=cd.ExecutionSettings(compile=choice),
            show=False,
        )
        errors.append([row["train"] for row in run.metrics()])
        assert (graphs() > before) is (choice == "on")
        assert run.config.execution.compile == choice
    for plain, compiled in zip(*errors, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-3, abs=1e-5)


def compile_eagerly(method: nn.Module) -> int:
    return compile_in_place(method, backend="eager")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compile": "maybe"}, "compile is 'maybe': .*auto, off, on|compile is 'maybe'"),
        ({"kernels": "fuse"}, "kernels is 'fuse': did you mean fused"),
        ({"compile": "on", "kernels": "fused"}, "compile on and kernels fused"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        TrainSettings(**changes)
