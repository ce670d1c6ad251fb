"""The scripts of benchmarks/ do what their first lines say."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import codistill as cd
from codistill import loop
from codistill.methods import METHODS

from . import tiny


@pytest.fixture
def all_methods(monkeypatch) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "all_methods.py"
    spec = importlib.util.spec_from_file_location("all_methods", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "all_methods", module)
    monkeypatch.setattr(loop, "write_report", lambda run: None)
    spec.loader.exec_module(module)
    return module


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_all_methods_on_digits(all_methods, tiny_registered, tmp_path, capsys, side_by_side):
    options = all_methods.Options(
        out=tmp_path,
        data="digits",
        network="tiny",
        teacher_network="tiny",
        epochs=1,
        train_limit=130,
        device="cpu",
        methods=("independent", "kd"),
        side_by_side=side_by_side,
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
    assert json.loads(environment.strip().strip("`")) == cd.Run(tmp_path / "teacher").record["environment"]
    # What is there already is not trained again.
    before = tiny.listing(tmp_path)
    all_methods.main(options)
    assert tiny.listing(tmp_path) == before


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
