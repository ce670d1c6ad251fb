"""The best predictor of a run under a budget of milliseconds, and why."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from codistill.core.errors import UsageError
from codistill.data.dataset import Pixels
from codistill.deploy.latency import known_latency, measure_latency
from codistill.runs.choice import ERRORS, prefix_of
from codistill.runs.folder import RunFolder
from codistill.runs.latency import Runtime

BEST = "best"
NEAREST = 3  # predictors that a refusal names


def choose_predictor(
    run: RunFolder,
    predictor: str = BEST,
    which: str = "last",
    max_latency_ms: float | None = None,
    runtime: Runtime = "onnx",
    training_images: Callable[[], Pixels] | None = None,
) -> tuple[str, str]:
    """Choose the predictor with the lowest error of those that answer within a budget, and say why in a line.

    Errors are those on validation images if the run has them, else on test images. Ensemble and fused classifier are
    candidates, too. Latencies are those of RUN/latency.json if they were measured on this machine; else they are
    measured now, and written there.

    Args:
        run: A finished run.
        predictor: `best`, or the only candidate.
        which: The `last` or the `best` checkpoint.
        max_latency_ms: Milliseconds for one image on this CPU with one thread, above 0; None: no budget.
        runtime: What the file runs in.
        training_images: Returns the images that onnx-int8 is calibrated on; called where it has to be measured.

    Raises:
        UsageError: The run did not finish, it has no such predictor, or none is within the budget: the line names the
            nearest.
    """
    budget = max_latency_ms
    if budget is not None and not 0 < budget < math.inf:
        raise UsageError(f"--max-latency-ms is {budget:g}; it must be a number of milliseconds above 0")
    if not run.finished:
        raise UsageError(f"{run.path}: only of a finished run it is known which predictor is best: name one")
    split, errors = errors_of(run.summary, which)
    names = list(errors) if predictor == BEST else [predictor]
    if unknown := [name for name in names if name not in errors]:
        raise UsageError(f"{run.path} has no predictor {unknown[0]!r}: choose from {', '.join(errors)}, or {BEST}")
    times: Mapping[str, float] = {}
    if budget is not None:
        found = known_latency(run, runtime)
        if found is None:
            int8 = runtime == "onnx-int8"
            runtimes: list[Runtime] = ["torch", "onnx", "onnx-int8"] if int8 else ["torch", "onnx"]
            found = measure_latency(run, runtimes, which, training_images() if training_images and int8 else None)
        times = found.milliseconds(runtime)
    within = [name for name in names if budget is None or times.get(name, math.inf) <= budget]
    if not within:
        assert budget is not None
        nearest = sorted(names, key=lambda name: times.get(name, math.inf))[:NEAREST]
        listed = ", ".join(f"{name} {times[name]:.3g} ms ({errors[name]:.2f} %)" for name in nearest if name in times)
        raise UsageError(
            f"{run.path}: no predictor answers within {budget:g} ms ({_way(runtime)}); nearest, with their {split} "
            f"errors: {listed or 'none could be measured'}: allow more, or train smaller networks"
        )
    # Of equal ones the faster, NaN last.
    name = min(within, key=lambda each: (math.isnan(errors[each]), errors[each], times.get(each, 0.0)))
    return name, _why(run.summary, which, name, split, errors, times, budget, runtime, len(within), len(names))


def errors_of(summary: Mapping[str, Any], which: str = "last") -> tuple[str, dict[str, float]]:
    """Return on which split predictors of a finished run are compared, and the top-1 error of each there, percent."""
    prefix = prefix_of(which)
    split = "validation" if prefix + ERRORS["validation"] in summary else "test"
    return split, dict(summary[prefix + ERRORS[split]])


def _way(runtime: str) -> str:
    shown = {"torch": "torch", "onnx": "ONNX Runtime", "onnx-int8": "ONNX Runtime, int8"}[runtime]
    return f"one image, {shown}, one thread of this CPU"


def _why(
    summary: Mapping[str, Any],
    which: str,
    name: str,
    split: str,
    errors: Mapping[str, float],
    times: Mapping[str, float],
    budget: float | None,
    runtime: str,
    within: int,
    candidates: int,
) -> str:
    """Return in a line why a predictor was chosen, and what it was chosen on."""
    among = f"of {candidates} predictors"
    if budget is not None:
        among = f"of {within} of {candidates} predictors within {budget:g} ms ({_way(runtime)})"
    took = f" in {times[name]:.3g} ms" if name in times else ""
    start = f"best: {name}{took}, with the lowest {split} error {among}: {errors[name]:.2f} %"
    better = [other for other in errors if errors[other] < errors[name] and other in times]
    slower = min(better, key=lambda other: errors[other], default="")
    more = f"; {slower} has {errors[slower]:.2f} %, and takes {times[slower]:.3g} ms" if slower else ""
    if split == "test":
        return f"{start}, which is too optimistic: --validation N chooses on held-out training images{more}"
    prefix = prefix_of(which)
    images, test = summary["validation_images"], summary[prefix + ERRORS["test"]][name]
    return f"{start} of {images} images; its test error: {test:.2f} %{more}"
