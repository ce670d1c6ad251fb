"""The scripts of benchmarks/: each starts, measures each case once and resumes."""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.methods import METHODS
from codistill.training import trainer as loop

from .. import tiny
from ..faults.running import at_step
from .benchmark_script import cells, script


@pytest.fixture
def all_methods(monkeypatch) -> ModuleType:
    monkeypatch.setattr(loop, "write_report", lambda run, summary: None)
    return script("all_methods", monkeypatch)


def on_digits(all_methods: ModuleType, out: Path, **changes: Any) -> Any:
    """Describe tiny trainings of the script on digits."""
    return all_methods.Options(out=out, data="digits", network="tiny", teacher_network="tiny", device="cpu", **changes)


@pytest.mark.parametrize("side_by_side", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_all_methods_on_digits(all_methods, tiny_registered, tmp_path, capsys, side_by_side):
    options = on_digits(
        all_methods, tmp_path, epochs=1, train_limit=130, methods=("independent", "kd"), side_by_side=side_by_side
    )
    all_methods.main(options)
    written = (tmp_path / "table.md").read_text()
    table, environment = written.rsplit("\n\n", 1)
    assert table in capsys.readouterr().out
    head, rule, *rows = table.splitlines()
    assert cells(head)[:3] == ["method", "better student", "other students"] and len(cells(head)) == len(cells(rule))
    assert [cells(row)[0] for row in rows] == ["independent", "independent", "kd"]
    for row, name in zip(rows, ("teacher", "independent", "kd"), strict=True):
        run = cd.Run(tmp_path / name)
        assert run.config.train.train_limit == 130 and run.config.train.epochs == 1
        errors = run.summary["top1_error"]
        students = sorted(value for key, value in errors.items() if key.startswith("student"))
        ensemble = f"{errors['ensemble']:.2f}" if "ensemble" in errors else "-"
        others = f"{students[1]:.2f}" if len(students) > 1 else "-"
        assert cells(row)[1:5] == [f"{students[0]:.2f}", others, ensemble, "-"]
        assert len(cells(row)) == len(cells(head))
    assert "kl/teacher→student1 " in rows[2] and "loss " not in rows[2]
    assert cd.Run(tmp_path / "kd").config.teaching.teacher == str(tmp_path / "teacher")
    assert json.loads(environment.strip().strip("`")) == cd.Run(tmp_path / "teacher").metadata["environment"]
    # What is there already is not trained again.
    before = tiny.listing(tmp_path)
    all_methods.main(options)
    assert tiny.listing(tmp_path) == before


@pytest.mark.slow
def test_all_methods_resumes_where_it_was_stopped(all_methods, tiny_registered, tmp_path, monkeypatch, capsys):
    def interrupt(step):
        raise KeyboardInterrupt

    options = on_digits(all_methods, tmp_path, epochs=2, train_limit=128, methods=("kd", "dml"))
    for _ in range(3):  # in the teacher's last step, in kd's first one, in kd's last one
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            at_step(patch, 2, interrupt)
            all_methods.main(options)
    all_methods.main(options)
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [cells(row)[0] for row in rows] == ["independent", "kd", "dml"]
    assert all(cd.Run(tmp_path / name).finished for name in ("teacher", "kd", "dml"))


def test_every_method_gets_students_that_it_takes(all_methods, tmp_path):
    for name, kind in METHODS.items():
        count = len(all_methods.config_of(name, all_methods.Options(out=tmp_path)).networks)
        assert kind.min_students <= count <= (kind.max_students or count), name


def test_a_run_that_did_not_finish_is_named(all_methods, tiny_registered, tmp_path):
    run = cd.train(tiny.method(), tiny.data(), out=tmp_path / "run", settings=tiny.settings(epochs=1), show=False)
    (run.path / "summary.json").write_text(
        json.dumps({"status": "diverged", "error": "ce/student0 became NaN", "method": "mfef"})
    )
    head, _, row = all_methods.table([run]).splitlines()
    assert cells(row)[:2] == ["mfef", "diverged: ce/student0 became NaN"] and len(cells(row)) == len(cells(head))


def in_this_process(written: list[str], limit: float) -> str:
    """Run `python -m codistill` here: a process of its own takes seconds to start."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert written[:2] == ["-m", "codistill"] and main(written[2:]) == 0
    return output.getvalue()


@pytest.fixture
def speed(monkeypatch) -> ModuleType:
    return script("speed", monkeypatch)


def tiny_speed(speed: ModuleType, out: Path, **changes: Any) -> Any:
    """Describe a rehearsal of the script on a CPU."""
    chosen = {"networks": ("tiny",), "runs": (2,), "students": (1, 3), "batch_size": 8, "seconds": 0.01}
    chosen |= {"precision": "float32", "modes": ("off",), "tests": "", "device": "cpu"}
    return speed.Options(out=out, **(chosen | changes))


def test_speed_measures_each_case_once(speed, tiny_registered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "run", in_this_process)
    options = tiny_speed(speed, tmp_path)
    speed.main(options)
    names = ["tiny-off", "tiny-x2-off", "tiny-compare", "tiny-float32", "tiny-students1", "tiny-students3"]
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert list(measured) == names
    results = {name: each["result"] for name, each in measured.items()}
    head, rule, *rows = (tmp_path / "table.md").read_text().split("\n\n")[0].splitlines()
    assert [cells(row)[0] for row in rows] == names
    column = {name: index for index, name in enumerate(cells(head))}
    assert all(len(cells(row)) == len(cells(head)) == len(cells(rule)) for row in rows)
    for row, result in zip(rows, results.values(), strict=True):
        assert cells(row)[column["computed with"]] == "-"
        assert cells(row)[column["ms per step of a run"]] == f"{result['ms_per_step']:.2f}"
        assert cells(row)[column["images/s in all"]] == f"{result['runs'] * result['images_per_second']:,.0f}"
        assert cells(row)[column["launches per step"]] == f"{result['operators_per_step']:,}"
        assert (cells(row)[column["ours / plain"]] == "-") == ("ratio_to_plain" not in result)
    assert results["tiny-x2-off"]["runs"] == 2 and len(results["tiny-students3"]["networks"]) == 3
    assert results["tiny-students1"]["operators_per_step"] < results["tiny-students3"]["operators_per_step"]
    assert "aten::" in (tmp_path / "tiny-off.txt").read_text()
    # Another start measures what is missing, and nothing else.
    (tmp_path / "measured.json").write_text(
        json.dumps({name: each for name, each in measured.items() if name != "tiny-float32"})
    )
    capsys.readouterr()
    monkeypatch.setattr(speed, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory: use a smaller")))
    speed.main(options)
    assert capsys.readouterr().out.splitlines()[0].startswith("tiny-float32:")
    assert "| tiny-float32 | out of memory: use a smaller |" in (tmp_path / "table.md").read_text()
    again = json.loads((tmp_path / "measured.json").read_text())
    assert {name: each["result"] for name, each in again.items() if "result" in each}.items() <= results.items()


def test_speed_stops_where_its_budget_ends(speed, tmp_path, monkeypatch, capsys):
    taken = []

    def too_slow(written: list[str], limit: float) -> str:
        taken.append(limit)
        raise TimeoutError(f"not done after {limit:.0f} s")

    monkeypatch.setattr(speed, "run", too_slow)
    # A case that the budget cuts short is missing; one that takes longer than a case may has failed.
    speed.main(tiny_speed(speed, tmp_path, budget=100.0, limit=200.0))
    assert len(taken) == 1 and 30 < taken[0] <= 100 and not (tmp_path / "measured.json").exists()
    assert "the budget ends before tiny-off: start this again" in capsys.readouterr().out
    speed.main(tiny_speed(speed, tmp_path, limit=50.0, students=()))
    assert taken[1:] == [50.0] * 4
    assert "| tiny-x2-off | not done after 50 s |" in (tmp_path / "table.md").read_text()
    speed.main(tiny_speed(speed, tmp_path, budget=20.0))
    assert len(taken) == 5 and "the budget ends before tiny-students1" in capsys.readouterr().out


def test_speed_says_why_a_case_failed(speed, tmp_path):
    with pytest.raises(RuntimeError, match="unknown method 'mfeff': did you mean mfef"):
        speed.run(["-m", "codistill", "bench", "mfeff"], 100.0)
    with pytest.raises(TimeoutError, match=r"^not done after 5 s; its last line: ten tests$"):
        speed.run(["-uc", "import time; print('ten tests'); time.sleep(60)"], 5.0)


def test_speed_has_all_that_is_asked_for(speed, tmp_path, monkeypatch):
    options = speed.Options(out=tmp_path)
    listed = {case.name: speed.command(case, options) for case in speed.cases(options)}
    assert len(listed) == len(speed.cases(options))
    networks, ways = ("resnet32", "wrn-16-2", "resnet110"), ("off", "on")
    for network in networks:
        assert {"--compare", "bf16"} <= set(listed[f"{network}-compare"])
        assert {"--compare", "float32"} <= set(listed[f"{network}-float32"])
        assert {f"{network}-x{runs}-{way}" for runs in (2, 3, 6, 8) for way in ways} <= set(listed)
        assert "--profile" in listed[f"{network}-on"]
    targets = {case.name: case.target for case in speed.cases(options) if case.target}
    assert targets["resnet110-on"] == 7.5 and targets["resnet110-x6-off"] == 3.0 and len(targets) == 12
    # What is most worth knowing comes first, and few files come back from a machine that is lent.
    telling = [f"{network}{fleet}-{way}" for fleet in ("", "-x6") for way in ways for network in networks]
    assert list(listed)[:13] == [*telling, "tests"]
    assert sum("--profile" in written for written in listed.values()) == 3
    assert [len(case.networks) for case in speed.cases(options) if "students" in case.name] == [1, 2, 3, 4, 5]
    assert listed.pop("tests")[:5] == ["-m", "pytest", "tests", "-m", "gpu"]
    # `codistill bench` takes each of the commands.
    asked = []
    monkeypatch.setattr("codistill.bench.bench.bench", lambda config, runs, *_: asked.append((config, runs)) or {})
    monkeypatch.setattr("codistill.bench.bench.lines", lambda result: [])
    for name, written in listed.items():
        assert main(written[2:]) == 0
        config, runs = asked[-1]
        assert config.execution.compile == ("on" if name.endswith("-on") else "off"), name
        assert runs == int(name.split("-x")[1][0] if "-x" in name else 1) and config.train.batch_size == 128


def test_cpu_measures_layouts_and_waiting(tiny_registered, tmp_path, monkeypatch, capsys):
    cpu = script("cpu", monkeypatch)
    asked = []

    def measured_bench(variables: dict[str, str], seconds: float, options: object) -> dict[str, float]:
        asked.append(variables)
        return {"images_per_second": 10.0 + len(asked), "plain_images_per_second": 10.0, "ratio_to_plain": 2.0}

    monkeypatch.setattr(cpu, "bench", measured_bench)
    cpu.main(
        cpu.Options(out=tmp_path, network="tiny", batch_size=8, seconds=0.1, rounds=3, busy=(0, 1), compiled=False)
    )
    ways = list(cpu.WAITING.values())
    assert asked == ways * 6
    layouts, waiting = (part.splitlines()[2:] for part in (tmp_path / "table.md").read_text().split("\n\n")[:2])
    assert [cells(row)[0].split(",")[0] for row in layouts[:2]] == ["channels_last", "contiguous"]
    assert cells(layouts[-1])[0].startswith("plain loop") and float(cells(layouts[0])[2]) == 1
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert set(measured["layouts"]["rounds"]) == {cells(row)[0] for row in layouts}
    # The median of the three processes of the first way, alone and beside a busy one: 11, 17, 23 and 29, 35, 41.
    assert cells(waiting[0]) == ["torch's default", "17", "10", "2.00", "35", "10", "2.00"]
    assert len(measured["waiting"]) == 36 and {each["busy"] for each in measured["waiting"]} == {0, 1}


@pytest.mark.slow
def test_saving_measures_the_share_of_checks_and_saves(tiny_registered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "write_report", lambda run, summary: None)
    saving = script("saving", monkeypatch)
    monkeypatch.setattr(
        sys, "argv", ["saving.py", "--networks", "tiny", "tiny", "--epochs", "2", "--out", str(tmp_path)]
    )
    assert saving.main() == 0
    result = json.loads((tmp_path / "saving.json").read_text())
    parts = [value for key, value in result.items() if key.startswith("seconds_")]
    assert len(parts) == 2 and all(0 < part < result["epoch_seconds"] for part in parts)
    assert result["share_of_an_epoch"] == pytest.approx(sum(parts) / (result["epoch_seconds"] - sum(parts)))
    assert f"{100 * result['share_of_an_epoch']:.2f} %" in capsys.readouterr().out


@pytest.fixture
def peers(monkeypatch) -> ModuleType:
    monkeypatch.setattr(loop, "write_report", lambda run, summary: None)
    peers, program = script("peers", monkeypatch), script("peer_ffl", monkeypatch)

    def whole(written: list[str], threads: int | None, log: Path) -> dict[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            if str(peers.PROGRAM) in written:
                program.main(program.parsed(written[2:]))
            else:
                in_this_process(written[1:], 0)
        return {"seconds": 4.0, "cpu_seconds": 2.0, "peak_rss_mib": 1000.0}

    monkeypatch.setattr(peers, "run", whole)
    return peers


def test_peers_train_the_same_thing_in_turn(peers, tmp_path, monkeypatch, capsys):
    split = {"train": tiny.split(40, 0), "test": tiny.split(20, 1)}
    arrays = {f"{name}_{kind}": getattr(each, kind) for name, each in split.items() for kind in ("images", "labels")}
    np.savez(tmp_path / "tiny.npz", **arrays)
    options = peers.Options(
        out=tmp_path / "out",
        data=tmp_path / "tiny.npz",
        images=24,
        batch=12,
        networks=("resnet8", "resnet8"),
        epochs=1,
        precision=("bf16",),
        workers=0,
        rounds=1,
    )
    peers.main(options)
    held = json.loads((options.out / "measured.json").read_text())
    ran = [(each["program"], each["precision"]) for each in held["programs"]]
    assert ran == [("peer", "bf16"), ("codistill", "bf16")]
    # Three cross-entropies of three classes, log 3 each at first.
    assert all(2 < each["loss"] < 6 for each in held["programs"])
    table = (options.out / "table.md").read_text()
    assert table in capsys.readouterr().out
    head, rule, *rows = table.split("\n\n")[0].splitlines()
    assert all(len(cells(row)) == len(cells(head)) == len(cells(rule)) for row in rows)
    assert cells(rows[0])[0] == "peer, bf16" and cells(rows[0])[2:5] == ["6", "12", "1,000"]
    assert cells(rows[1])[8:] == ["1.00", "-"] and cells(rows[0])[7:] == ["-", "-", "-"]
    # Another start continues: here there is nothing left, and with another round two programs in each precision.
    monkeypatch.setattr(
        peers, "measure", lambda program, precision, options: dict(held["programs"][0], program=program)
    )
    peers.main(options)
    assert json.loads((options.out / "measured.json").read_text()) == held
    peers.main(dataclasses.replace(options, rounds=2))
    assert len(json.loads((options.out / "measured.json").read_text())["programs"]) == 4
    with pytest.raises(SystemExit, match=r"measured.json: holds what other options have measured: name another --out"):
        peers.main(dataclasses.replace(options, epochs=3))


def test_peers_measure_a_whole_program(monkeypatch, tmp_path):
    peers = script("peers", monkeypatch)
    took = peers.run([sys.executable, "-c", "held = bytes(range(256)) * 400_000"], None, tmp_path / "log")
    assert took["peak_rss_mib"] > 100 and 0 < took["cpu_seconds"] < took["seconds"] + 1
    with pytest.raises(SystemExit, match=r"ended with 3:\nno such image"):
        peers.run([sys.executable, "-c", "import sys; print('no such image'); sys.exit(3)"], None, tmp_path / "log")
    with pytest.raises(SystemExit, match="the peer has two equal ResNets"):
        options = peers.Options(out=tmp_path, data=tmp_path, networks=("resnet20", "wrn-16-2"))
        peers.command("peer", "float32", tmp_path, tmp_path, options)


def test_peers_divide_images_by_class(monkeypatch, tmp_path):
    peers = script("peers", monkeypatch)
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 0, 2, 2])
    images = np.arange(10, dtype=np.uint8)[:, None, None, None]
    np.savez(tmp_path / "all.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    peers.subset(peers.Options(out=tmp_path, data=tmp_path / "all.npz", images=5), tmp_path / "part.npz")
    with np.load(tmp_path / "part.npz") as part:
        assert part["train_images"].ravel().tolist() == [0, 1, 4, 5, 6] and part["train_labels"].tolist() == [
            0,
            0,
            1,
            1,
            2,
        ]
        assert len(part["test_labels"]) == 1


@pytest.fixture
def scaling(monkeypatch) -> ModuleType:
    return script("scaling", monkeypatch)


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scaling_fits_and_draws_what_it_measured(scaling, tmp_path, monkeypatch, capsys, drawn):
    asked = []

    def measured(point: Any, loop: str, options: Any) -> dict[str, Any]:
        asked.append((point, loop))
        work = point.batch * point.width**2 / 100
        memory = {"peak_mib": 500.0, "step_mib": point.batch + (10.0 if loop == "plain" else 0.0)}
        if loop == "plain":
            return memory
        return memory | {"ms": {"codistill": 2 * work, "plain": 3 * work**2}, "ratio_to_plain": 1.5, "gflop": work}

    monkeypatch.setattr(scaling, "in_a_process", measured)
    if not drawn:
        monkeypatch.setattr(scaling, "draw", lambda *_: None)
    options = scaling.Options(
        out=tmp_path, students=(2,), depth=(8,), width=(8, 16), batch=(64, 128), size=(32,), images=(1024, 2048)
    )
    scaling.main(options)
    assert len(asked) == 8  # four points, each with both loops: where axes meet is one point
    *tables, slopes, _ = (tmp_path / "table.md").read_text().strip().split("\n\n")
    assert [cells(table.splitlines()[0])[0] for table in tables] == [
        "students",
        "depth",
        "width",
        "batch",
        "size",
        "images",
    ]
    assert cells(tables[3].splitlines()[2]) == ["64", "163.84", "327.7", "80530.6", "1.50", "64", "74", "0.86"]
    head, _, *rows = slopes.splitlines()
    fitted = {cells(row)[0]: dict(zip(cells(head)[1:], cells(row)[1:], strict=True)) for row in rows}
    assert list(fitted) == ["width", "batch", "images"]
    assert fitted["batch"] == {
        "work": "1.00",
        "time, codistill": "1.00",
        "memory, codistill": "1.00",
        "time of work, codistill": "1.00",
        "time, plain": "2.00",
        "memory, plain": "0.90",
        "time of work, plain": "2.00",
    }
    assert fitted["width"]["work"] == "2.00" and fitted["images"]["time of work, codistill"] == "nan"
    assert not drawn or (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    # Another start measures what is missing.
    scaling.main(dataclasses.replace(options, batch=(64, 128, 256)))
    assert [point.batch for point, _ in asked[8:]] == [256, 256]


def test_scaling_measures_both_loops_of_a_point(scaling, monkeypatch):
    # Not narrower: with AVX2 oneDNN corrupts memory in the backward pass of a 1x1 convolution of stride 2 from 2 or 4
    # channels in channels_last (torch 2.14.1).
    point = scaling.Point(students=1, width=8, batch=4, size=8, images=8)
    found = scaling.measure(point, "codistill", 0.01, torch.get_num_threads())
    assert set(found["ms"]) == {"codistill", "plain"} and all(each > 0 for each in found["ms"].values())
    assert found["peak_mib"] > found["step_mib"] >= 0 and found["gflop"] > 0
    assert set(scaling.measure(point, "plain", 0.01, torch.get_num_threads())) == {"peak_mib", "step_mib"}


def test_cpu_keeps_cores_busy_only_as_long_as_needed(monkeypatch):
    cpu = script("cpu", monkeypatch)
    started = []
    start = cpu.subprocess.Popen
    monkeypatch.setattr(cpu.subprocess, "Popen", lambda *given: started.append(start(*given)) or started[-1])
    with cpu.busy_processes(2):
        assert [each.poll() for each in started] == [None, None]
    assert [each.poll() is None for each in started] == [False, False]


def test_augmentation_times_each_kind_and_draws(tmp_path, monkeypatch, capsys):
    augmentation = script("augmentation", monkeypatch)
    monkeypatch.setattr(augmentation, "KINDS", dict(list(augmentation.KINDS.items())[:3]))
    augmentation.main(augmentation.Options(out=tmp_path, network="resnet8", batch_size=8, rounds=1))
    found = json.loads((tmp_path / "measured.json").read_text())
    assert list(found["kinds"]) == ["crops and flips", "randaugment", "randaugment and mixup"]
    assert all(0 < each["of_it_images_ms"] < each["step_ms"] for each in found["kinds"].values())
    assert found["kinds"]["crops and flips"]["step_over_step_without"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 3
    augmentation.main(augmentation.Options(picture=tmp_path / "rows.png"))
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_of_methods_is_that_of_the_registry(monkeypatch):
    methods = script("methods", monkeypatch)
    page = methods.page()
    assert methods.PAGE.read_text(encoding="utf-8") == page
    for name, kind in METHODS.items():
        assert kind.family is not None and kind.exchanges, name
        assert (kind.year or 0) >= 2014 or kind.family == "baseline", name
        assert f"[{name}](" in page


def test_the_cost_of_a_method_is_measured(monkeypatch, tmp_path):
    methods = script("methods", monkeypatch)
    monkeypatch.setattr(methods, "memory_of", lambda name, *rest: {"dml": 3.0, "independent": 2.0}[name])
    options = methods.Measure(tmp_path / "cost.json", "resnet8", "resnet8", 4, rounds=1, methods=("dml",))
    methods.measure(options)
    (found,) = json.loads(options.out.read_text())["methods"].values()
    assert found["memory"] == 1.5 and found["time"] > 0
    assert (found["students"], found["deployed_extra"]) == (2, 0)
