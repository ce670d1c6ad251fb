"""Runs share the cores of a CPU: threads of one, processes of several; measured speeds are pretended."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import codistill as cd
from codistill.cli import main
from codistill.core import host
from codistill.core.errors import ResourceError, WorkerError
from codistill.core.signals import SignalRequests
from codistill.settings.config import RunConfig, default_config
from codistill.training import fleet, pace, sharing
from codistill.training.fleet import train_fleet
from codistill.training.prepare import DeviceSplits, Plan, check
from codistill.training.processes import can_fork, run_in_processes
from codistill.training.resume import resume_together
from codistill.training.step import TrainStep
from codistill.training.train import train_from_config

from .. import tiny
from ..faults.running import run_here
from .test_fleet import assert_equal, bits

CPU = torch.device("cpu")
forks = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux without a GPU")
pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> Iterator[None]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host, "_in_place_of", None)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def colours(tiny_registered, tmp_path_factory) -> str:
    return str(tiny.write_npz(tmp_path_factory.mktemp("sharing") / "colours.npz", tiny.data(train=20, test=9)))


@pytest.fixture
def config(colours):
    def describe(**changes: Any) -> RunConfig:
        base = dataclasses.replace(default_config("dml"), networks=("tiny", "tiny"), data="packed", data_dir=colours)
        train, execution = tiny.both_settings(**changes)
        return dataclasses.replace(base, train=train, execution=execution)

    return describe


def pretend(monkeypatch, cores: int, speed: Callable[[int, int], float], memory: float = 1.0, free: float = 1e9):
    """Pretend to have cores on which so many processes of so many threads do so many steps a second together."""

    def measure(plans: Sequence[Plan], splits: Any, threads: int, runs: int | None = None) -> tuple[float, float]:
        asked.append((len(plans), threads))
        return speed(len(plans), threads), memory

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(sharing, "cores", lambda: cores)
    monkeypatch.setattr(sharing, "measure", measure)
    monkeypatch.setattr(sharing, "free_memory", lambda: free)
    return asked


def slow(processes: int, threads: int) -> float:
    """Steps that are worth a measurement, twice as many with two processes."""
    return processes / 1e3


def folders(count: int) -> list[Path]:
    return [Path("fleet") / f"member{index}" for index in range(count)]


@forks
def test_runs_in_processes_equal_their_lone_runs(config, monkeypatch, capfd):
    pretend(monkeypatch, 2, slow)
    configs = [config(seed=seed) for seed in (0, 1, 2)]
    runs = train_fleet(configs, folders(3))
    out, error = capfd.readouterr()
    assert error == "codistill: 3 runs, 2 at a time, each in a process with 1 thread\n"
    assert [run.path for run in runs] == folders(3)
    for index, each in enumerate(configs):
        assert f"member{index}: epoch 2/2" in out and f"run folder: fleet/member{index}" in out
        assert_equal(runs[index], train_from_config(each, Path(f"alone{index}"), show=False))


@forks
def test_processes_may_have_several_threads_though_this_one_has_had_them(config, monkeypatch):
    torch.set_num_threads(2)
    wide = torch.ones(2000, 500)
    (wide @ wide.T).relu().sum()  # in threads, which do not survive a fork
    pretend(monkeypatch, 4, slow)
    runs = train_fleet([config(seed=seed, epochs=1, threads=2) for seed in (0, 1)], folders(2), show=False)
    assert [run.status for run in runs] == ["finished"] * 2
    assert [run.metadata["environment"]["threads"] for run in runs] == [2, 2]


@forks
@pytest.mark.fault(103)
def test_on_the_command_line_one_that_diverges_is_marked(colours, monkeypatch, capfd):
    pretend(monkeypatch, 2, slow)
    for name, rate in (("a", 0.05), ("b", 1e30)):
        Path(f"{name}.json").write_text(json.dumps({"learning_rate": rate, "seed": 1, "threads": 1}))
    flags = ["--networks", "tiny", "tiny", "--data", "packed", "--data-dir", colours, "-b", "8", "--epochs", "2"]
    assert run_here(["train", "dml", "--recipes", "a.json", "b.json", *flags, "--out", "two"]) == 5
    error = capfd.readouterr().err.splitlines()
    assert error[1].startswith("codistill: warning: b is dropped: ")
    assert error[-1] == "codistill: error: 1 of 2 runs diverged: two/b; the others are finished"
    assert [cd.Run(f"two/{name}").status for name in "ab"] == ["finished", "diverged"]


@forks
@pytest.mark.fault(103)
@pytest.mark.parametrize("kind", ["killed", "memory"])
def test_one_that_fails_costs_no_other(config, monkeypatch, capfd, kind):
    pretend(monkeypatch, 2, slow)
    call = TrainStep.__call__

    def failing(self: TrainStep, *arguments: Any) -> None:
        call(self, *arguments)
        if self.method.marked:
            if kind == "memory":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGKILL)

    build = fleet.build_taught

    def built(config: RunConfig, data: cd.Dataset) -> cd.Method:
        method = build(config, data)
        method.marked = config.train.seed == 1
        return method

    monkeypatch.setattr(fleet, "build_taught", built)
    with monkeypatch.context() as patch, pytest.raises(WorkerError if kind == "killed" else ResourceError) as caught:
        patch.setattr(TrainStep, "__call__", failing)
        train_fleet([config(seed=seed) for seed in (0, 1, 2)], folders(3), show=False)
    wanted = "fleet/member1: its process was killed by SIGKILL; what it saved is kept: codistill resume fleet/member1"
    assert str(caught.value) == wanted if kind == "killed" else "out of memory" in capfd.readouterr().err
    assert [cd.Run(out).status for out in folders(3)] == [
        "finished",
        None if kind == "killed" else "failed",
        "finished",
    ]


@forks
@pytest.mark.fault(103)
def test_a_signal_stops_all_and_the_rest_is_resumed(config, monkeypatch, colours, capfd):
    pretend(monkeypatch, 2, slow)
    call, steps, hold = TrainStep.__call__, iter(range(100)), SignalRequests.hold

    def wait_until(happened: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not happened() and time.monotonic() < end:
            time.sleep(0.01)

    def stopping(self: TrainStep, *arguments: Any) -> None:
        call(self, *arguments)
        if next(steps) == 3:
            Path(f"at{os.getpid()}").touch()
            wait_until(lambda: len([*Path().glob("at*")]) == 2)
            with contextlib.suppress(FileExistsError):  # one of them is enough: two act at once
                Path("told").touch(exist_ok=False)
                os.kill(os.getppid(), signal.SIGINT)
            wait_until(Path(f"held{os.getpid()}").exists)

    def watched(self: SignalRequests, *arguments: Any) -> None:
        Path(f"held{os.getpid()}").touch()
        hold(self, *arguments)

    flags = ["--networks", "tiny", "tiny", "--data", "packed", "--data-dir", colours, "-b", "8", "--epochs", "2"]
    flags += ["--lr", "0.05", "--threads", "1", "--seeds", "0", "1", "2", "--out", "broken"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stopping)
        patch.setattr(SignalRequests, "hold", watched)
        assert run_here(["train", "dml", *flags]) == 130
    names = "broken/seed0 broken/seed1 broken/seed2"
    line = f"codistill: error: interrupted and saved: codistill resume {names}"
    assert capfd.readouterr().err.splitlines()[-1] == line
    runs = [cd.Run(f"broken/seed{seed}") for seed in range(3)]
    assert [run.status for run in runs] == ["interrupted", "interrupted", None]
    assert all(run.checkpoints.entries()[-1]["step"] > 0 for run in runs[:2])
    resume_together([Path("broken")], show=False)
    for seed in range(3):
        alone = train_from_config(config(seed=seed), Path(f"alone{seed}"), show=False)
        states = [bits(each.checkpoints.load().method) for each in (alone, cd.Run(f"broken/seed{seed}"))]
        assert states[0] == states[1]


@forks
def test_what_a_process_cannot_return(capfd):
    class Odd(Exception):
        pass

    def odd() -> None:
        raise Odd("of a function")

    works = [lambda: 1, odd, lambda: os._exit(3)]
    one, strange, ended = run_in_processes(works, 2)
    assert (one, str(strange), str(ended)) == (1, "bug: Odd: of a function", "its process was ended with status 3")


# The choices.


@pytest.mark.parametrize(
    ("cores", "threads", "runs", "speed", "chosen"),
    [
        (2, 2, 4, {(1, 2): 1.0, (2, 1): 1.5}, (2, 1)),
        (2, 2, 4, {(1, 2): 1.0, (2, 1): 0.9}, (1, 2)),
        (2, 2, 3, {(1, 2): 1.0, (2, 1): 1.2}, (1, 2)),  # the third one would be alone on one core
        (2, 2, 3, {(1, 2): 1.0, (2, 1): 1.4}, (2, 1)),
        (8, 8, 3, {(1, 8): 1.0, (3, 2): 2.0}, (3, 2)),
        (8, 8, 8, {(1, 8): 1.0, (8, 1): 2.0, (4, 2): 3.0, (2, 4): 1.5}, (4, 2)),
        (8, 8, 8, {(1, 8): 1.0, (8, 1): 0.0, (4, 2): 3.0, (2, 4): 1.5}, (4, 2)),  # eight have failed
        (4, 1, 2, {(1, 1): 1.0, (2, 1): 1.9}, (1, 1)),  # a program that has set torch's threads to one
        (2, 2, 4, {(1, 2): 1e6}, (1, 2)),  # too short
        (2, 2, 4, {(1, 2): 0.0}, (1, 2)),  # fails, as the training will
    ],
)
@forks
def test_processes_and_threads(config, monkeypatch, cores, threads, runs, speed, chosen):
    asked = pretend(monkeypatch, cores, lambda *of: speed.get(of, 0.5) / 1e3)
    plan = check(tiny.method(), tiny.data(), config(), CPU)
    plan = dataclasses.replace(plan, config=config(threads=None))
    torch.set_num_threads(threads)
    assert sharing.share_cores([plan] * runs, DeviceSplits(tiny.data(), CPU)) == chosen
    assert len(asked) == len(set(asked)) <= 4


@forks
def test_the_users_threads_and_memory_bound_the_processes(config, monkeypatch):
    data = tiny.data()
    plan = check(tiny.method(), data, config(threads=2), CPU)
    pretend(monkeypatch, 8, slow)
    assert sharing.share_cores([plan] * 9, DeviceSplits(data, CPU)) == (4, 2)
    pretend(monkeypatch, 8, slow, memory=10, free=3 * 10 * sharing.ALLOWANCE / sharing.USED_SHARE)
    assert sharing.share_cores([plan] * 9, DeviceSplits(data, CPU)) == (3, 2)
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert sharing.share_cores([plan] * 9, DeviceSplits(data, CPU)) == (1, 2)


@forks
def test_measured_runs_leave_nothing_behind(config, monkeypatch):
    monkeypatch.setattr(sharing, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(sharing, "PACE_SECONDS", 0.0)
    monkeypatch.setattr(sharing, "cores", lambda: 2)
    data = tiny.data()
    plan = check(tiny.method(), data, config(), CPU)
    before, state = bits(dict(plan.method.state_dict())), torch.get_rng_state()
    steps, memory = sharing.measure([plan, plan], DeviceSplits(data, CPU), 1)
    assert steps > 0 and memory >= 0
    assert sharing.share_cores([plan, plan], DeviceSplits(data, CPU))[1] == 1
    assert bits(dict(plan.method.state_dict())) == before and torch.equal(torch.get_rng_state(), state)


def chosen_threads(config, monkeypatch, most: int, seconds: Callable[[int], float], **changes: Any) -> int:
    """Return the number of threads of a run whose steps take so many seconds."""

    @contextlib.contextmanager
    def timed(plan: Plan, splits: DeviceSplits) -> Iterator[Callable[[int], float]]:
        yield seconds

    monkeypatch.setattr(sharing, "timed_steps", timed)
    plan = check(tiny.method(), tiny.data(), config(epochs=300), CPU)
    plan = dataclasses.replace(plan, config=config(**{"threads": None, "epochs": 300} | changes))
    torch.set_num_threads(most)
    sharing.choose_threads(plan, DeviceSplits(tiny.data(), CPU))
    return torch.get_num_threads()


@pytest.mark.fault(103)
@pytest.mark.parametrize(
    ("most", "seconds", "chosen"),
    [
        (2, {2: 0.6, 1: 1.0}, 2),
        (2, {2: 1.1, 1: 1.0}, 2),  # not distinctly
        (2, {2: 1.3, 1: 1.0}, 1),
        (8, {8: 9.0, 4: 3.0, 2: 2.9, 1: 5.0}, 4),
        (8, {8: 9.0, 4: 8.0, 2: 1.0, 1: 0.5}, 8),  # who has not found it faster with half as many looks no further
        (2, {2: 9e-3, 1: 1e-3}, 2),  # too short
    ],
)
def test_fewer_threads_where_they_are_distinctly_faster(config, monkeypatch, capsys, most, seconds, chosen):
    assert chosen_threads(config, monkeypatch, most, seconds.__getitem__) == chosen
    error = capsys.readouterr().err
    if chosen < most:
        takes = seconds[2 * chosen] / seconds[chosen]
        assert error.startswith(f"codistill: {chosen} of {most} threads: a step takes {takes:.1f} times as long with ")
    assert error.count("\n") == (chosen < most)


def test_the_users_number_of_threads_is_not_measured(config, monkeypatch):
    def never(threads: int) -> float:
        raise AssertionError("measured")

    assert chosen_threads(config, monkeypatch, 1, never) == 1
    assert chosen_threads(config, monkeypatch, 2, never, threads=2) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert chosen_threads(config, monkeypatch, 2, never) == 2


@pytest.mark.fault(103)
def test_a_resume_has_the_threads_of_the_beginning(config, monkeypatch):
    def fewer(plan: Plan, splits: DeviceSplits) -> None:
        if plan.config.execution.threads is None:
            host.set_threads(1)

    def interrupt(self: TrainStep, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "cores", lambda: 2)
    monkeypatch.setattr("codistill.training.train.choose_threads", fewer)
    torch.set_num_threads(2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "__call__", interrupt)
        train_from_config(config(threads=None), Path("run"), show=False)
    assert cd.Run("run").metadata["environment"]["threads"] == 1
    seen: list[int] = []
    call = TrainStep.__call__

    def watched(self: TrainStep, *arguments: Any) -> None:
        seen.append(torch.get_num_threads())
        call(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", watched)
    torch.set_num_threads(2)
    resume_together([Path("run")], show=False)
    assert set(seen) == {1}


# A step that becomes slow.


def test_steps_that_become_slow_are_said_once(monkeypatch):
    def steps(*seconds: float) -> list[str]:
        lines = []
        for each in seconds:
            clock.append(clock[-1] + each)
            lines += [line] if (line := watch.step()) else []
        return lines

    clock = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[-1])
    torch.set_num_threads(2)
    watch = pace.Pace(Path("runs/a"))
    assert steps(*[0.1] * 40, 0.5, 0.7, 0.1, 1.0, 1.0, 0.1) == []
    assert steps(3600.0, 0.1) == []  # the computer has slept
    watch.pause()
    assert steps(7.0, *[0.1] * 5) == []  # an evaluation
    (line,) = steps(*[1.0] * 40)
    assert line == (
        "a step takes 1 s, 10 times as long as the first ones: other programs may keep the cores busy: stop them, "
        "or go on with fewer threads: Ctrl-C, then codistill resume runs/a --override threads=1"
    )
    assert watch.step() is None


@pytest.mark.fault(103)
def test_the_warning_names_the_run(config, monkeypatch, capsys):
    monkeypatch.setattr(pace.Pace, "step", lambda self: f"slow: resume {self._run}")
    train_from_config(config(epochs=1, batch_size=20), Path("run"), show=False)
    assert capsys.readouterr().err == "codistill: warning: slow: resume run\n"


@pytest.mark.fault(103)
def test_more_threads_than_cores_are_warned_of(colours, monkeypatch, capsys):
    monkeypatch.setattr(host, "cores", lambda: 1)
    flags = ["--networks", "tiny", "tiny", "--data", "packed", "--data-dir", colours, "-b", "8", "--epochs", "1"]
    assert main(["train", "dml", *flags, "--threads", "3", "--out", "run"]) == 0
    line = "codistill: warning: 3 threads, but 1 cores to use: each step waits for the slowest thread: --threads 1"
    assert capsys.readouterr().err.startswith(line)


def test_only_linux_without_a_gpu_forks(config, monkeypatch):
    pretend(monkeypatch, 8, slow)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = check(tiny.method(), tiny.data(), config(), CPU)
    assert sharing.share_cores([plan] * 4, DeviceSplits(tiny.data(), CPU)) == (1, 1)
