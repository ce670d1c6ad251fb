"""Train FFL on the same images with a program in the usual style of papers' code and with codistill, in turn.

    python benchmarks/peers.py --data cifar100.npz --out results/peers-cpu              # two cores: about 10 minutes

Each program is whole and in a process of its own, from its start to its last file: peer, codistill, peer and so on.
The peer is peer_ffl.py, which describes its style, on torch's defaults; codistill trains the same experiment by
`codistill train ffl`. Each program's record is added to OUT/measured.json as soon as it ends, and another start
continues there. Speeds are of the training epochs (evaluation not included) and of the whole program; memory is the
most that the main process has held, without the peer's workers.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

PEER, OURS = "peer", "codistill"
PROGRAM = Path(__file__).with_name("peer_ffl.py")
TEST_SHARE = 5  # as in CIFAR, a fifth as many test images as training images


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    out: Path
    data: Path
    """A .npz file as `--data packed` reads it, of images of 32x32 pixels."""
    images: int = 2000
    """Train on so many images, equally many of each class, and evaluate on a fifth as many test images."""
    batch: int = 128
    networks: tuple[str, str] = ("resnet20", "resnet20")
    """Two equal ResNets of depth 6n+2."""
    epochs: int = 3
    precision: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16")
    """The peer's bf16 is autocast around its forward passes."""
    compile: Literal["auto", "on", "off"] = "auto"
    """codistill's."""
    workers: int = 4
    """The peer's, four as published."""
    threads: int | None = None
    """Of both; None: the default of each."""
    rounds: int = 3


def subset(options: Options, path: Path) -> None:
    """Write the images that all programs train and are evaluated on."""
    counts = {"train": options.images, "test": max(1, options.images // TEST_SHARE)}
    arrays = {}
    with np.load(options.data) as file:
        for split, count in counts.items():
            labels = file[f"{split}_labels"]
            # The first of each class, then the second of each: a small part has images of all classes, too.
            order = np.argsort(labels, kind="stable")
            starts = np.searchsorted(labels[order], labels[order])
            turn = np.empty_like(order)
            turn[order] = np.arange(len(order)) - starts
            chosen = np.sort(np.argsort(turn, kind="stable")[:count])
            arrays |= {f"{split}_images": file[f"{split}_images"][chosen], f"{split}_labels": labels[chosen]}
    np.savez(path, **arrays)


def command(program: str, precision: str, images: Path, out: Path, options: Options) -> list[str]:
    common = ["--epochs", str(options.epochs), "--precision", precision, "--device", "cpu", "--out", str(out)]
    first, second = options.networks
    if first != second or not first.startswith("resnet"):
        raise SystemExit(f"networks are {first} {second}; the peer has two equal ResNets: name resnet20 resnet20")
    if program == PEER:
        own = [
            "--depth",
            first.removeprefix("resnet"),
            "--batch",
            str(options.batch),
            "--workers",
            str(options.workers),
        ]
        return [sys.executable, str(PROGRAM), str(images), *own, *common]
    own = ["--networks", first, second, "--data", "packed", "--data-dir", str(images), "--padding-mode", "reflect"]
    own += ["--batch-size", str(options.batch), "--compile", options.compile]
    own += ["--threads", str(options.threads)] if options.threads else []
    return [sys.executable, "-m", "codistill", "train", "ffl", *own, *common]


def run(written: list[str], threads: int | None, log: Path) -> dict[str, float]:
    """Run a whole program and return what it took; it is stopped where this one is."""
    # The peer is as a user starts it: no variable of this process tells its threads how to wait.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(written, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(written)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_mib": usage.ru_maxrss / 1024,
    }


def trained(program: str, out: Path) -> dict[str, Any]:
    """Read from what a program wrote the seconds of its training epochs, the loss of the last one and test errors."""
    if program == PEER:
        result = json.loads((out / "result.json").read_text())
        return {"train_seconds": sum(result["train_seconds"]), "loss": result["loss"], "errors": result["errors"]}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    return {
        "train_seconds": sum(row["seconds"] for row in rows),
        "loss": rows[-1]["train"]["loss"],
        "errors": {name: summary["top1_error"][name] for name in ("student0", "student1", "fused")},
        "environment": summary["environment"],
        "execution": summary.get("execution"),
    }


def measure(program: str, precision: str, options: Options) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="codistill-peers-") as folder:
        images, out = Path(folder) / "images.npz", Path(folder) / "run"
        subset(options, images)
        load = os.getloadavg()[0]
        took = run(command(program, precision, images, out, options), options.threads, Path(folder) / "log")
        return {"program": program, "precision": precision, "load_before": load, **took, **trained(program, out)}


