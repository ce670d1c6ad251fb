"""Stands in for `codistill train` and `codistill resume`: makes a run folder, and ends as `acts.json` says."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
COMMAND, *REST = sys.argv[1:]
FOLDER = Path(REST[0] if COMMAND == "resume" else REST[REST.index("--out") + 1])
CALLS = HERE / "calls.txt"
# A number for each seed: what a run with it ends with.
ERRORS = [10.0, 14.0, 12.0, 20.0]


def summary(status: str, **more: object) -> None:
    (FOLDER / "summary.json").write_text(json.dumps({"status": status, **more}))


def fail(status: int, error: str = "") -> NoReturn:
    if error:
        print(f"codistill: error: {error}", file=sys.stderr)
    sys.exit(status)


def terminated(*_: object) -> NoReturn:
    summary("interrupted")
    fail(143, "terminated")


calls = CALLS.read_text().splitlines() if CALLS.exists() else []
earlier = sum(line.split()[1] == FOLDER.name for line in calls)
gpu, threads = (os.environ.get(name, "-") for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
with CALLS.open("a") as file:
    file.write(f"{COMMAND} {FOLDER.name} gpu={gpu} threads={threads} {' '.join(REST[1:])}\n")

if COMMAND == "train":
    recipe = json.loads(Path(REST[REST.index("--recipe") + 1]).read_text())
    if any(FOLDER.glob("*")):
        fail(2, f"run folder {FOLDER} is not empty")
    FOLDER.mkdir(exist_ok=True)
    known = {"name": "digits", "class_names": ["a"], "image_size": [8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    (FOLDER / "config.json").write_text(json.dumps({**recipe, "dataset": known, "environment": {}}))
config = json.loads((FOLDER / "config.json").read_text())

acts = json.loads((HERE / "acts.json").read_text()).get(FOLDER.name, [])
act, *words = (acts[earlier] if earlier < len(acts) else "finish").split(" ", 2)
if act == "kill":  # after the first checkpoint
    (FOLDER / "checkpoints").mkdir(exist_ok=True)
    (FOLDER / "checkpoints" / "epoch-000001.pt").write_bytes(b"")
    os.kill(os.getpid(), int(words[0]))
elif act == "kill-early":
    os.kill(os.getpid(), signal.SIGKILL)
elif act == "exit":
    if words[0] == "5":
        summary("diverged", error=words[1])
    fail(int(words[0]), *words[1:])
elif act == "wait":
    (FOLDER / "checkpoints").mkdir()
    (FOLDER / "checkpoints" / "epoch-000001.pt").write_bytes(b"")
    signal.signal(signal.SIGTERM, terminated)
    (FOLDER / "waiting").touch()
    time.sleep(60)
error = ERRORS[config.get("seed", 0)]
errors = {"student0": error, "ensemble": error - 5}
summary("finished", top1_error=errors, best_epoch_top1_error=errors)
