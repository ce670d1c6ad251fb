"""`codistill train takd`: a chain of runs, each taught by the one before it."""

import signal

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.training import trainer

from .. import tiny
from ..faults.running import at_step, end_state

pytestmark = pytest.mark.usefixtures("tiny_registered", "no_pages")
LINKS = ["0-tiny", "1-tiny", "2-drawing"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(trainer, "keep_pictures", lambda *arguments: None)


@pytest.fixture
def train(tmp_path):
    colours = tiny.write_npz(tmp_path / "colours.npz", tiny.data(train=20, test=21))

    def run(out: str, *more: str, networks=("tiny", "tiny", "drawing")) -> int:
        flags = ["--data", "packed", "--data-dir", str(colours), "--epochs", "1", "-b", "8", "--lr", "0.05", *more]
        return main(["train", "takd", "--networks", *networks, *flags, "--threads", "1", "--out", str(tmp_path / out)])

    return run


def test_each_link_is_a_run_that_the_one_before_it_teaches(train, tmp_path, capsys):
    assert train("chain") == 0
    assert sorted(each.name for each in (tmp_path / "chain").iterdir()) == LINKS
    runs = [cd.Run(tmp_path / "chain" / name) for name in LINKS]
    assert [run.config.method_name for run in runs] == ["independent", "takd", "takd"]
    assert [run.config.networks for run in runs] == [("tiny",), ("tiny",), ("drawing",)]
    assert [run.config.teaching.teacher for run in runs] == [None, *(str(run.path) for run in runs[:2])]
    assert runs[2].summary["teacher_top1_error"] == pytest.approx(runs[1].summary["top1_error"]["student0"])
    said = capsys.readouterr().out
    for run in runs:
        assert f"{run.summary['top1_error']['student0']:.2f}" in said.rpartition("chain")[2] + said[-600:]


def test_the_same_command_goes_on(train, tmp_path, capsys):
    assert train("whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda _: signal.raise_signal(signal.SIGTERM))  # in the second link
        assert train("broken") == 143
    assert not (tmp_path / "broken" / LINKS[2]).exists()
    capsys.readouterr()
    assert train("broken") == 0
    assert f"{LINKS[0]} is finished" in "".join(capsys.readouterr())
    for name in LINKS[:2]:
        assert end_state(tmp_path / "broken" / name) == end_state(tmp_path / "whole" / name)
    assert cd.Run(tmp_path / "broken" / LINKS[2]).finished


def test_a_chain_for_each_seed(train, tmp_path):
    assert train("seeds", "--seeds", "0", "1", networks=("tiny", "tiny")) == 0
    for seed in (0, 1):
        assert cd.Run(tmp_path / "seeds" / f"seed{seed}" / "1-tiny").config.train.seed == seed


def test_a_network_that_cannot_be_is_found_before_the_first_link(train, tmp_path, capsys):
    assert train("chain", networks=("tiny", "resnet21")) == 2
    assert "unknown network 'resnet21'" in capsys.readouterr().err
    assert not (tmp_path / "chain").exists()


def test_weights_are_those_of_a_link_and_a_run_to_start_from_is_that_of_none(train, tmp_path, capsys):
    assert train("first", networks=("tiny", "tiny")) == 0
    file = tmp_path / "weights.pth"
    torch.save(cd.Run(tmp_path / "first/1-tiny").load_method().cohort[0].state_dict(), file)
    assert train("chain", "--weights", f"student1={file}", networks=("tiny", "tiny")) == 0
    runs = [cd.Run(tmp_path / "chain" / name) for name in LINKS[:2]]
    assert [run.config.weights for run in runs] == [(), (f"student0={file}",)]
    capsys.readouterr()
    for flags, words in (
        (("--weights", f"student2={file}"), "student2"),
        (("--init", str(tmp_path / "first/1-tiny")), "but a chain has 2 runs: leave it out"),
        (("--weights", f"student1={tmp_path / 'none.pth'}"), "none.pth"),
    ):
        assert train("other", *flags, networks=("tiny", "tiny")) in (2, 4)
        assert words in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_other_settings_are_refused(train, capsys):
    assert train("chain", networks=("tiny", "tiny")) == 0
    capsys.readouterr()
    assert train("chain", "--seed", "1", networks=("tiny", "tiny")) == 2
    assert "0-tiny holds a run with other settings: seed 0 -> 1: choose another --out" in capsys.readouterr().err


def test_what_is_refused_leaves_no_folder(train, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["train", "takd", "--networks", "tiny", "tiny", "--data", "packed", "--data-dir", "colours.npz"]
    assert main([*line, "--padding", "100"]) == 2
    assert main([*line, "--verify-resume"]) == 2
    assert "--verify-resume is of one run, and a chain has several" in capsys.readouterr().err
    # Of several ranks each would make a folder of its own.
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(line) == 2
    assert "a chain on several ranks needs a folder that all of them know" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["colours.npz"]


def test_a_run_folder_is_no_chain(train, tmp_path, capsys):
    assert train("run", networks=("tiny", "tiny")) == 0
    capsys.readouterr()
    assert train("run/0-tiny", networks=("tiny", "tiny")) == 2
    assert "is a run folder: choose another --out for the chain" in capsys.readouterr().err