def ratio(records: list[dict[str, Any]], key: str, ours: str, peer: str) -> float:
    """Return the median over rounds of the peer's seconds over ours, each program in a precision."""
    above, below = (
        [each[key] for each in records if (each["program"], each["precision"]) == which]
        for which in ((PEER, peer), (OURS, ours))
    )
    return statistics.median(first / second for first, second in zip(above, below, strict=False))


def table(records: list[dict[str, Any]], options: Options) -> str:
    """Write Markdown: medians over the rounds; ratios are medians of the rounds' ratios."""
    heads = (
        "program",
        "images/s, training epochs",
        "images/s, whole program",
        "images per CPU second",
        "peak RSS, MiB",
        "training loss, last epoch",
        "test errors, %: students; fused",
        "times the peer, training",
        "times the peer, whole",
        "times the float32 peer, training",
    )
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    images = options.epochs * options.images
    for precision in options.precision:
        for program in (PEER, OURS):
            same = [each for each in records if (each["program"], each["precision"]) == (program, precision)]
            if not same:
                continue
            middle = {
                key: statistics.median(each[key] for each in same)
                for key in ("train_seconds", "seconds", "cpu_seconds", "peak_rss_mib", "loss")
            }
            errors = [statistics.median(each["errors"][name] for each in same) for name in same[0]["errors"]]
            beside: list[str] = []
            for key, peer in (("train_seconds", precision), ("seconds", precision), ("train_seconds", "float32")):
                there = any((each["program"], each["precision"]) == (PEER, peer) for each in records)
                beside.append(f"{ratio(records, key, precision, peer):.2f}" if program == OURS and there else "-")
            cells = [
                f"{program}, {precision}",
                *(f"{images / middle[key]:.0f}" for key in ("train_seconds", "seconds", "cpu_seconds")),
                f"{middle['peak_rss_mib']:,.0f}",
                f"{middle['loss']:.2f}",
                f"{errors[0]:.1f} {errors[1]:.1f}; {errors[2]:.1f}",
                *beside,
            ]
            rows.append(f"| {' | '.join(cells)} |")
    environment = next((each["environment"] for each in records if "environment" in each), {})
    return "\n".join([*rows, "", f"`{json.dumps(environment)}`", ""])


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "measured.json"
    # What an interrupted start has measured counts only where it was asked for the same.
    asked = asdict(replace(options, rounds=0, out=Path(), data=Path(options.data.name)))
    asked = json.loads(json.dumps(asked, default=str))
    held = json.loads(path.read_text()) if path.exists() else {"asked": asked, "programs": []}
    if held["asked"] != asked:
        raise SystemExit(f"{path}: holds what other options have measured: name another --out")
    records: list[dict[str, Any]] = held["programs"]
    turns = [(program, precision) for precision in options.precision for program in (PEER, OURS)] * options.rounds
    for program, precision in turns[len(records) :]:
        records.append(measure(program, precision, options))
        path.write_text(json.dumps(held, indent=1) + "\n")
        (options.out / "table.md").write_text(table(records, options))
        print(f"{program} {precision}: {records[-1]['seconds']:.1f} s", flush=True)
    print(table(records, options))


if __name__ == "__main__":
    main(tyro.cli(Options))
