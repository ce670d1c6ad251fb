"""Latency against error in a page, from latency.json."""

import re
import shutil

import pytest

import codistill as cd
from codistill.report.comparison import write_comparison
from codistill.report.page import run_page
from codistill.report.tradeoff import ways
from codistill.runs.latency import FILE, Cost, Latency, Timing, write_latency

from .. import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    return cd.train(tiny.method(), tiny.data(), out=folder / "run", settings=tiny.settings(epochs=1), show=False)


def latency(runtimes=("torch", "onnx"), times=(1.0, 2.0, 3.0, 4.0)):
    names = ("student0", "student1", "ensemble", "fused")
    timings = [
        Timing(predictor=name, runtime=runtime, device="cpu", batch=batch, threads=threads, milliseconds=time * batch)
        for runtime in runtimes
        for name, time in zip(names, times, strict=True)
        for batch in (1, 64)
        for threads in (1, 2)
    ]
    costs = {name: Cost(parameters=700, flops=90_000, bytes={"onnx": 2048}) for name in names}
    machine = {"cpu": "A <fast> CPU", "cores": 2, "gpu": None, "torch": "2", "onnxruntime": None}
    return Latency(machine=machine, image_size=(8, 8), predictors=costs, timings=timings)


def test_what_is_drawn_is_the_exported_file_where_it_was_measured():
    assert ways(latency()) == [("onnx", "cpu", 1, 1), ("onnx", "cpu", 64, 2)]
    assert ways(latency(runtimes=("torch",))) == [("torch", "cpu", 1, 1), ("torch", "cpu", 64, 2)]


def test_a_measured_run_has_the_section_and_the_command_no_more(run):
    write_latency(run, latency())
    page = run_page(run)
    assert "A &lt;fast&gt; CPU, 2 cores" in page and "Latencies are not measured" not in page
    section = page[page.index('<h2 id="latency"') : page.index('<h2 id="settings"')]
    assert "Test error,\xa0% against milliseconds: one image, one thread, ONNX Runtime" in section
    rows = dict(re.findall(r'<th scope="row">(\w+)</th><td>([\d.]+)</td>', section))
    assert rows["student0"] == "64" and rows["fused"] == "256"
    errors, times = run.summary["top1_error"], {"student0": 1, "student1": 2, "ensemble": 3, "fused": 4}
    front = [a for a in errors if not any(times[b] < times[a] and errors[b] <= errors[a] for b in errors)]
    assert f"On the Pareto front, from fast to good: {', '.join(front)}." in section
    assert section.count('class="point best') == 2 * len(front)


def test_a_comparison_has_a_point_for_each_predictor_of_a_group(run, tmp_path):
    write_latency(run, latency())
    shutil.copytree(run.path, tmp_path / "again")
    page = write_comparison([run.path, tmp_path / "again"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="point') == 8 and "student0</title>" in page


@pytest.mark.fault(53)
@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', '{"format": 1, "image_size": [8, 8]}'])
def test_a_damaged_file_costs_its_section_alone(run, content, capsys):
    (run.path / FILE).write_text(content)
    page = run_page(run)
    assert '<h2 id="latency"' not in page and '<h2 id="curves"' in page
    assert "Latency against error: making it failed" in page and FILE in page
    assert capsys.readouterr().err.count("\n") == 1


def test_it_is_measured_by_a_flag(run, monkeypatch, tmp_path, capsys):
    from codistill.cli import commands

    monkeypatch.setattr(commands, "measure_latency", lambda each: latency())
    commands.report_command([str(run.path), "--latency", "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.endswith(f"\nok: {tmp_path / 'page.html'}\n")
