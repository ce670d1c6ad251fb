"""A real SLURM of one node on this machine, with its own munge, for as long as a test needs it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={port}
SlurmdPort={next_port}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
MessageTimeout=10
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return what a SLURM on this machine lacks; empty: nothing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    lacks = [name for name in NEEDED if not shutil.which(name, path=path)]
    return f"no {', '.join(lacks)} here" if lacks else "SLURM's daemons need root" if os.getuid() else ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """Yield the configuration of a SLURM that runs until the block ends."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    host, port, next_port = socket.gethostname().partition(".")[0], free_port(), free_port()
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, port=port, next_port=next_port))
    environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}
    files = {"key-file": "munge.key", "log-file": "munge.log", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munge = ["munged", "--force", f"--socket={folder}/munge.socket"]
    munge += [f"--{flag}={folder / name}" for flag, name in files.items()]
    try:
        for command in (munge, ["slurmctld"], ["slurmd"]):
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        late = time.monotonic() + 30
        asked = ["sinfo", "-h", "-o", "%T"]
        while "idle" not in subprocess.run(asked, env=environment, capture_output=True, text=True).stdout:
            assert time.monotonic() < late, f"no idle node after 30 s: see {folder}/slurmctld.log"
            time.sleep(0.1)
        yield configuration
    finally:
        subprocess.run(["scancel", "--partition=test"], env=environment, capture_output=True)
        # Steps that cannot tell the controller of their end would try for long, and slurmd waits for them.
        late = time.monotonic() + 30
        while subprocess.run(["squeue", "-h"], env=environment, capture_output=True).stdout and time.monotonic() < late:
            time.sleep(0.2)
        for name in ("slurmd", "slurmctld", "munge"):
            end(folder / f"{name}.pid")


def end(file: Path) -> None:
    """End the daemon whose number a file has, and wait for it."""
    with contextlib.suppress(OSError, ValueError):
        pid, late = int(file.read_text()), time.monotonic() + 10
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
            if time.monotonic() > late:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
