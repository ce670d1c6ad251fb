"""Stand-in for `codistill train` and `codistill resume`: makes run folders, and ends as `acts.json` says."""

import fcntl
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
COMMAND, *REST = sys.argv[1:]
CALLS = HERE / "calls.txt"
# The error of a run with each seed.
ERRORS = [10.0, 14.0, 12.0, 20.0]


def paths(flag: str = "") -> list[Path]:
    """Return the words behind a flag, or those before the first one."""
    words = itertools.takewhile(lambda word: not word.startswith("--"), REST[REST.index(flag) + 1 if flag else 0 :])
    return [Path(word) for word in words]


def summary(folder: Path, status: str, **more: object) -> None:
    (folder / "summary.json").write_text(json.dumps({"status": status, **more}))


def fail(status: int, error: str = "") -> NoReturn:
    if error:
        print(f"codistill: error: {error}", file=sys.stderr)
    sys.exit(status)


def begin(folder: Path, recipe: Path) -> None:
    if any(path.name != ".lock" and ".tmp-" not in path.name for path in folder.glob("*")):
        fail(2, f"run folder {folder} is not empty")
    folder.mkdir(exist_ok=True)
    known = {"name": "digits", "class_names": ["a"], "image_size": [8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    config = {**json.loads(recipe.read_text()), "dataset": known, "environment": {}}
    (folder / "config.json").write_text(json.dumps(config))


def save(folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "epoch-000001.pt").write_bytes(b"")


def finish(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    error = ERRORS[config.get("seed", 0)]
    errors = {"student0": error, "ensemble": error - 5}
    more = {}
    if config.get("validation"):  # the best learning rate is 0.05, and worst on the test set
        miss = 100 * abs(config["learning_rate"] - 0.05)
        errors = {"student0": 50 - miss, "student1": error}
        more["validation_top1_error"] = {"student0": miss + config.get("seed", 0), "student1": miss / 2}
    summary(folder, "finished", top1_error=errors, best_epoch_top1_error=errors, **more)


def wait_for_go() -> None:
    late = time.monotonic() + 60
    while not (HERE / "go").exists() and time.monotonic() < late:
        time.sleep(0.02)


def terminated(*_: object) -> NoReturn:
    for folder in open_folders:
        save(folder)
        summary(folder, "interrupted")
    fail(143, "terminated")


recipes: list[Path] = []
if COMMAND == "resume":
    folders = paths()
elif "--recipes" in REST:
    recipes = paths("--recipes")
    folders = [paths("--out")[0] / recipe.stem for recipe in recipes]
else:
    recipes, folders = paths("--recipe"), paths("--out")

calls = [line.split()[1].split("+") for line in CALLS.read_text().splitlines()] if CALLS.exists() else []
earlier = {folder.name: sum(folder.name in names for names in calls) for folder in folders}
gpu, threads = (os.environ.get(name, "-") for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
with CALLS.open("a") as file:
    names = "+".join(folder.name for folder in folders)
    file.write(f"{COMMAND} {names} gpu={gpu} threads={threads} {' '.join(REST)}\n")

known_acts = json.loads((HERE / "acts.json").read_text())
acts = {}
for folder in folders:
    own = known_acts.get(folder.name, [])
    acts[folder] = (own[earlier[folder.name]] if earlier[folder.name] < len(own) else "finish").split(" ", 2)

several = len(folders) > 1
for act, *words in acts.values():
    if several and act == "exit" and words[0] != "5":  # an error of one of them is found before all
        fail(int(words[0]), *words[1:])
for folder, recipe in zip(folders, recipes, strict=False):
    begin(folder, recipe)
locks = []
for folder in folders:
    locks.append((folder / ".lock").open("a"))
    try:
        fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(2, f"run folder {folder} is in use by another process")
open_folders = list(folders)
diverged = 0
for folder, (act, *words) in acts.items():
    if act == "done":  # as a run of an earlier group of the same process
        finish(folder)
        open_folders.remove(folder)
    elif act == "kill":  # after the first checkpoint
        save(folder)
        os.kill(os.getpid(), int(words[0]))
    elif act == "kill-early":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "exit":
        if words[0] == "5":
            summary(folder, "diverged", error=words[1])
        if not several:
            fail(int(words[0]), *words[1:])
        open_folders.remove(folder)
        diverged += 1
    elif act == "wait":
        save(folder)
        signal.signal(signal.SIGTERM, terminated)
        (folder / "waiting").write_text(str(os.getppid()))
        wait_for_go()
    elif act == "steps":  # each a checkpoint; the last one is done when the test says so
        save(folder)
        signal.signal(signal.SIGTERM, terminated)
        (folder / "waiting").write_text(str(os.getpid()))
        state = folder / "state.txt"
        done, digest = state.read_text().split() if state.exists() else ("0", "")
        for step in range(int(done), 100):
            if step == 99:
                wait_for_go()
            digest = hashlib.sha256(f"{digest}{step}".encode()).hexdigest()
            state.with_suffix(".new").write_text(f"{step + 1} {digest}")
            state.with_suffix(".new").replace(state)
            time.sleep(0.01)
for folder in open_folders:
    finish(folder)
if diverged:
    fail(5, f"{diverged} of {len(folders)} runs diverged")
