"""Folders of runs and sweeps as trainings leave them, written by hand: errors are what a test wants them to be."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

DATA = {"name": "digits", "class_names": ["a", "b"], "image_size": [8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
SETTINGS = {"networks": ["resnet8", "resnet8"], "epochs": 2, "learning_rate": 0.1, "ema_decay": 0.0, "milestones": [1]}


def write_run(folder: Path, method: str, seed: int, errors: Mapping[str, float], status="finished", **more) -> Path:
    """Write a run of two epochs; no errors: it has none behind it."""
    folder.mkdir(parents=True)
    size, error, data = (
        more.pop("parameters", 700),
        more.pop("error", None),
        {**DATA, "sha256": {"test": more.pop("test", "0")}},
    )
    config = {**SETTINGS, "method": {"name": method}, "seed": seed, "dataset": data, "environment": {}, **more}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for epoch in range(2) if errors else ():
        test = {name: {"top1_error": each + 10 * (1 - epoch)} for name, each in errors.items()}
        row = {"epoch": epoch, "train": {"loss": 1.0}, "test": test, "learning_rate": 0.1}
        lines.append(json.dumps({**row, "diversity": {"disagreement": 1.0}}))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    summary = {"status": status, "images_per_second": 10.0, "parameters": {"student0": size}}
    summary |= {"error": error} if error else {}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_table(folder: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    """Write the `table.json` of a sweep: names of run and group, and reason of each."""
    runs = [{"name": name, "group": group, "reason": reason} for name, group, reason in rows]
    (folder / "table.json").write_text(json.dumps({"runs": runs}))
    return folder


def write_sweep(folder: Path, groups: Mapping[str, Mapping], lost: Mapping[str, str] = {}) -> Path:
    """Write a sweep: of each group its settings, with `errors` by predictor, a value for each seed from 0 on."""
    rows = []
    for group, settings in groups.items():
        own = dict(settings)
        errors = own.pop("errors")
        for seed in range(len(next(iter(errors.values())))):
            name = f"{group}-seed{seed}"
            write_run(folder / name, own.get("method", group), seed, {key: each[seed] for key, each in errors.items()},
                      **{key: each for key, each in own.items() if key != "method"})  # fmt: skip
            rows.append((name, group, ""))
    rows += [(name, name.rpartition("-")[0], reason) for name, reason in lost.items()]
    return write_table(folder, rows)
