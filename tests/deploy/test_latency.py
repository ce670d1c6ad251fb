"""Latency: what is measured, what is kept of it, and what beats what."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import codistill as cd
from codistill.core.errors import CheckpointError
from codistill.deploy.latency import in_turn, known_latency, measure_latency, this_machine
from codistill.networks.probe import forward_flop
from codistill.runs.latency import Cost, Latency, Timing, pareto, read_latency, rows, write_latency

from .. import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four predictors."""
    folder = tmp_path_factory.mktemp("latency") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codistill.training.trainer.write_report", lambda run, summary: None)
        return cd.train(tiny.method(), tiny.data(), out=folder, settings=tiny.settings(epochs=1), show=False)


def test_every_predictor_is_measured_and_written(run, monkeypatch):
    # Beside other tests, a second thread would wait long for a core.
    monkeypatch.setattr("codistill.deploy.latency.cores", lambda: 1)
    threads = torch.get_num_threads()
    found = measure_latency(run, ("torch",), seconds=0.01)
    assert torch.get_num_threads() == threads
    assert found == read_latency(run) == known_latency(run, "torch")
    assert list(found.predictors) == ["student0", "student1", "ensemble", "fused"]
    ways = {(each.runtime, each.device, each.batch) for each in found.timings}
    assert ways >= {("torch", "cpu", 1), ("torch", "cpu", 64)}
    assert all(each.milliseconds > 0 for each in found.timings)
    assert found.milliseconds("torch").keys() == found.predictors.keys()
    student = run.load_method().predictors()["student0"]
    cost = found.predictors["student0"]
    assert cost == Cost(parameters=run.summary["parameters"]["student0"], flops=forward_flop(student, (8, 8)), bytes={})
    assert known_latency(run, "onnx") is None  # which was not measured


@pytest.mark.slow
def test_onnx_files_are_measured_beside_torch(run):
    found = measure_latency(run, ("torch", "onnx", "onnx-int8"), images=tiny.data().train.images, seconds=0.01)
    for runtime in ("torch", "onnx", "onnx-int8"):
        assert found.milliseconds(runtime).keys() == found.predictors.keys()
    assert all(set(each.bytes) == {"onnx", "onnx-int8"} for each in found.predictors.values())
    assert len(rows(found, run.summary["top1_error"])) == 1 + 4 * 3


def test_operations_are_counted_as_by_hand():
    # 8x8 outputs of 3x3x2 products, 4 channels; then 4 x 5: twice as many operations, for one image.
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5)
    )
    assert forward_flop(net, (8, 8)) == 2 * (64 * 27 * 4 + 4 * 5)


def latency(**milliseconds: float) -> Latency:
    """Measurements of ONNX files on this machine."""
    timings = [
        Timing(predictor=name, runtime="onnx", device="cpu", batch=1, threads=1, milliseconds=each)
        for name, each in milliseconds.items()
    ]
    costs = {name: Cost(parameters=10, flops=2_000_000, bytes={"onnx": 2048}) for name in milliseconds}
    return Latency(machine=this_machine(), image_size=(8, 8), predictors=costs, timings=timings)


def test_the_table_has_a_row_for_each_predictor_and_runtime():
    assert rows(latency(student0=1.5, fused=2.25), {"student0": 12.5}) == [
        ["predictor", "runtime", "error %", "parameters", "MFLOP", "file KiB", "ms, batch 1, 1 thread"],
        ["student0", "onnx", "12.50", "10", "2.0", "2", "1.5"],
        ["fused", "onnx", "", "10", "2.0", "2", "2.25"],
    ]


def test_measurements_of_another_machine_or_other_predictors_are_not_taken(run):
    own = run.summary["parameters"]
    found = latency(**dict.fromkeys(own, 1.0))
    costs = {name: dataclasses.replace(each, parameters=own[name]) for name, each in found.predictors.items()}
    found = dataclasses.replace(found, predictors=costs)
    write_latency(run, found)
    assert known_latency(run, "onnx") == found
    machine = {**found.machine, "cpu": "another"}
    wider = {**costs, "student0": dataclasses.replace(costs["student0"], parameters=9)}
    for other in ({"machine": machine}, {"predictors": wider}):
        write_latency(run, dataclasses.replace(found, **other))
        assert known_latency(run, "onnx") is None


@pytest.mark.parametrize("content", ['{"format": 2}', '{"format": 1}', "[]", "{", '{"format": 1, "image_size": 3}'])
def test_a_damaged_file_is_named_and_measured_again(run, content):
    (run.path / "latency.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"latency\.json"):
        read_latency(run)
    assert known_latency(run, "onnx") is None


def test_functions_are_called_in_turn():
    called: list[str] = []
    times = in_turn({name: lambda name=name: called.append(name) for name in "ab"}, 0.0)
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}
    assert called[:4] == ["a", "a", "b", "b"]  # each once to begin with, and once timed


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ({}, []),
        ({"a": (1, 2)}, ["a"]),
        ({"slow": (2, 1), "fast": (1, 2), "neither": (2, 2)}, ["fast", "slow"]),
        ({"a": (1, 1), "b": (1, 1)}, ["a", "b"]),
        ({"a": (1, 1), "b": (1, 2)}, ["a"]),
        ({"a": (1, 1), "broken": (1, float("nan"))}, ["a", "broken"]),
    ],
)
def test_the_front_is_what_no_other_beats(points, front):
    assert pareto(points) == front


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_falls_and_every_other_point_is_beaten(values):
    points = {str(number): each for number, each in enumerate(values)}
    front = [points[name] for name in pareto(points)]
    assert front == sorted(front) and [y for _, y in front] == sorted((y for _, y in front), reverse=True)
    for point in values:
        assert any(x <= point[0] and y <= point[1] for x, y in front)
