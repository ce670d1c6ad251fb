"""Rehearse a user's own method on some images before anything is written: its mistakes are named in one line."""

import numpy as np
import torch
from torch import Tensor

from codistill.core.errors import UsageError
from codistill.data.augment import DeviceImages
from codistill.data.dataset import Dataset, Split
from codistill.data.mixing import soft_labels
from codistill.methods import Method
from codistill.methods.cohort import Outputs
from codistill.methods.mistakes import blamed, in_order, is_own, refuse_dead_terms, title
from codistill.networks.probe import probing

IMAGES = 16


def rehearse(method: Method, data: Dataset, epochs: int, device: torch.device, softened: bool = False) -> None:
    """Call everything that a user's own method defines, on a copy, with the progress of the first and the last epoch.

    `softened` says whether labels will be shares of classes. The method, its statistics and all random numbers stay as
    they are. Methods of this package are not rehearsed.

    Raises:
        UsageError: What it raises, returns, or names otherwise in another epoch; terms that teach nothing.
    """
    kind = type(method)
    if not is_own(kind):
        return
    # From everywhere: data may be in the order of classes.
    chosen = np.unique(np.linspace(0, len(data.train) - 1, IMAGES).astype(int))
    few = DeviceImages(Split(data.train.images[chosen], data.train.labels[chosen]), data.statistics, device)
    pixels, labels = few.batch(0, len(chosen))
    pixels = pixels.contiguous()  # as in a plain loop: a network may need it
    with probing(method, device) as probe, torch.enable_grad():
        probe.train()
        names: tuple[str, ...] = ()
        with blamed(kind, "initial_epochs"):
            initial = probe.initial_epochs(epochs)
        progresses = {0.0: initial > 0, initial / epochs: False, (epochs - 1) / epochs: False}
        for progress, probe.initialising in progresses.items():
            try:
                with blamed(kind, "forward"):
                    outputs = probe(pixels.expand(probe.views, *pixels.shape) if probe.views > 1 else pixels)
            except UsageError:
                if (kind.forward, kind.branches) == (Method.forward, Method.branches):
                    return  # a network's fault, for which the trial has better words
                raise
            now = torch.tensor(progress, device=device)
            with blamed(kind, "losses"):
                terms = in_order(kind, probe.losses(outputs, labels, now), names)
            if softened:
                terms = soft_terms(probe, outputs, soft_labels(labels, data.num_classes), now)
            refuse_dead_terms(probe, terms)
            with blamed(kind, "the backward pass of its losses"):
                torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            names = () if probe.initialising else tuple(terms)
        for part in ("parameter_groups", "alternating_updates", "after_step", "after_epoch", "between_epochs"):
            with blamed(kind, part):
                getattr(probe, part)()
        with torch.no_grad():
            probe.eval()
            with blamed(kind, "predictions"):
                named = set(probe.predictions(probe(pixels)))
            with blamed(kind, "predictors"):
                deployed = set(probe.predictors())
    if odd := sorted(named ^ deployed):
        where = "predictions" if odd[0] in named else "predictors"
        raise UsageError(f"{title(kind)}: only {where} names {odd[0]!r}: predictions and predictors name the same")


def soft_terms(method: Method, outputs: Outputs, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
    """Return the terms of an own method's loss where labels are shares of classes, or refuse it."""
    try:
        with blamed(type(method), "losses"):
            return method.losses(outputs, labels, progress)
    except UsageError as error:
        raise UsageError(
            f"{title(type(method))}: its losses need class indices, but mixup, cutmix, label_smoothing and "
            "class_weights make labels shares of classes: use cross_entropy of codistill.methods.losses or of torch, "
            f"which take both ({error})"
        ) from error
