"""A run on two ranks of which one is lost: all end, it can be resumed, and torchrun's restart resumes it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import codistill as cd
from codistill.cli import main
from codistill.training.verify import same_bits, scores, tensors

from .. import tiny
from ..training.rank_program import forked, free_port, program

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with few images, in which all runs of this module lie."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.write_npz(folder / "few.npz", tiny.data(24, 9))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    signal.signal(signal.SIGTERM, handler)


def line(out=None):
    given = ["--networks", "tiny", "tiny", "--data", "packed", "--data-dir", "few.npz", "--padding", "1", "-b", "8"]
    return ["train", "mfef", *given, "--epochs", "3", "--threads", "1", *(["--out", out] if out else [])]


def train(out, fault=None, **more):
    if fault:
        Path("fault").write_text(fault)
    return forked(lambda: program(line(out)), **more)


def resume(out):
    return forked(lambda: program(["resume", out]))


@pytest.fixture(scope="module")
def undisturbed(work):
    assert train("undisturbed") == [0, 0]
    return cd.Run("undisturbed")


def equal(first, second):
    one, other = (dict(tensors(run.checkpoints.load())) for run in (first, second))
    same = one.keys() == other.keys() and all(map(same_bits, one.values(), other.values()))
    return same and scores(first) == scores(second)


def torchrun(*arguments, rest, **more):
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "tests.training.rank_program", *rest]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **more)


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("rank", "act", "statuses"),
    [
        (1, "SIGKILL", [7, -9]),
        pytest.param(0, "raise", [1, 7], marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_ends_all_with_status_7_and_the_run_can_be_resumed(
    undisturbed, capfd, tmp_path, rank, act, statuses
):
    out, started = f"{act}{rank}", time.monotonic()
    assert train(out, f"{rank} 5 {act}") == statuses
    assert time.monotonic() - started < 60
    errors = [each for each in capfd.readouterr().err.splitlines() if "error: rank" in each]
    assert len(errors) == 1 and f"rank {1 - rank} of 2 lost contact" in errors[0] and "codistill resume" in errors[0]
    assert resume(out) == [0, 0]
    assert equal(cd.Run(out), undisturbed)


@pytest.mark.fault(38)
@pytest.mark.parametrize(("act", "statuses"), [("data", [3, 3]), ("SIGKILL", [7, -9])])
def test_a_rank_that_fails_before_the_first_step_does_not_hold_the_others(work, capfd, act, statuses):
    assert train("early", f"1 0 {act}") == statuses
    error = capfd.readouterr().err
    if act == "data":
        assert error == "codistill: error: rank 1: there are no data on this machine\n"
    assert not Path("early").exists()


@pytest.mark.fault(38)
def test_divergence_ends_all_ranks_with_one_line(work, capfd):
    assert train("diverged", "1 5 diverge", launch="job") == [5, 5]
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "NaN or infinite at step 2 of epoch 2" in error
    assert cd.Run("diverged").summary["status"] == "diverged"
    # torchrun restarts after every failure; this one would come again.
    assert train("diverged", launch="job") == [5, 5]
    assert "not restarted" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.fault(38)
def test_torchrun_restarts_the_ranks_which_resume_the_run(undisturbed, work):
    """Under torchrun itself, without a folder named: the first rank chooses one, and finds it again."""
    (work / "fault").write_text("1 5 SIGKILL")
    output, error = torchrun("--nproc-per-node", "2", "--max-restarts", "2", rest=line()).communicate(timeout=120)
    assert "error: rank 0 of 2 lost contact" in error and not Path("fault").exists()
    [out] = Path("runs").iterdir()
    assert f"run folder: {out}" in output
    assert equal(cd.Run(out), undisturbed)


@pytest.mark.fault(38)
def test_only_the_same_launch_and_settings_resume(undisturbed, capfd):
    assert train("job", "0 5 SIGKILL", launch="job") == [-9, 7]
    capfd.readouterr()
    assert train("job", launch="another job") == [2, 2]
    assert forked(lambda: program([*line("job"), "--seed", "1"]), launch="job") == [2, 2]
    assert capfd.readouterr().err.count("job is not empty") == 2
    assert train("job", launch="job") == [0, 0]
    assert equal(cd.Run("job"), undisturbed)
    assert train("job", launch="job") == [0, 0]
    assert "job is finished" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.fault(38)
def test_two_launchers_train_one_run(undisturbed):
    """As on two machines: a launcher on each, and one rank of each launcher."""
    port = str(free_port())
    given = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    started = [torchrun(*given, "--node-rank", str(node), rest=line("nodes")) for node in range(2)]
    outputs = [each.communicate(timeout=120) for each in started]
    assert [each.returncode for each in started] == [0, 0], outputs
    assert "run folder: nodes" in outputs[0][0] and not outputs[1][0]
    assert equal(cd.Run("nodes"), undisturbed)


@pytest.mark.fault(34)
@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(undisturbed, capfd, number, status):
    assert train(number, f"1 5 {number}") == [status, status]
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert re.search(rf"after step 2 of epoch 2 and saved: codistill resume {number}", error)
    assert cd.Run(number).checkpoints.entries()[-1]["step"] == 2
    assert main(["resume", number]) == 2
    assert "began on 2 ranks" in capfd.readouterr().err
    assert resume(number) == [0, 0]
    assert equal(cd.Run(number), undisturbed)


@pytest.mark.slow
@pytest.mark.fault(34)
def test_a_signal_to_torchrun_stops_all_ranks(undisturbed):
    """The line says where; a rank passes the signal on to the launcher."""
    Path("fault").write_text("1 5 launcher")
    launched = torchrun("--nproc-per-node", "2", rest=line("launcher"))
    error = launched.communicate(timeout=120)[1]
    assert launched.returncode != 0
    assert re.search(r"error: terminated after step \d of epoch \d and saved: codistill resume launcher\n", error)
    assert resume("launcher") == [0, 0]
    assert equal(cd.Run("launcher"), undisturbed)
