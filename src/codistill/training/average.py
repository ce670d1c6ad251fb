"""The moving average of a run's weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from codistill.methods import Method
from codistill.networks.probe import copied
from codistill.runs.state import load_weights, tensors_once
from codistill.training.finite import infinite


class WeightAverage:
    """Exponential moving average of the weights and batch statistics of a method, on its device.

    After step s = 1, 2, .. of the optimiser every floating-point value v enters its average a, which is that of the
    initial weights before: a <- a + (1 - d) (v - a), d = min(decay, (1 + s) / (10 + s)). The first steps thus count
    less, and the average follows a short training, too. Running statistics of batch normalisation are averaged with the
    same d, as in timm and torchvision; whole numbers, and tensors that were infinite at the start (masks), are those of
    the method.

    Attributes:
        method: The average, as a method in evaluation mode without a teacher.

    Source: Polyak and Juditsky, 1992; d as in TensorFlow's ExponentialMovingAverage with num_updates.
    """

    def __init__(self, method: Method, decay: float) -> None:
        held = method.taught_by, method.cohort.streams
        method.taught_by, method.cohort.streams = None, []  # the average needs neither
        try:
            self.method = copied(method).eval().requires_grad_(False)
        finally:
            method.taught_by, method.cohort.streams = held
        self._decay = decay
        averages, self._trained = tensors_once(self.method), method
        masks = infinite(method)
        self._names = [name for name, each in averages.items() if each.is_floating_point() and name not in masks]
        self._others = [name for name in averages if name not in self._names]
        self._averages, self._copies = ([averages[name] for name in names] for names in (self._names, self._others))
        self._steps = torch.zeros((), device=self._averages[0].device)

    @torch.no_grad()
    def update(self) -> None:
        """Have the weights after a step enter the average; no host read."""
        self._steps += 1
        share = 1 - ((1 + self._steps) / (10 + self._steps)).clamp(max=self._decay)
        # Not lerp, which takes only a share that the host knows, and could not change in a captured step.
        values = tensors_once(self._trained)  # of now: a layer may assign a buffer
        difference = torch._foreach_sub([values[name] for name in self._names], self._averages)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(self._averages, difference)
        if self._others:
            torch._foreach_copy_(self._copies, [values[name] for name in self._others])

    def state(self) -> dict[str, Tensor]:
        """Return the averages by name, for a checkpoint."""
        return dict(zip(self._names, self._averages, strict=True))

    def load(self, method: Mapping[str, Tensor], averages: Mapping[str, Tensor], steps: int, what: str) -> None:
        """Continue after so many steps from a checkpoint's tensors of the method and averages; see `load_weights`."""
        load_weights(self.method, {**method, **averages}, what)
        self._steps.fill_(steps)
