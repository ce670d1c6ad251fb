"""Threads and memory of the host."""

import os
import subprocess
import sys

import pytest
import torch

from codistill.core import host

CPU = torch.device("cpu")


def groups(root, entries: str, limits: dict[str, str]):
    """Lay out control groups below a root."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(entries)
    for place, text in limits.items():
        file = root / "sys/fs/cgroup" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("entries", "limits", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "400000 100000\n"}, 2),
        ("3:cpu,cpuacct:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000\n"}, 3),
        ("3:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("2:cpuset:/\n", {"cpu.max": "100000 100000\n"}, None),
        ("0::/\n", {"cpu.max": "what\n"}, None),
        ("", {}, None),
    ],
)
def test_the_quota_of_a_container_is_the_smallest_above_it(tmp_path, entries, limits, quota):
    assert host.processor_quota(groups(tmp_path, entries, limits)) == quota


@pytest.fixture
def chosen(monkeypatch):
    """Pretend to have eight cores; lists the numbers of threads that are set."""
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return given


@pytest.mark.parametrize(("quota", "threads"), [(None, []), (0.5, [1]), (1.5, [2]), (8.0, []), (64.0, [])])
def test_no_more_threads_than_the_quota_feeds(chosen, monkeypatch, quota, threads):
    monkeypatch.setattr(host, "processor_quota", lambda: quota)
    host.set_up_cpu(None, CPU)
    assert chosen == threads


def test_the_users_number_of_threads_stands(chosen, monkeypatch):
    monkeypatch.setattr(host, "processor_quota", lambda: 1.0)
    host.set_up_cpu(5, CPU)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    host.set_up_cpu(None, CPU)
    assert chosen == [5]


PROGRAM = """
import resource
import torch
from codistill.core.host import keep_freed_memory, release_freed_memory, set_up_cpu

def faults(device, end=lambda: None):
    set_up_cpu(1, torch.device(device))
    def work():
        held = [torch.ones(10 * 2**20) for _ in range(2)]
    for _ in range(3):
        work()
    rounds = []
    for _ in range(10):
        end()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        rounds.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # A small block that is allocated between two large ones makes one of these move, in some rounds.
    return min(rounds)

print(faults("meta"), faults("cpu"), faults("cpu", release_freed_memory), keep_freed_memory())
"""


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc only")
@pytest.mark.parametrize(
    "given",
    [{}, pytest.param({"MALLOC_TRIM_THRESHOLD_": "131072"}, marks=pytest.mark.slow)],
    ids=["plain", "set by the user"],
)
def test_memory_that_a_step_frees_stays_with_the_process_until_it_is_released(given):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | given
    command = [sys.executable, "-c", PROGRAM]
    before, after, released, kept = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    # Blocks of 40 MiB, which by default are always given back: two of them are 20,480 pages of 4 KiB.
    assert int(before) > 10_000 and int(released) > 10_000
    assert (int(after) < 100, kept) == ((True, "True") if not given else (False, "False"))


def test_torchs_own_number_of_threads_comes_back(chosen, monkeypatch):
    now = [8]
    monkeypatch.setattr(host, "_in_place_of", None)
    monkeypatch.setattr(host, "processor_quota", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    host.set_up_cpu(2, CPU)
    host.set_threads(1)
    host.set_up_cpu(None, CPU)
    assert now == [8, 2, 1, 8]
    now.append(3)  # by the user
    host.set_up_cpu(None, CPU)
    assert now[-1] == 3


@pytest.mark.parametrize(
    ("entries", "files", "free"),
    [
        ("0::/a\n", {}, 4096 * 1024),
        ("0::/a\n", {"a/memory.max": "max\n", "a/memory.current": "1\n"}, 4096 * 1024),
        ("0::/a\n", {"a/memory.max": "9000\n", "a/memory.current": "5000\n", "a/memory.stat": "file 1\n"}, 4000),
        (
            "4:memory:/b\n",
            {
                "memory/b/memory.limit_in_bytes": "9000\n",
                "memory/b/memory.usage_in_bytes": "5000\n",
                "memory/b/memory.stat": "inactive_file 9\ntotal_inactive_file 50\n",
            },
            4009,
        ),
        ("0::/a\n", {"a/memory.max": "10\n", "a/memory.current": "50\n", "a/memory.stat": ""}, 0),
    ],
)
def test_free_memory_is_that_of_the_machine_or_of_the_container(tmp_path, entries, files, free):
    root = groups(tmp_path, entries, files)
    (root / "proc/meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    4096 kB\n")
    assert host.free_memory(root) == free
    assert host.free_memory(tmp_path / "none") > 1e300


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    for quota, count in ((None, 3), (1.5, 2), (0.1, 1), (64.0, 3)):
        monkeypatch.setattr(host, "processor_quota", lambda quota=quota: quota)
        assert host.cores() == count
    monkeypatch.setattr(host, "processor_quota", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setenv("OMP_PROC_BIND", "close")  # which narrows the affinity of this thread
    assert host.cores() == 7
