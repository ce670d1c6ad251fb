"""Every engine of sweeps: the same runs, kills, restarts and bad input on this machine, a real SLURM and a real Ray."""

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import codistill
from codistill.cli import main
from codistill.sweeps.driver import sweep
from codistill.sweeps.engines import slurm
from codistill.sweeps.engines.local import Local
from codistill.sweeps.engines.ray import Ray
from codistill.sweeps.engines.slurm import Slurm

from ..faults.asserting import refused
from . import cluster
from .bench import SEEDS, SHARED, Bench, on_waiting, signalled

DRIVER = (
    "import sys; from codistill.sweeps.driver import sweep; sweep({spec!r}, {out!r}, program={program!r}, **{more!r})"
)
SOURCE = str(Path(codistill.__file__).parents[1])  # in jobs and drivers, too


@pytest.fixture(scope="session")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if lacks := cluster.missing() or ("" if importlib.util.find_spec("submitit") else "submitit is not installed"):
        pytest.skip(lacks)
    with cluster.slurm(tmp_path_factory.mktemp("slurm") / "node") as configuration:
        yield configuration


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray on this machine, of which this process is a driver; its address, for other drivers."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SOURCE)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        before = signal.getsignal(signal.SIGTERM)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, before)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


class EngineBench(Bench):
    """A bench whose sweeps run on an engine, with its table in the specs of drivers that are processes of their own."""

    executor = "local"
    setup = ""

    def sweep(self, text: str = SEEDS, **settings: object):
        return super().sweep(text, **{"executor": self.executor, **settings})

    def driver(self, text: str = SEEDS, **more: object) -> subprocess.Popen[bytes]:
        """Start a sweep in a process of its own."""
        (self.folder / "spec.toml").write_text(text + self.setup)
        more = {"executor": self.executor, "slots": 3, **more}
        code = DRIVER.format(spec=str(self.folder / "spec.toml"), out=str(self.out), program=self.program, more=more)
        with (self.folder / "driver.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, cwd=self.folder)


EACH = ["local", "slurm", "ray"]
# A driver in a process of its own loads torch first.
LONG = ["local", *(pytest.param(name, marks=pytest.mark.slow) for name in ("slurm", "ray"))]
quick, long = (pytest.mark.parametrize("bench", engines, indirect=True) for engines in (EACH, LONG))


@pytest.fixture
def bench(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("codistill.sweeps.driver.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("codistill.sweeps.engines.local.measured_slots", lambda runs: 2)
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    made = EngineBench(tmp_path)
    made.executor = request.param
    monkeypatch.setattr(Local, "seconds", 0.02)
    if request.param == "slurm":
        monkeypatch.setenv("SLURM_CONF", str(request.getfixturevalue("slurm_conf")))
        monkeypatch.setattr(Slurm, "seconds", 0.3)
        monkeypatch.setattr(slurm, "RESULT_SECONDS", 1.0)
    if request.param == "ray":
        made.setup = f'[ray]\naddress = "{request.getfixturevalue("ray_cluster")}"\n'
        monkeypatch.setattr(Ray, "seconds", 0.1)
    monkeypatch.setattr("codistill.cli.commands.own_program", lambda arguments: made.program)
    return made


def until(condition, seconds: float = 30.0) -> None:
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late, "it took too long"
        time.sleep(0.02)


@pytest.mark.fault(39)
@quick
def test_one_killed_one_diverges_one_invalid(bench, capsys):
    text = f"{SHARED}[grid]\nseed = [0, 1, 2, 3]\n[[runs]]\nmomentum = 0.9\n[[runs]]\nmomentum = 1.5\n"
    bench.act(**{"momentum-0.9-seed0": ["kill 9"], "momentum-0.9-seed1": ["exit 5 student0 diverged"]})
    Path("spec.toml").write_text(text)
    line = ["sweep", "spec.toml", "--out", "sweep", "--executor", bench.executor]
    refused(capsys, line, 7, "5 of 8 runs failed")
    rows = {row["name"]: row for row in bench.table()["runs"]}
    ends = {name: row["status"] for name, row in rows.items()}
    assert [ends[f"momentum-0.9-seed{seed}"] for seed in range(4)] == ["finished", "FAILED", "finished", "finished"]
    assert rows["momentum-0.9-seed1"]["reason"] == "student0 diverged"
    assert all("momentum is 1.5" in rows[f"momentum-1.5-seed{seed}"]["reason"] for seed in range(4))
    assert sorted(bench.calls()) == [
        "resume momentum-0.9-seed0",
        *(f"train momentum-0.9-seed{seed}" for seed in range(4)),
    ]
    (group, _) = bench.table()["groups"]
    assert group["failed"] == 1 and group["mean"] == {}


@pytest.mark.fault(38)
@quick
def test_a_run_that_is_killed_again_and_again_has_failed(bench):
    bench.act(seed0=["kill 9", "exit 7 rank 1 was lost", "kill 9"], seed1=["exit 3 no data"])
    rows = bench.sweep()
    assert [row.status for row in rows.values()] == ["FAILED", "FAILED", "finished"]
    assert rows["seed0"].reason == "killed by SIGKILL, the last of 3 attempts" and rows["seed1"].reason == "no data"
    assert bench.calls().count("resume seed0") == 2 and bench.calls().count("train seed1") == 1


@pytest.mark.fault(40)
@long
def test_a_driver_that_is_killed_is_started_again(bench, monkeypatch):
    bench.act(seed1=["wait"])
    driver = bench.driver()
    until(lambda: (bench.out / "seed1" / "waiting").exists() and ended(bench, "seed0") and ended(bench, "seed2"))
    driver.kill()
    driver.wait()
    for path in bench.out.rglob("*"):
        os.utime(path, (0, 0))  # no decision depends on clocks
    went = []
    waits = on_waiting(monkeypatch, lambda: went.append((bench.folder / "go").touch()))
    (bench.folder / "spec.toml").write_text(SEEDS)
    rows = sweep(bench.folder / "spec.toml", bench.out, program=bench.program, executor=bench.executor)
    assert [row.status for row in rows] == ["finished"] * 3
    # The job lived on, and the sweep waited for it; or it died with the driver, saved, and was resumed.
    again = bench.calls()[3:]
    assert (len(waits) == 1 and again == []) or again == ["resume seed1"]


def ended(bench, name: str) -> bool:
    try:
        return json.loads((bench.out / name / "summary.json").read_text())["status"] == "finished"
    except (OSError, ValueError):
        return False


@long
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_the_runs_save_and_go_on(bench, capsys, number, status):
    Path("spec.toml").write_text(SEEDS)
    bench.act(seed1=["wait"])
    line = ["sweep", "spec.toml", "--out", "sweep", "--executor", bench.executor, "--slots", "1"]
    with signalled(bench, number):
        refused(capsys, line, status, "the same command resumes")
    assert json.loads((bench.out / "seed1" / "summary.json").read_text())["status"] == "interrupted"
    bench.act()
    assert all(row.status == "finished" for row in bench.sweep().values())
    assert sorted(bench.calls()) == ["resume seed1", "train seed2"]


@long
def test_two_sweeps_share_the_runs_of_a_folder(bench):
    text = f"{SHARED}[grid]\nseed = [0, 1, 2, 3]\nlearning_rate = [0.1, 0.2]\n"
    bench.act(**{f"learning-rate-0.1-seed{seed}": ["wait"] for seed in range(2)})
    driver = bench.driver(text, slots=2)
    until(lambda: sum(1 for _ in bench.out.glob("*/waiting")) == 2)
    calls = bench.folder / "calls.txt"
    before = calls.read_text()

    def release():
        until(lambda: not calls.exists())  # the second sweep has begun
        (bench.folder / "go").touch()

    threading.Thread(target=release).start()
    rows = bench.sweep(text, slots=2)
    assert driver.wait(60) == 0, (bench.folder / "driver.log").read_text()
    assert [row.status for row in rows.values()] == ["finished"] * 8
    others = [line for line in before.splitlines()]
    started = [line.split()[1] for line in [*others, *calls.read_text().splitlines()]]
    assert sorted(started) == sorted(rows)


@long
def test_two_sweeps_with_other_specs_are_refused(bench, capsys):
    bench.act(seed0=["wait"])
    driver = bench.driver(SEEDS)
    try:
        until((bench.out / "seed0" / "waiting").exists)
        Path("other.toml").write_text(SEEDS.replace("[0, 1, 2]", "[0, 1, 2, 3]"))
        line = ["sweep", "other.toml", "--out", "sweep", "--executor", bench.executor]
        refused(capsys, line, 2, f"pid {driver.pid} on host", "with another spec", "(seed3)")
        (bench.folder / "go").touch()
        assert driver.wait(60) == 0
        assert main(line) == 0  # nobody else is at work any more
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.fault(40)
@pytest.mark.slow
@pytest.mark.timeout(1500)
@quick
def test_random_kills_change_nothing(bench):
    """100 kills of local processes, 50 each of SLURM's and Ray's jobs, and of drivers among them."""
    dice, names, killed = random.Random(0), [f"seed{seed}" for seed in range(3)], []
    bench.act(**{name: ["steps"] * 1000 for name in names})

    def kill() -> None:
        while len(killed) < (100 if bench.executor == "local" else 50):
            time.sleep(dice.random() * 0.5)
            folder = bench.out / dice.choice(names)
            if (pid := process_of(bench, folder)) and dice.random() < 0.8:
                os.kill(pid, signal.SIGKILL)
                killed.append(folder.name)
            elif pid and bench.executor == "slurm":
                claim = json.loads((bench.out / "logs" / f"{folder.name}.claim").read_text() or "{}")
                if job := claim.get("job"):
                    subprocess.run(["scancel", "--signal=KILL", job.removeprefix("SLURM job ")], check=False)
                    killed.append("job")
            elif pid and bench.executor == "ray":
                os.kill(parent_of(pid), signal.SIGKILL)
                killed.append("worker")
        (bench.folder / "go").touch()

    thread = threading.Thread(target=kill)
    thread.start()
    for round in itertools.count():
        if round % 8 == 4 and thread.is_alive():
            driver = bench.driver()
            until(lambda: process_of(bench, bench.out / "seed0") or not thread.is_alive())
            time.sleep(dice.random())
            driver.kill()
            driver.wait()
            killed.append("driver")
        if all(row.status == "finished" for row in bench.sweep().values()):
            break
    thread.join()
    digest = ""
    for step in range(100):
        digest = hashlib.sha256(f"{digest}{step}".encode()).hexdigest()
    assert [(bench.out / name / "state.txt").read_text() for name in names] == [f"100 {digest}"] * 3
    assert len(killed) >= (100 if bench.executor == "local" else 50)


def process_of(bench, folder: Path) -> int:
    """Return the process that works on a run; 0: none. One of another program may have the number of a dead one."""
    try:
        pid = int((folder / "waiting").read_text())
        return (
            pid
            if str(bench.folder) in Path(f"/proc/{pid}/cmdline").read_text() and not ended(bench, folder.name)
            else 0
        )
    except (OSError, ValueError):
        return 0


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@quick
def test_real_runs_of_digits(bench, monkeypatch):
    text = 'data = "digits"\nnetworks = ["resnet20"]\nmethod = "independent"\ntrain_limit = 32\nbatch_size = 16\n'
    (bench.folder / "spec.toml").write_text(f"{text}epochs = 1\nthreads = 1\n[grid]\nseed = [0, 1]\n")
    rows = sweep(bench.folder / "spec.toml", bench.out, executor=bench.executor, slots=2)
    assert [row.status for row in rows] == ["finished"] * 2, (bench.out / "table.md").read_text()
    assert (bench.out / "seed0" / "report.html").exists()


def refused_settings(bench, capsys, table: str, *fragments: str) -> None:
    """Assert that a table of the engine in the spec is refused by a line, and nothing is written."""
    Path("spec.toml").write_text(f"{SEEDS}[{bench.executor}]\n{table}\n")
    line = ["sweep", "spec.toml", "--out", "new", "--executor", bench.executor]
    refused(capsys, line, 2, *fragments, unchanged=bench.folder)


# What only SLURM has.

on_slurm = pytest.mark.parametrize("bench", ["slurm"], indirect=True)


def command(*arguments: str) -> str:
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


@on_slurm
def test_settings_reach_slurm_and_a_wrong_one_starts_nothing(bench, capsys, monkeypatch):
    line = ["sweep", "spec.toml", "--out", "new", "--executor", "slurm"]
    wrong = functools.partial(refused_settings, bench, capsys)
    wrong('partition = "night"', "Invalid partition name specified", "[slurm] in the spec")
    wrong('gres = "gpu:1"', "Invalid generic resource (gres) specification")
    wrong("partitoin = 3", "spec.toml:7: unknown key 'partitoin' in [slurm]: did you mean partition?")
    wrong("time = 1.5", "spec.toml:7: time in [slurm] is 1.5; it must be a whole number above 0")
    wrong("setup = 'module load x'", "spec.toml:7: setup in [slurm] is", "it must be a list of lines")
    Path("spec.toml").write_text(f"{SEEDS}[local]\nslots = 3\n")
    refused(capsys, line, 2, "spec.toml:7: unknown key 'slots' in [local]: local has no settings")
    Path("spec.toml").write_text(f"slurm = 3\n{SEEDS}")
    refused(capsys, line, 2, "spec.toml:1: slurm must be a table of settings: [slurm]")
    Path("spec.toml").write_text(SEEDS)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        refused(capsys, line, 2, "there is no sbatch here", unchanged=bench.folder)
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        refused(capsys, line, 2, "submitit is not installed here: ", "pip install", unchanged=bench.folder)
    table = '[slurm]\npartition = "test"\ntime = 3\ncpus_per_task = 2\nmem = "1M"\n'
    table += 'setup = ["export CUDA_VISIBLE_DEVICES=7"]\n'
    assert [row.status for row in bench.sweep(SEEDS + table).values()] == ["finished"] * 3
    assert {line[2] for line in bench.words()} == {"gpu=7"}
    script = next((bench.out / "slurm").glob("*/*submission.sh")).read_text()
    assert all(
        each in script
        for each in ("--array=0-2", "--time=3", "--cpus-per-task=2", "--mem=1M", "--partition=test", "--requeue")
    )


@pytest.mark.slow
@on_slurm
def test_a_controller_that_cannot_be_reached_is_a_line(bench, capsys, monkeypatch, slurm_conf):
    text = slurm_conf.read_text()
    (bench.folder / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", f"SlurmctldPort={cluster.free_port()}", text))
    monkeypatch.setenv("SLURM_CONF", str(bench.folder / "slurm.conf"))
    Path("spec.toml").write_text(SEEDS)
    line = ["sweep", "spec.toml", "--out", "new", "--executor", "slurm"]
    refused(capsys, line, 2, "Unable to contact slurm controller", unchanged=bench.folder)


@pytest.mark.slow
@on_slurm
def test_a_job_at_its_time_limit_is_queued_again_and_one_cancelled_is_tried_again(bench):
    bench.act(seed0=["wait"], seed1=["wait"])
    names = {}

    def disturb() -> None:
        until(lambda: all((bench.out / f"seed{seed}" / "waiting").exists() for seed in (0, 1)))
        for seed in (0, 1):
            claim = json.loads((bench.out / "logs" / f"seed{seed}.claim").read_text())
            names[seed] = claim["job"].removeprefix("SLURM job ")
        command("scancel", "--signal=USR2", names[0])
        command("scancel", names[1])

    thread = threading.Thread(target=disturb)
    thread.start()
    rows = bench.sweep()
    thread.join()
    assert [row.status for row in rows.values()] == ["finished"] * 3
    assert sorted(bench.calls()) == ["resume seed0", "resume seed1", *(f"train seed{seed}" for seed in range(3))]
    until(lambda: command("squeue", "--noheader") == "")


# What only Ray has.

on_ray = pytest.mark.parametrize("bench", ["ray"], indirect=True)


@pytest.mark.slow
@on_ray
def test_a_worker_that_dies_and_a_task_that_is_cancelled_are_tried_again(bench, monkeypatch):
    import ray

    bench.act(seed0=["wait"], seed1=["wait"])
    jobs, start = [], Ray.start
    monkeypatch.setattr(Ray, "start", lambda *given: jobs.extend(start(*given)) or jobs[-len(given[1]) :])

    def disturb() -> None:
        until(lambda: all((bench.out / f"seed{seed}" / "waiting").exists() for seed in (0, 1)))
        os.kill(int((bench.out / "seed0" / "waiting").read_text()), signal.SIGKILL)
        ray.cancel(jobs[1].result)

    thread = threading.Thread(target=disturb)
    thread.start()
    rows = bench.sweep()
    thread.join()
    assert [row.status for row in rows.values()] == ["finished"] * 3 and ray.is_initialized()
    assert sorted(bench.calls()) == ["resume seed0", "resume seed1", *(f"train seed{seed}" for seed in range(3))]
    logs = [(bench.out / "logs" / f"seed{seed}.log").read_text() for seed in (0, 1)]
    assert "Ray lost its task: WorkerCrashedError" in logs[0] and "TaskCancelledError" in logs[1]


@on_ray
def test_a_cluster_that_cannot_be_used_is_a_line(bench, capsys, monkeypatch):
    import ray

    wrong = functools.partial(refused_settings, bench, capsys)
    wrong("cpu = 1", "spec.toml:7: unknown key 'cpu' in [ray]: did you mean cpus?")
    wrong("gpus = -1", "spec.toml:7: gpus in [ray] is -1; it must be a number, 0 or more")
    wrong("gpus = 0.5", "a run needs 1 CPU and 0.5 GPU, which the cluster does not have: see [ray] in the spec")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    wrong(f'address = "127.0.0.1:{cluster.free_port()}"', "no cluster at 127.0.0.1:", "Connection refused")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wrong("cpus = 1", "ray is not installed here: ", "pip install")


@long
def test_a_search_learns_and_goes_on(bench):
    pytest.importorskip("optuna")
    space = "[search.space]\nlearning_rate = { low = 0.01, high = 0.2, log = true }\n"
    text = f"{SHARED}validation = 100\n[search]\ntrials = 11\n{space}"
    rows = bench.sweep(text, slots=3)
    assert [row.status for row in rows.values()] == ["finished"] * 11
    bench.sweep(text.replace("11", "12"), slots=3)
    assert bench.calls() == ["train trial-0011"]
    found = json.loads((bench.out / "search.json").read_text())
    assert found["best"] and [each["status"] for each in found["trials"]] == ["complete"] * 12
