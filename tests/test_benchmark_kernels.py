"""benchmarks/kernels.py on a CPU: what it writes, and that it goes on where it stopped."""

import json
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from .benchmark_script import cells, in_this_process, script

CHAINS = ("layer/4x2", "attention/4x2", "losses/2x5", "augmentation/3")
NAMES = [("layer/4x2", "alone"), ("layer/4x2", "added"), ("attention/4x2", ""), ("losses/2x5", "labels")]
NAMES += [("losses/2x5", "targets"), ("augmentation/3", "")]


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    return script("kernels", monkeypatch)


@pytest.fixture
def options(kernels, monkeypatch, tmp_path):
    """Small chains, measured in this process."""
    monkeypatch.setattr(kernels.cases, "in_a_process", in_this_process(kernels))
    return kernels.Options(
        out=tmp_path, chains=CHAINS, batch_size=4, precision="float32", device="cpu", rounds=2, seconds=0.01
    )


def test_every_chain_becomes_a_file_and_rows(kernels, options, capsys, monkeypatch):
    kernels.main(options)
    written = {path.name: json.loads(path.read_text()) for path in options.out.glob("*.json")}
    assert set(written) == {f"{chain.replace('/', '-')}.json" for chain in CHAINS}
    for result in written.values():
        assert result["failures"] == {} and result["environment"]["torch"]
        assert (result["batch_size"], result["precision"]) == (4, "float32")
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in result["microseconds"].values())
    table = (options.out / "table.md").read_text()
    assert capsys.readouterr().out == table
    head, rule, *rows = table.splitlines()
    assert [cells(row)[:2] for row in rows] == [[chain, f"stock, {name}".rstrip(", ")] for chain, name in NAMES]
    assert {cells(row)[3] for row in rows} == {"1.000"}
    assert {len(cells(row)) for row in (head, rule, *rows)} == {4}
    # What is there already is not measured again.
    monkeypatch.setattr(kernels.cases, "in_a_process", None)
    kernels.main(options)


def test_each_call_is_forward_and_backward_of_the_chain(kernels, options):
    for chain, name in NAMES:
        kind, sizes = chain.split("/")
        calls = kernels.KINDS[kind]("stock", options, torch.device("cpu"), *map(int, sizes.split("x")))
        assert set(calls) == {other for of, other in NAMES if of == chain}
        found = [tuple(each.shape) for each in calls[name]()]
        weights = {"alone": 2, "added": 2, "": 3}.get(name, 0) if kind in ("layer", "attention") else 0
        if kind == "augmentation":
            assert found == [(3, 3, 32, 32), (3,)]
        else:
            expected = [(2, 4, 5)] if kind == "losses" else [(4, 4, 2, 2)] * (1 + (name == "added"))
            assert found[: len(expected)] == expected and len(found) == len(expected) + weights


def test_a_way_that_fails_leaves_the_others(kernels, options, monkeypatch):
    result = {"case": "layer/4x2", "microseconds": {"stock, alone": [2.0, 4.0, 3.0], "compiled, alone": [6.0]}}
    result["failures"] = {"fused": "RuntimeError: no"}
    rows = kernels.table([result, {"case": "losses/2x5", "failed": ["no"]}]).splitlines()[2:]
    assert [cells(row)[1:] for row in rows] == [
        ["stock, alone", "3.000 (2.000 to 4.000)", "1.000"],
        ["compiled, alone", "6.000 (6.000 to 6.000)", "2.000"],
        ["fused", "failed", "-"],
        ["all", "failed", "-"],
    ]
    monkeypatch.setattr(kernels, "alone", lambda *_: 1 / 0)
    kernels.main(replace(options, chains=("layer/4x2",)))
    written = json.loads((options.out / "layer-4x2.json").read_text())
    assert written["failures"] == {"stock": "ZeroDivisionError: division by zero"} and written["microseconds"] == {}


@pytest.mark.gpu
def test_on_a_gpu_calls_are_replayed_from_a_graph(kernels, options, monkeypatch):
    monkeypatch.setattr(kernels, "WAYS", ("stock",))  # a GPU that is not there has no compiler
    times = []

    def rounds(replay, *_):
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: times.append(graph))
        replay(3)
        return [float(kernels.CALLS_IN_A_GRAPH)]

    monkeypatch.setattr(kernels.cases, "rounds_of", rounds)
    for chain, names in (("layer/4x2", 2), ("attention/4x2", 1), ("losses/2x5", 2), ("augmentation/3", 1)):
        result = kernels.measure(replace(options, device="cuda", case=chain))
        assert result["failures"] == {} and list(result["microseconds"].values()) == [[1000.0]] * names
    assert len(times) == 3 * 6 and len(set(map(id, times))) == 6


def test_times_are_of_one_step_with_all_rounds_within_the_seconds(kernels, options, monkeypatch):
    now, trained = [0.0], []
    monkeypatch.setattr(kernels.cases.time, "perf_counter", lambda: now[0])

    def run(steps: int) -> None:
        trained.append(steps)
        now[0] += steps * 0.002

    found = kernels.cases.rounds_of(run, replace(options, rounds=5, seconds=1.0), torch.device("cpu"))
    assert trained == [1] + [100] * 5 and found == pytest.approx([2.0] * 5)
    assert kernels.alone(lambda: run(1), replace(options, rounds=1), torch.device("cpu")) == pytest.approx([2000.0])


def test_own_kernels_stand_for_the_stock_function_of_their_name(kernels):
    pytest.importorskip("triton")
    from codistill.kernels import attention, augment, batch_norm, losses

    for stock, module in (
        (kernels.normalised, batch_norm),
        (kernels.attended, attention),
        (kernels.cross_entropy, losses),
        (kernels.soft_target_kl, losses),
        (kernels.DeviceImages.augmented, augment),
    ):
        name = module.__name__.rpartition(".")[2]
        assert kernels.computed("stock", stock, name) is stock
        fused = kernels.computed("fused", stock, name)
        assert fused is getattr(module, stock.__name__) and fused is not stock


def test_a_process_is_given_its_case_and_fails_in_a_few_lines(kernels, tmp_path):
    options = kernels.Options(out=tmp_path, chains=("layer",), limit=60.0, device="cpu", rounds=1)
    kernels.main(options)  # the case has no sizes
    failed = json.loads((tmp_path / "layer.json").read_text())["failed"]
    assert failed[-1].startswith("ValueError: not enough values to unpack") and len(failed) <= 5
    assert "| layer | all | failed | - |" in (tmp_path / "table.md").read_text()
    (tmp_path / "layer.json").unlink()
    kernels.main(replace(options, limit=0.01))
    assert json.loads((tmp_path / "layer.json").read_text())["failed"] == ["not done after 0.01 s"]
