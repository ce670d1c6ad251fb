"""An interrupted run goes on from its last completed epoch and ends with the same bits."""

import hashlib
import json

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.errors import CheckpointError
from codistill.step import PlainStep
from codistill.train import resume

DATA = ["--data", "digits", "--train-limit", "96", "-b", "32"]
ARGUMENTS = ["--networks", "tiny", "tiny", *DATA, "--epochs", "3", "--threads", "1"]
TIMES = ("seconds", "images_per_second")


def end_state(path):
    """Digest of every tensor of the last checkpoint, and the metrics without times."""
    state = cd.Run(path).checkpoints.load("last")
    digest = hashlib.sha256()
    for name, tensor in sorted(state["method"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for tensor in state["momentum"]:
        digest.update(tensor.contiguous().numpy().tobytes())
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return digest.hexdigest(), [{key: row[key] for key in row if key not in TIMES} for row in rows]


def train(method, out):
    return main(["train", method, *ARGUMENTS, "--out", str(out)])


def interrupt(monkeypatch, at: int):
    """Let the training stop at a step, as Ctrl-C does."""
    call, count = PlainStep.__call__, iter(range(1000))

    def stopping(self, *arguments):
        if next(count) == at:
            raise KeyboardInterrupt
        call(self, *arguments)

    monkeypatch.setattr(PlainStep, "__call__", stopping)
    return call


@pytest.mark.parametrize(("method", "at"), [("mfef", 3), ("mfef", 4), ("mfef", 8), ("kdcl", 4), ("pcl", 7)])
def test_same_bits_as_without_the_break(tiny_registered, tmp_path, monkeypatch, capsys, method, at):
    assert train(method, tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        interrupt(patched, at)
        assert train(method, tmp_path / "broken") == 130
    assert json.loads((tmp_path / "broken" / "summary.json").read_text())["status"] == "interrupted"
    assert main(["resume", str(tmp_path / "broken")]) == 0
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")
    whole, broken = (cd.Run(tmp_path / name).summary for name in ("whole", "broken"))
    for key in ("status", "top1_error", "best_epoch_top1_error", "best_epoch"):
        assert broken[key] == whole[key]


def test_before_the_first_checkpoint_there_is_nothing_to_resume(tiny_registered, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupt(patched, 1)
        assert train("mfef", tmp_path / "run") == 130
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run")]) == 4
    assert "no last checkpoint" in capsys.readouterr().err


def test_a_crash_may_cut_metrics_short_or_leave_more_than_the_checkpoint(tiny_registered, tmp_path, monkeypatch):
    assert train("mfef", tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        interrupt(patched, 7)
        assert train("mfef", tmp_path / "broken") == 130
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "trai')
    assert main(["resume", str(tmp_path / "broken")]) == 0
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tiny_registered, tmp_path, monkeypatch, capsys):
    assert train("mfef", tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        interrupt(patched, 7)
        assert train("mfef", tmp_path / "broken") == 130
    last = tmp_path / "broken" / "checkpoints" / "epoch-000002.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "broken")]) == 0
    assert capsys.readouterr().err.count("warning") == 1
    assert end_state(tmp_path / "broken") == end_state(tmp_path / "whole")


def test_refusals(tiny_registered, tmp_path, capsys):
    assert train("mfef", tmp_path / "run") == 0
    before = (tmp_path / "run" / "summary.json").read_bytes()
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "run")]) == 2
    assert "is finished" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    assert main(["resume", str(tmp_path / "nothing")]) == 4


def test_missing_metrics_are_damage(tiny_registered, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, 7)
        assert train("mfef", tmp_path / "run") == 130
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        resume(tmp_path / "run", show=False)
    assert torch.get_num_threads() == 1
