"""Sweeps with real runs in real processes: a lost run is a row, and a lost driver costs nothing.

tests/sweeps/test_engines.py has the same with stand-ins for runs, in the first tier.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.settings.config import RunConfig
from codistill.sweeps.spec import read_spec
from codistill.training.train import train_from_config

from .. import tiny

ROOT = Path(__file__).parents[2]
SHARED = 'networks = ["tiny", "tiny"]\ndata = "packed"\nepochs = 3\nbatch_size = 8\nlearning_rate = 0.05\nthreads = 1\n'


def driven(
    folder: Path, text: str, slots: int = 2, side_by_side: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `codistill sweep` in a process of its own."""
    tiny.write_npz(folder / "colours.npz", tiny.data())
    (folder / "spec.toml").write_text(f'{SHARED}data_dir = "{folder}/colours.npz"\n{text}')
    command = [sys.executable, "-m", "tests.faults.tiny_program", "sweep", str(folder / "spec.toml")]
    return subprocess.run(
        [*command, "--out", str(folder / "sweep"), "--slots", str(slots), "--side-by-side", str(side_by_side)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def commands(folder: Path, name: str) -> list[str]:
    """List the commands of a run: train, resume."""
    lines = (folder / "sweep" / "logs" / f"{name}.log").read_text().splitlines()
    return [line.split("tiny_program ")[1].split()[0] for line in lines if line.startswith("$ ")]


def assert_as_without_the_break(folder: Path, name: str, config: RunConfig) -> None:
    """Assert that a run is bitwise equal to one that nothing interrupts."""
    with tiny.registered():
        whole = train_from_config(config, folder / f"whole-{name}", show=False)
    run = cd.Run(folder / "sweep" / name)
    assert tiny.untimed(run.metrics()) == tiny.untimed(whole.metrics())
    first, second = (each.checkpoints.load().method for each in (run, whole))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
@pytest.mark.fault(39)
def test_each_loss_is_a_row(tmp_path):
    runs = [
        "seed = 0",
        "seed = 1",
        "learning_rate = 1e30",
        'networks = ["resnet21", "tiny"]',
    ]
    killed = "tinyx2-learning-rate-0.05-seed1"
    done = driven(tmp_path, "".join(f"[[runs]]\n{run}\n" for run in runs), KILL=killed)
    table = json.loads((tmp_path / "sweep" / "table.json").read_text())
    rows = {row["name"]: row for row in table["runs"]}
    assert len(rows) == 4, done.stderr
    lost = {name: row["reason"] for name, row in rows.items() if row["status"] == "FAILED"}
    assert sorted(row["status"] for row in rows.values()) == ["FAILED"] * 2 + ["finished"] * 2
    (diverged,) = (name for name in lost if "learning-rate-1e+30" in name)
    (invalid,) = (name for name in lost if "resnet21+tiny" in name)
    assert "student" in lost[diverged] and "unknown network 'resnet21'" in lost[invalid]
    assert commands(tmp_path, diverged) == ["train"] and commands(tmp_path, invalid) == []
    assert commands(tmp_path, killed) == ["train", "resume"] and rows[killed]["status"] == "finished"
    assert all(not group["mean"] for group in table["groups"] if group["failed"])
    assert done.returncode == 7 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"codistill: error: 2 of 4 runs failed: {diverged}, {invalid}: ")
    with tiny.registered():
        config = next(run.config for run in read_spec(tmp_path / "spec.toml") if run.name == killed)
    assert config is not None
    assert_as_without_the_break(tmp_path, killed, config)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.fault(39)
def test_runs_that_share_a_process_survive_its_death_and_each_other(tmp_path):
    text = "[[runs]]\n[[runs]]\nseed = 1\n[[runs]]\nmethod = 'dml'\n[[runs]]\nlearning_rate = 1e30\n"
    killed = "mfef-learning-rate-0.05-seed1"
    done = driven(tmp_path, text, slots=1, side_by_side=True, KILL=killed)
    assert done.returncode == 7, done.stderr
    assert "start side by side" in done.stdout and "killed by SIGKILL: trying again, 1 of 2" in done.stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "sweep" / "table.json").read_text())["runs"]}
    (diverged,) = (name for name in rows if "1e+30" in name)
    lost = {name: row["reason"] for name, row in rows.items() if row["status"] != "finished"}
    assert len(rows) == 4 and list(lost) == [diverged] and "became NaN or infinite" in lost[diverged]
    assert commands(tmp_path, killed) == ["train", "resume"]
    with tiny.registered():
        configs = {run.name: run.config for run in read_spec(tmp_path / "spec.toml")}
    for name in rows.keys() - {diverged}:
        assert_as_without_the_break(tmp_path, name, configs[name])


@pytest.mark.slow
@pytest.mark.fault(40)
def test_a_killed_sweep_resumes_whatever_the_clock_says(tmp_path):
    text = "[grid]\nseed = [0, 1]\n"
    done = driven(tmp_path, text, slots=1, KILL_DRIVER="seed1")
    assert done.returncode == -9
    folder = tmp_path / "sweep"
    statuses = [row["status"] for row in json.loads((folder / "table.json").read_text())["runs"]]
    assert statuses == ["finished", "unfinished"]
    # The newest files become the oldest, and all lie in the future.
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime)
    for age, path in enumerate(files):
        os.utime(path, (4e9 - age, 4e9 - age))
    before = tiny.listing(folder / "seed0")
    done = driven(tmp_path, text, slots=1)
    assert (done.returncode, done.stderr) == (0, "")
    assert [commands(tmp_path, f"seed{seed}") for seed in (0, 1)] == [["train"], ["train", "resume"]]
    assert tiny.listing(folder / "seed0") == before
    table = json.loads((folder / "table.json").read_text())
    assert [row["status"] for row in table["runs"]] == ["finished"] * 2 and table["groups"][0]["mean"]
    config = read_spec(tmp_path / "spec.toml")[1].config
    assert config is not None
    assert_as_without_the_break(tmp_path, "seed1", config)
