"""A sweep whose processes are stand-ins, which end as the test says."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from codistill.sweeps import driver as sweep_module
from codistill.sweeps.driver import sweep
from codistill.sweeps.table import Row

WORKER = Path(__file__).with_name("sweep_worker.py")
SHARED = 'networks = ["resnet20", "resnet20"]\ndata = "digits"\nepochs = 4\n'
SEEDS = f"{SHARED}[grid]\nseed = [0, 1, 2]\n"


class Bench:
    """A folder with a spec and a worker that ends as `act` sets."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "sweep"
        shutil.copy(WORKER, folder / "worker.py")
        self.act()
        self.program = [sys.executable, "-S", str(folder / "worker.py")]

    def act(self, **acts: list[str]) -> None:
        """Set how the runs end in each attempt; after these they finish."""
        (self.folder / "acts.json").write_text(json.dumps(acts))

    def sweep(self, text: str = SEEDS, **settings: object) -> dict[str, Row]:
        (self.folder / "spec.toml").write_text(text)
        (self.folder / "calls.txt").unlink(missing_ok=True)
        rows = sweep(self.folder / "spec.toml", self.out, program=self.program, **settings)
        assert [row.name for row in rows] == [row["name"] for row in self.table()["runs"]]
        return {row.name: row for row in rows}

    def calls(self) -> list[str]:
        """Return commands and runs, in the order in which they started."""
        file = self.folder / "calls.txt"
        return [" ".join(line.split()[:2]) for line in file.read_text().splitlines()] if file.exists() else []

    def words(self) -> list[list[str]]:
        return [line.split() for line in (self.folder / "calls.txt").read_text().splitlines()]

    def table(self) -> dict[str, list[dict[str, object]]]:
        return json.loads((self.out / "table.json").read_text())


def on_waiting(monkeypatch, act):
    """Call `act` when a sweep says that it waits; return the list of these lines."""
    waits, say = [], sweep_module.Sweep.say

    def listen(state, line):
        say(state, line)
        if "waits for " in line:
            waits.append(line)
            act()

    monkeypatch.setattr(sweep_module.Sweep, "say", listen)
    return waits


@contextlib.contextmanager
def signalled(bench, number, ended=lambda: None):
    """Send this process a signal once seed0 is in both tables and seed1 waits; call `ended` right before."""

    def send():
        late, table = time.monotonic() + 60, bench.out / "table.md"  # which is written last
        while not (bench.out / "seed1" / "waiting").exists() or "| finished" not in table.read_text():
            if time.monotonic() > late:
                return
            time.sleep(0.01)
        ended()
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
