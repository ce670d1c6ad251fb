"""summary.json: method and networks of a run, how it ended, and its results."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from codistill.core.errors import DivergedError
from codistill.core.files import write_json
from codistill.evaluation.analysis import wilson_interval
from codistill.evaluation.metrics import AVERAGED
from codistill.methods import Method
from codistill.networks.network import parameter_count
from codistill.networks.probe import label
from codistill.runs.choice import ERRORS, chosen_by, lowest_student, top1_errors
from codistill.runs.folder import RunFolder
from codistill.settings.config import RunConfig


def run_facts(config: RunConfig, method: Method) -> dict[str, Any]:
    """Return the part of summary.json that is known before training."""
    counts = {name: parameter_count(each) for name, each in method.predictors().items()}
    if config.train.ema_decay:
        counts |= {name + AVERAGED: count for name, count in counts.items()}
    return {
        "method": config.method_name,
        "networks": list(map(label, method.cohort)),
        "data": config.data,
        "seed": config.train.seed,
        "epochs": config.train.epochs,
        "parameters": counts,
        **({"teacher_top1_error": method.taught_by.top1_error} if method.taught_by else {}),
    }


def summarise(
    run: RunFolder,
    config: RunConfig,
    method: Method,
    rows: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    seconds: float,
    execution: Mapping[str, Any],
    images: Mapping[str, int],
) -> dict[str, Any]:
    """Return the contents of the summary.json of a finished run.

    `rows` are the lines of metrics.jsonl, `best` is that of the best epoch; `images` counts those of each split.
    """
    trained, by = sum(row["seconds"] for row in rows), chosen_by(rows[-1])
    # Keys without a split are of the test set.
    errors: dict[str, Any] = {}
    for split in ("test", by):
        last, key = top1_errors(rows[-1], split), ERRORS[split]
        errors |= {key: last, f"best_epoch_{key}": top1_errors(best, split)}
        errors[f"{key}_interval"] = {
            name: list(wilson_interval(round(error / 100 * images[split]), images[split]))
            for name, error in last.items()
        }
        balanced = {name: each["balanced_error"] for name, each in rows[-1][split].items()}
        errors[key.replace("top1", "balanced")] = balanced
    return {
        "status": "finished",
        **({"stopped_early": len(rows)} if len(rows) < config.train.epochs else {}),
        **run_facts(config, method),
        **errors,
        "best_epoch": best["epoch"] + 1,
        "best_epoch_chosen_on": by,
        "best_student": lowest_student(rows[-1])[0],
        "best_epoch_best_student": lowest_student(best)[0],
        "chosen_by": by,
        **{f"{split}_images": count for split, count in images.items()},
        **{split: rows[-1][split] for split in images},
        "diversity": rows[-1]["diversity"],
        "warnings": [f"epoch {row['epoch'] + 1}: {each}" for row in rows for each in row["warnings"]],
        # A loop of one's own may not know its time.
        "images_per_second": sum(row["images_per_second"] * row["seconds"] for row in rows) / (trained or 1),
        "train_seconds": trained,
        "wall_seconds": seconds,
        "execution": dict(execution),
        "environment": run.metadata["environment"],
    }


def write_summary_of_failure(run: RunFolder, config: RunConfig, method: Method, error: BaseException) -> None:
    """Write the summary.json of a run that did not finish; one that already says how the run ended stays."""
    if run.status in ("finished", "diverged"):
        return
    # Ctrl-C and SIGTERM are no subclasses of Exception.
    failed = "failed" if isinstance(error, Exception) else "interrupted"
    status = "diverged" if isinstance(error, DivergedError) else failed
    facts = {"status": status, "error": " ".join(str(error).split()), **run_facts(config, method)}
    with contextlib.suppress(OSError):  # the error says already that the disk is full
        write_json(run.path / "summary.json", facts)
