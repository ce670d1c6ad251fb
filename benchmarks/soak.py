"""Kill a running training again and again at random moments, resume it, and compare its end with an undisturbed run's.

    python benchmarks/soak.py --kills 200 --out runs/soak

Each training is a process of its own (a fork of this one, which has imported everything). SIGKILL leaves it no time to
do anything; every fourth time or so it gets SIGTERM or SIGINT instead, at which it saves. A moment is drawn between the
start of a process and twice as long as an undisturbed one takes to its first line of metrics. Runs that finish are
compared, bit for bit: parameters, buffers, momentum and metrics. Then the next one starts, with another seed, until all
kills are done and the last run has ended. Prints a line a run, and writes OUT/soak.json and OUT/soak.md.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import codistill as cd
from codistill.cli.main import main as command
from codistill.runs.metadata import environment
from codistill.training.verify import end_state

SOFT = (signal.SIGTERM, signal.SIGINT)


def started(line: list[str], log: Path) -> int:
    """Run a command line in a child and return its process number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(log, "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = command(line)
            sys.stdout.flush()
    finally:
        os._exit(status)


def ended(pid: int, deadline: float | None = None) -> int | None:
    """Wait for a child and return its exit status; None: it still runs at the deadline."""
    while True:
        done, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= (deadline or 0):
            return None
        time.sleep(0.0005)


def few_digits(path: Path, train: int, test: int) -> Path:
    """Write some images of scikit-learn's digits as a packed data set, for short epochs."""
    whole = cd.dataset("digits")
    np.savez(
        path,
        train_images=whole.train.images[:train],
        train_labels=whole.train.labels[:train],
        test_images=whole.test.images[:test],
        test_labels=whole.test.labels[:test],
    )
    return path


def arguments(data: Path, out: Path, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the command line of a run."""
    flags = ["--networks", *options.networks, "--data", "packed", "--data-dir", str(data)]
    flags += ["-b", str(options.batch_size), "--epochs", str(options.epochs), "--seed", str(seed), "--threads", "1"]
    return ["train", options.method, *flags, "--out", str(out)]


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill and resume runs in a folder until all kills are done."""
    moments = random.Random(options.seed)
    log = options.out / "soak.log"
    log.unlink(missing_ok=True)
    data = few_digits(folder / "digits.npz", options.train_images, options.test_images)
    counts = {"SIGKILL": 0, "SIGTERM": 0, "SIGINT": 0}
    facts = {"before_the_first_checkpoint": 0, "with_a_temporary_file_left": 0, "inside_an_epoch": 0}
    runs: list[dict[str, Any]] = []
    started_at = time.monotonic()
    while counts["SIGKILL"] < options.kills:
        seed = len(runs)
        whole, broken = folder / f"whole{seed}", folder / f"broken{seed}"
        began, pid, first = time.monotonic(), started(arguments(data, whole, seed, options), log), None
        while (status := ended(pid, time.monotonic())) is None:
            if first is None and (whole / "metrics.jsonl").exists():
                first = time.monotonic() - began
            time.sleep(0.001)
        assert status == 0 and first, f"the undisturbed run ended with {status}: see {log}"
        lives, line = 0, arguments(data, broken, seed, options)
        while True:
            lives += 1
            pid = started(line, log)
            spent = counts["SIGKILL"] >= options.kills
            status = ended(pid, None if spent else time.monotonic() + moments.uniform(0, 2 * first))
            if status is None:
                kind = moments.choice(SOFT) if moments.random() < 0.25 else signal.SIGKILL
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, kind)
                status = ended(pid)
                if status == 0:  # it came to its end before the signal did
                    break
                counts[signal.Signals(kind).name] += 1
                assert status in (-kind, 128 + kind), f"life {lives} of seed {seed} ended with {status}: see {log}"
                index = broken / "checkpoints" / "index.json"
                facts["before_the_first_checkpoint"] += not index.exists()
                facts["with_a_temporary_file_left"] += any(broken.rglob("*.tmp-*"))
                if index.exists():
                    facts["inside_an_epoch"] += json.loads(index.read_text())["files"][-1]["step"] > 0
            else:
                assert status == 0, f"life {lives} of seed {seed} ended with {status}: see {log}"
                break
            if (broken / "summary.json").exists() and cd.Run(broken).finished:
                break  # killed after its end, while it drew the report
            line = ["resume", str(broken)] if (broken / "config.json").exists() else line
        equal = end_state(cd.Run(whole)) == end_state(cd.Run(broken))
        runs.append({"seed": seed, "lives": lives, "equal": equal, "end_state": end_state(cd.Run(broken))[:16]})
        print(f"seed {seed}: {lives} lives, {counts}: {'equal' if equal else 'DIFFERENT'}", flush=True)
        for path in (whole, broken):
            shutil.rmtree(path)
    return {
        "command": " ".join(["python", *sys.argv]),
        "method": options.method,
        "networks": options.networks,
        "epochs": options.epochs,
        "signals": counts,
        **facts,
        "runs": runs,
        "all_equal": all(run["equal"] for run in runs),
        "seconds": round(time.monotonic() - started_at),
        "environment": environment(torch.device("cpu")),
    }


def page(result: dict[str, Any]) -> str:
    """Write the result as Markdown."""
    kills = ", ".join(f"{count} {name}" for name, count in result["signals"].items())
    lines = [
        f"`{result['command']}`: {kills}; {result['before_the_first_checkpoint']} before the first checkpoint, "
        f"{result['with_a_temporary_file_left']} left a temporary file (killed while writing), "
        f"{result['inside_an_epoch']} left a checkpoint inside an epoch as the newest. {result['seconds']} s.",
        "",
        "| seed | processes that worked on it | end state | as undisturbed |",
        "|---|---|---|---|",
    ]
    for run in result["runs"]:
        lines.append(f"| {run['seed']} | {run['lives']} | {run['end_state']} | {'yes' if run['equal'] else 'NO'} |")
    machine = result["environment"]
    lines += ["", f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}, {machine['platform']}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how often to send SIGKILL")
    parser.add_argument("--method", default="mfef")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet20"])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--train-images", type=int, default=64)
    parser.add_argument("--test-images", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="codistill-soak-") as folder:
        result = soak(options, Path(folder))
    (options.out / "soak.log").unlink()
    (options.out / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "soak.md").write_text(page(result))
    return 0 if result["all_equal"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
