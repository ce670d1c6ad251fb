"""benchmarks/kernels.py on a CPU: what it writes, and that it goes on where it stopped."""

import importlib.util
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

RUN = subprocess.run
PATH = Path(__file__).parents[1] / "benchmarks" / "kernels.py"


@pytest.fixture
def kernels(monkeypatch, tiny_registered) -> ModuleType:
    """The script, whose cases run in this process."""
    spec = importlib.util.spec_from_file_location("benchmark_kernels", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_kernels", module)
    spec.loader.exec_module(module)

    def run(command, env, **how):
        given = dict(zip(command[2::2], command[3::2], strict=True))
        assert "TORCHINDUCTOR_CACHE_DIR" in env
        options = small(module, Path(given["--out"]), case=given["--case"])
        return SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(module.measure(options))}\n", stderr="")

    platform.platform()  # which starts a program where it is first asked
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(module, "MAPS", ((4, 2),))
    return module


def small(module: ModuleType, out: Path, case: str = ""):
    return module.Options(
        out=out,
        networks=("tiny",),
        variants=("stock", "fused"),
        batch_size=4,
        precision="float32",
        device="cpu",
        rounds=2,
        seconds=0.01,
        case=case,
    )


def test_every_case_becomes_a_file_and_a_row(kernels, monkeypatch, tmp_path, capsys):
    changed = []
    # The kernels themselves have tests of their own; here they only have to be asked for.
    monkeypatch.setattr(kernels, "use_fused", lambda method, device: changed.append(method) or 7)
    options = small(kernels, tmp_path)
    kernels.main(options)
    assert len(changed) == 1
    written = sorted(path.name for path in tmp_path.glob("*.json"))
    assert written == [
        "augmentation-4.json",
        "layer-4x2.json",
        "step-tiny-fused-none.json",
        "step-tiny-stock-none.json",
    ]
    augmentation, layer, fused, _ = (json.loads((tmp_path / name).read_text()) for name in written)
    assert [len(each) for each in layer["microseconds"].values()] == [2, 2]
    assert list(augmentation["microseconds"]) == ["stock"] and min(augmentation["microseconds"]["stock"]) > 0
    assert fused["parts"] == 7 and fused["weights_are_finite"] and len(fused["ms_per_step"]) == 2
    assert fused["environment"]["torch"]
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith(("| 4x2", "| aug", "| 2 x"))]
    assert rows == [
        ["| 4x2", "stock, alone"],
        ["| 4x2", "stock, added"],
        ["| augmentation 4", "stock"],
        ["| 2 x tiny", "stock"],
        ["| 2 x tiny", "fused"],
    ]
    # What is there already is not measured again.
    monkeypatch.setattr(kernels, "measure", None)
    kernels.main(options)


def test_a_case_that_fails_is_kept_as_such(kernels, monkeypatch, tmp_path):
    def failing(command, **how):
        raise subprocess.CalledProcessError(1, command, stderr="Traceback\nRuntimeError: no")

    monkeypatch.setattr(subprocess, "run", failing)
    kernels.main(small(kernels, tmp_path))
    assert json.loads((tmp_path / "layer-4x2.json").read_text())["failed"][-1] == "RuntimeError: no"
    assert "| tiny | stock | none | failed |" in (tmp_path / "table.md").read_text()


def test_a_case_that_takes_too_long_is_kept_as_such(kernels, monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", RUN)
    kernels.main(replace(small(kernels, tmp_path), limit=0.01))
    assert json.loads((tmp_path / "layer-4x2.json").read_text())["failed"] == ["not done after 0.01 s"]


def test_all_cases_have_names(kernels, tmp_path):
    names = kernels.cases(kernels.Options(out=tmp_path, networks=("resnet32",)))
    assert len(set(names)) == len(names)
    assert "augmentation/128" in names
    steps = [name.split("/")[2:] for name in names if name.startswith("step")]
    assert steps[0] == ["stock", "none"] and steps[-1] == ["fused", "none"]
    assert ["stage", "empty"] in steps and steps.index(["stage", "empty"]) < steps.index(["stage", "filled"])
