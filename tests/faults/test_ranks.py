"""A run on several processes of which one is lost: all end, and all start again, with the same bits in the end."""

import multiprocessing
import os
import re
import signal
import sys
import time

import pytest

import codistill as cd
from codistill.cli import main
from codistill.training.verify import same_bits, scores, tensors

from .. import tiny
from ..training import rank_program


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with few images, in which processes begin as `rank_program`."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.write_npz(folder / "few.npz", tiny.data(24, 9))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, tiny.registered():
        patch.setitem(sys.modules, "__main__", rank_program)
        patch.chdir(folder)
        yield folder
    signal.signal(signal.SIGTERM, handler)


def train(out, *more):
    given = ["--networks", "tiny", "tiny", "--data", "packed", "--data-dir", "few.npz", "--padding", "1", "-b", "8"]
    return main(["train", "mfef", *given, "--epochs", "3", "--processes", "2", "--threads", "1", "--out", out, *more])


@pytest.fixture(scope="module")
def undisturbed(work):
    assert train("undisturbed") == 0
    return cd.Run("undisturbed")


def equal(first, second):
    one, other = (dict(tensors(run.checkpoints.load())) for run in (first, second))
    return one.keys() == other.keys() and all(map(same_bits, one.values(), other.values())) and scores(first)


def no_rank_is_left():
    return not multiprocessing.active_children()


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("rank", "act", "words"),
    [
        (1, "kill", "rank 1 of 2 was killed by SIGKILL"),
        (0, "raise", "rank 0 of 2 failed: ValueError: the rank has had"),
    ],
)
def test_a_lost_rank_ends_all_with_status_7_and_the_run_can_go_on(undisturbed, work, capsys, rank, act, words):
    (work / "fault").write_text(f"{rank} 5 {act}")
    started = time.monotonic()
    assert train(act, "--max-restarts", "0") == 7
    assert time.monotonic() - started < 60
    assert no_rank_is_left()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and f"codistill resume {act}" in error
    assert main(["resume", act]) == 0
    assert scores(cd.Run(act)) == scores(undisturbed)
    assert equal(cd.Run(act), undisturbed)


@pytest.mark.fault(38)
def test_all_start_again_and_end_as_undisturbed(undisturbed, work, capsys):
    (work / "fault").write_text("0 5 kill")
    assert train("again") == 0
    assert re.fullmatch(r"codistill: warning: rank 0 .* SIGKILL: .* start again, 1 of 3\n", capsys.readouterr().err)
    assert equal(cd.Run("again"), undisturbed)


@pytest.mark.fault(38)
def test_what_a_restart_would_meet_again_is_not_tried_again(work, capsys):
    (work / "fault").write_text("1 5 diverge")
    assert train("diverged") == 5
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "NaN or infinite at step 2 of epoch 2" in error
    assert cd.Run("diverged").summary["status"] == "diverged"
    assert train("diverged") == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.fault(34)
def test_a_signal_to_the_launcher_stops_all_after_the_same_step(undisturbed, work, capsys):
    (work / "fault").write_text(f"1 5 {os.getpid()}")
    assert train("stopped") == 143
    assert no_rank_is_left()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"terminated after step \d of epoch \d and saved: codistill resume stopped", error)
    assert cd.Run("stopped").checkpoints.entries()[-1]["step"] > 0
    assert main(["resume", "stopped"]) == 0
    assert equal(cd.Run("stopped"), undisturbed)
