"""benchmarks/executions.py on a CPU: what it writes, what it asks methods for, and in which order."""

import json
from types import ModuleType

import pytest

from codistill.execution import Execution

from . import tiny
from .benchmark_script import cells, in_this_process, script

TINY = ["tiny/x1/stock/none", "tiny/x1/fused-overlap/none", "tiny/x2/stock/none", "tiny/x2/fused-overlap/none"]
TINY += ["tiny/x1/block/empty", "tiny/x1/block/filled", "tiny/x2/block/filled"]


@pytest.fixture
def executions(monkeypatch, tiny_registered) -> ModuleType:
    module = script("executions", monkeypatch)
    monkeypatch.setattr(module.cases, "in_a_process", in_this_process(module))
    return module


def small(module: ModuleType, out, **changes):
    given = {"networks": ("tiny",), "runs": (1, 2), "variants": ("stock", "fused-overlap", "block"), "batch_size": 4}
    given |= {"precision": "float32", "device": "cpu", "backend": "eager", "rounds": 2, "seconds": 0.01}
    return module.Options(out=out, **{**given, **changes})


def test_every_case_becomes_a_file_and_a_row(executions, tmp_path, monkeypatch, capsys):
    prepared, loops, own_loop = [], [], executions.resident_loop
    # The kernels and the compiler have tests of their own; here they only have to be asked for.
    monkeypatch.setattr(executions.Execution, "prepare", lambda execution, method, *_, **__: prepared.append(execution))
    monkeypatch.setattr(
        executions, "compile_in_place", lambda method, part, backend: prepared.append((part, backend)) or 7
    )

    def loop(methods, config, device, execution):
        loops.append((len(methods), execution))
        return own_loop(methods, config, device)

    monkeypatch.setattr(executions, "resident_loop", loop)
    options = small(executions, tmp_path)
    assert executions.listed(options) == TINY
    executions.main(options)
    stock, fused, block = Execution(), Execution("fused", overlap=True), ("block", "eager")
    assert prepared == [stock, fused, stock, stock, fused, fused, block, block, block, block]
    compiled = Execution(compiled=True)
    assert loops == [(1, stock), (1, fused), (2, stock), (2, fused), (1, compiled), (1, compiled), (2, compiled)]
    written = [json.loads((tmp_path / f"{case.replace('/', '-')}.json").read_text()) for case in TINY]
    assert all(len(each["ms_per_step"]) == 2 and each["weights_are_finite"] for each in written)
    assert all(0 < each["first_step_seconds"] < each["captured_after_seconds"] for each in written)
    table = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == table
    head, rule, *rows = table.splitlines()
    assert ["/".join(cells(row)[:4]) for row in rows] == [case.replace("tiny/x", "2 x tiny/") for case in TINY]
    assert {len(cells(row)) for row in (head, rule, *rows)} == {9}
    # What is there already is not measured again.
    monkeypatch.setattr(executions.cases, "in_a_process", None)
    executions.main(options)


def test_times_are_those_of_one_run_and_compared_with_the_same_fleet(executions):
    def result(case: str, milliseconds: float) -> dict:
        times = {"ms_per_step": [milliseconds], "first_step_seconds": 2.0, "weights_are_finite": True}
        return {"case": case, **times, "peak_memory_mib": 600.0}

    results = [result(TINY[0], 4.0), result(TINY[1], 3.0), result(TINY[2], 2.0), result(TINY[3], 1.0)]
    results.append({"case": TINY[4], "failed": ["no"]})
    rows = [cells(row) for row in executions.table(results).splitlines()[2:]]
    assert [row[5] for row in rows] == ["1.000", "0.750", "1.000", "0.500", "-"]
    assert [row[7] for row in rows] == ["600", "600", "300", "300", "-"] and rows[4][4] == "failed"
    assert [row[5] for row in map(cells, executions.table(results[1:2]).splitlines()[2:])] == ["-"]


def test_steps_of_a_fleet_are_divided_among_its_runs(executions, tmp_path, monkeypatch):
    monkeypatch.setattr(executions.cases, "rounds_of", lambda run, options, device: [6.0, 8.0])
    options = small(executions, tmp_path, case="tiny/x2/stock/none")
    assert executions.measure(options)["ms_per_step"] == [3.0, 4.0]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["tiny/x1/stock-overlap/none", "tiny/x2/stock/none"])
def test_steps_are_captured_on_a_gpu(executions, tmp_path, case):
    result = executions.measure(small(executions, tmp_path, case=case, device="cuda", precision="bf16"))
    assert result["weights_are_finite"] and len(result["ms_per_step"]) == 2 and "peak_memory_mib" in result


def test_compiled_code_is_filled_before_it_is_read(executions, tmp_path):
    options = small(executions, tmp_path)
    inside = [executions.variables(case, options)["TORCHINDUCTOR_CACHE_DIR"] for case in TINY]
    assert len({inside[4], inside[5], inside[6]}) == 1 and inside[4].startswith(str(tmp_path))
    kept = tmp_path / "compiled" / "tiny-block" / "code"
    kept.parent.mkdir(parents=True)
    kept.touch()
    executions.variables(TINY[5], options)
    assert kept.exists()
    executions.variables(TINY[4], options)
    assert not kept.exists()
    # Overlapping streams run the same code.
    both = small(executions, tmp_path, runs=(6,), variants=("stage", "stage-overlap"))
    assert executions.listed(both) == ["tiny/x6/stage/empty", "tiny/x6/stage/filled", "tiny/x6/stage-overlap/filled"]


def test_by_default_what_the_product_chooses_among_comes_first(executions, tmp_path):
    names = executions.listed(executions.Options(out=tmp_path))
    assert len(set(names)) == len(names)
    fleets = [name.split("/")[1] for name in names]
    assert names[0] == "resnet32/x1/stock/none" and set(fleets) == {"x1", "x6"}
    plain = [name for name in names if name.endswith("/none")]
    assert names[: len(plain)] == plain and len(plain) == 2 * 3 * 4
    compiled = [name.split("/")[2] for name in names[len(plain) :]]
    assert list(dict.fromkeys(compiled)) == ["stage", "stage-overlap", "block", "branch", "whole"]


def test_branches_are_compiled_each_as_one(executions, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(executions.torch, "compile", lambda branch, **how: compiled.append(how) or branch)
    monkeypatch.setattr(executions.torch.nn.Module, "compile", lambda part, **how: compiled.append(how))
    method = tiny.method().train()
    executions.prepare("branch", method, small(executions, tmp_path), executions.torch.device("cpu"))
    parts = len(compiled)
    assert parts > method.cohort.shared_stages
    method(executions.torch.randn(4, 3, 8, 8))
    assert len(compiled) > parts and all(how == {"dynamic": False, "backend": "eager"} for how in compiled)
