"""`codistill sweep --controls`: what each run has to beat."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core.errors import UsageError
from codistill.networks.network import parameter_count
from codistill.settings.build import build_method
from codistill.sweeps import controls
from codistill.sweeps.controls import CONTROLS, measured_factor, with_controls
from codistill.sweeps.spec import PlannedRun, read_spec

from .. import tiny

SPEC = """
data = "digits"
networks = ["resnet20", "resnet20"]
epochs = 10
milestones = [4, 6]
[grid]
method = ["mfef", "dml"]
seed = [0, 1]
"""


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, str]]:
    """Every run takes 2.5 times as long as a network alone; which were measured."""
    calls: list[tuple[str, str]] = []

    def factor(config, network: str) -> float:
        calls.append((config.method_name, network))
        return 2.5

    monkeypatch.setattr(controls, "measured_factor", factor)
    return calls


def planned(folder: Path, text: str = SPEC) -> dict[str, PlannedRun]:
    (folder / "spec.toml").write_text(text)
    return {run.name: run for run in with_controls(read_spec(folder / "spec.toml"), folder)}


def test_each_run_has_its_controls_once(tmp_path, measured):
    runs = planned(tmp_path)
    added = {name: run for name, run in runs.items() if name.partition("-")[0] not in ("mfef", "dml")}
    # Both methods have the same networks: alone, its average, so many more epochs; mfef deploys components.
    by_kind = {kind: [run for name, run in added.items() if name.startswith(kind)] for kind in CONTROLS}
    assert {kind: len(each) for kind, each in by_kind.items()} == dict.fromkeys(CONTROLS, 2)
    for run in added.values():
        assert run.config is not None and run.config.networks == ("resnet20",) and not run.problem
    assert [run.config.train.ema_decay for run in by_kind["ema"]] == [0.999] * 2
    longer = by_kind["equal-compute"][0].config.train
    assert (longer.epochs, longer.milestones) == (25, (10, 15))
    assert measured == [("mfef", "resnet20"), ("dml", "resnet20")]


def test_parameters_are_those_of_the_deployed_student(tmp_path, measured):
    runs = planned(tmp_path)
    sizes = {}
    for kind in ("mfef", "parameter-matched", "alone"):
        run = next(run for name, run in runs.items() if name.startswith(kind))
        method = build_method(run.config, 10, (8, 8))
        sizes[kind] = parameter_count(method.deployed_student(0))
    assert sizes["mfef"] == sizes["parameter-matched"] > sizes["alone"]


def test_unlike_networks_have_controls_each_and_what_is_there_is_not_added(tmp_path, measured):
    text = 'data = "digits"\n[[runs]]\nmethod = "dml"\nnetworks = ["resnet20", "wrn-16-1"]\n'
    text += '[[runs]]\nmethod = "independent"\nnetworks = ["resnet20"]\n'
    runs = planned(tmp_path, text)
    alone = [run.config.networks for name, run in runs.items() if name.startswith("alone")]
    assert alone == [("wrn-16-1",)]
    assert len([name for name in runs if name.startswith("ema")]) == 2


def test_a_control_begins_with_the_weights_of_its_network(tmp_path, measured):
    text = 'data = "digits"\nmethod = "dml"\nnetworks = ["resnet20", "wrn-16-1"]\n'
    text += 'weights = ["student0=a.pth", "student1=b.pth"]\n'
    runs = planned(tmp_path, text).values()
    alone = {run.config.networks[0]: run.config.weights for run in runs if run.name.startswith("alone")}
    assert alone == {"resnet20": ("student0=a.pth",), "wrn-16-1": ("student0=b.pth",)}


def test_what_was_measured_is_kept(tmp_path, measured):
    before = planned(tmp_path)
    measured.clear()
    assert planned(tmp_path).keys() == before.keys() and measured == []
    assert set(json.loads((tmp_path / "controls.json").read_text()).values()) == {2.5}
    (tmp_path / "controls.json").write_text("[1")
    with pytest.raises(UsageError, match=r"controls.json cannot be read .*: remove it"):
        planned(tmp_path)


def test_a_run_that_cannot_be_built_has_none_and_costs_no_other(tmp_path, monkeypatch):
    def factor(config, network: str) -> float:
        if config.networks[1] == "resnet21":
            raise UsageError("unknown network 'resnet21'")
        return 2.5

    monkeypatch.setattr(controls, "measured_factor", factor)
    text = 'data = "digits"\nmethod = "dml"\n[[runs]]\nnetworks = ["resnet20", "resnet20"]\n'
    runs = planned(tmp_path, text + '[[runs]]\nnetworks = ["wrn-16-1", "resnet21"]\n')
    added = [run for name, run in runs.items() if name.startswith("alone")]
    assert {run.config.networks for run in added} == {("resnet20",)} and len(runs) == 5


def test_a_factor_is_measured(tmp_path, tiny_registered, monkeypatch):
    colours = tiny.write_npz(tmp_path / "colours.npz", tiny.data())
    torch.save(cd.network("tiny", 3).state_dict(), tmp_path / "begun.pt")  # those of one student of two
    text = f'data = "packed"\ndata_dir = "{colours}"\nnetworks = ["tiny", "tiny"]\nbatch_size = 8\n'
    text += f'weights = ["student1={tmp_path}/begun.pt"]\nmethod = "dml"\n'
    (tmp_path / "spec.toml").write_text(text)
    (run,) = read_spec(tmp_path / "spec.toml")
    turns: list[int] = []

    @contextlib.contextmanager
    def timed(plan, splits):
        def seconds(threads: int) -> float:
            turns.append(len(plan.method.cohort))
            return 3.0 * len(plan.method.cohort) - 1

        yield seconds

    monkeypatch.setattr(controls, "timed_steps", timed)
    assert measured_factor(run.config, "tiny") == 5 / 2
    assert turns == [2, 1] * (len(turns) // 2)  # in turn, so that a busy minute strikes both


def test_they_are_listed(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert "controls" in said and all(kind in said for kind in CONTROLS)
    assert main(["list", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["controls"]] == list(CONTROLS)


@pytest.mark.slow
def test_a_sweep_trains_them(tmp_path, measured, monkeypatch):
    text = 'data = "digits"\nmethod = "dml"\nnetworks = ["resnet8", "resnet8"]\nepochs = 1\ntrain_limit = 32\n'
    (tmp_path / "spec.toml").write_text(text + "batch_size = 16\nthreads = 1\nmilestones = []\n")
    assert (
        main(["sweep", str(tmp_path / "spec.toml"), "--out", str(tmp_path / "out"), "--slots", "1", "--controls"]) == 0
    )
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())["runs"]}
    assert len(rows) == 4 and all(row["status"] == "finished" for row in rows.values())
    assert "student0-ema" in next(row for name, row in rows.items() if name.startswith("ema"))["top1_error"]
    assert cd.Run(tmp_path / "out" / next(name for name in rows if name.startswith("equal"))).config.train.epochs == 2
