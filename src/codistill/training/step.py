"""One training step in plain PyTorch: of all parameters at once, or of one student after the other."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.data.augment import Augmentation, BatchIndices, DeviceImages
from codistill.evaluation.metrics import TermSums
from codistill.methods import Method
from codistill.methods.mistakes import blamed, in_order
from codistill.settings.config import TrainSettings
from codistill.training.average import WeightAverage
from codistill.training.finite import GRADIENT, NonFiniteDetector, norms
from codistill.training.forward import TrainingForward
from codistill.training.optim import clip, make_optimizer
from codistill.training.ranks import ALONE, Ranks


class TrainStep:
    """Gather, augment, forward, losses, backward, clipping, optimiser step, moving average; no host read.

    The method is in training mode and on the device of the images, batches are drawn with the same augmentation, and
    losses are computed in float32. Each of several ranks gets the whole batch, works on its part, and ends with the
    gradients and terms of the whole batch; batch statistics are those of its part.
    """

    def __init__(
        self,
        method: Method,
        images: DeviceImages,
        augmentation: Augmentation,
        optimizer: torch.optim.Optimizer,
        forward: TrainingForward,
        ranks: Ranks = ALONE,
        average: WeightAverage | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.method = method
        self.average = average
        self.clip_norm = clip_norm
        self.images = images
        self.device = images.device
        self.augmentation = augmentation
        images.tables(augmentation)  # here and not on the stream of whichever run comes first
        self.optimizer = optimizer
        self.forward = forward
        self.ranks = ranks
        self.sums = TermSums(self.device)
        self.finite = NonFiniteDetector(self.device)
        names = {id(parameter): name for name, parameter in method.named_parameters()}
        self._trained = {names[id(each)]: each for group in optimizer.param_groups for each in group["params"]}
        # A step may skip layers, as stochastic depth does: their parameters have no gradient, and none is not finite.
        self._skipped = dict.fromkeys((GRADIENT + name for name in self._trained), torch.zeros((), device=self.device))

    def __call__(self, indices: BatchIndices, progress: Float[Tensor, ""]) -> None:
        """Train on a batch, add its loss terms to `sums`, and have `finite` look at them and at all gradients."""
        # The partner of an image may be in another rank's part.
        partners = self.ranks.part(indices.partners()) if self.augmentation.mixes and self.ranks.count > 1 else None
        images, labels = self.images.augmented(self.ranks.part(indices), self.augmentation, partners)
        size = indices.image.shape[-1]
        terms, gradients = self.update(images, labels, progress, len(labels) / size)
        with blamed(type(self.method), "after_step"):
            self.method.after_step()
        if self.average is not None:
            self.average.update()
        self.sums.update(terms, size)
        self.finite.update(terms | self._skipped | gradients)

    def update(
        self, images: Tensor, labels: Tensor, progress: Tensor, share: float, of: Sequence[nn.Parameter] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update all parameters, or those given, on this rank's share of a batch.

        Returns:
            The terms and the norm of each gradient, of the whole batch.
        """
        outputs, kind = self.forward(images), type(self.method)
        if self.method.initialising:
            of = self.method.initial_parameters()
        if of is not None:  # frozen ones stay
            of = [each for each in of if each.requires_grad]
        with blamed(kind, "losses"):
            terms = in_order(kind, self.method.losses(outputs, labels, progress), self.sums.names)
        with blamed(kind, "the backward pass of its losses"):
            torch.stack(list(terms.values())).sum().backward(inputs=of)  # type: ignore[no-untyped-call]
        trained = self._trained.items()
        if self.ranks.count > 1:  # another rank may have passed what this one has skipped
            for each in self._trained.values() if of is None else of:
                if each.requires_grad and each.grad is None:
                    each.grad = torch.zeros_like(each)
        gradients = {GRADIENT + name: each.grad for name, each in trained if each.grad is not None}
        self.ranks.average([*gradients.values(), *terms.values()], share)
        sizes = norms(gradients)
        if self.clip_norm is not None:
            clip(list(gradients.values()), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return terms, sizes


class AlternatingStep(TrainStep):
    """Update one group of parameters after the other, each from a fresh forward pass of the same batch.

    For methods with `Method.alternating_updates`; the terms that are summed up are those of the last pass.
    """

    def update(
        self, images: Tensor, labels: Tensor, progress: Tensor, share: float, of: Sequence[nn.Parameter] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update each group, or what the initialisation trains at once; see `TrainStep.update`."""
        if self.method.initialising:
            return super().update(images, labels, progress, share)
        terms: dict[str, Tensor] = {}
        sizes: dict[str, Tensor] = {}
        for parameters in self.method.alternating_updates():
            terms, more = super().update(images, labels, progress, share, parameters)
            sizes |= more
        return terms, sizes


def make_step(
    method: Method,
    images: DeviceImages,
    augmentation: Augmentation,
    settings: TrainSettings,
    precision: str = "float32",
    ranks: Ranks = ALONE,
    memory_format: torch.memory_format | None = None,
) -> TrainStep:
    """Put a method on the device of its images, in place and in training mode, and make its optimiser and its step.

    `memory_format` of the weights; None: the method's own.
    """
    method.to(images.device, memory_format=memory_format or method.memory_format).train()  # type: ignore[call-overload]
    turns = method.alternating_updates()
    forward = TrainingForward(method, precision, apart=turns)
    kind = AlternatingStep if turns else TrainStep
    average = WeightAverage(method, settings.ema_decay) if settings.ema_decay else None
    optimizer = make_optimizer(method, settings)
    return kind(method, images, augmentation, optimizer, forward, ranks, average, settings.clip_norm)
