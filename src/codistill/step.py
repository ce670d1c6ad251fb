"""One training step: plain PyTorch."""

import torch
from jaxtyping import Float
from torch import Tensor

from codistill.data.augment import Augmentation, Batch, DeviceImages
from codistill.device import autocast
from codistill.methods import Method
from codistill.metrics import TermSums


class PlainStep:
    """Gather, augment, forward, losses, one backward, one optimiser step; no host read.

    Args:
        method: What is trained, in training mode and on the device of the images.
        images: The training split.
        augmentation: Crops and flips; the same as the batches were drawn with.
        optimizer: Over `Method.parameter_groups`.
        precision: float32, or bf16 for autocast in the forward pass; losses are computed in float32 in any case.
    """

    def __init__(
        self,
        method: Method,
        images: DeviceImages,
        augmentation: Augmentation,
        optimizer: torch.optim.Optimizer,
        precision: str = "float32",
    ) -> None:
        self.method = method
        self.images = images
        self.augmentation = augmentation
        self.optimizer = optimizer
        self.precision = precision
        self.sums = TermSums(images.labels.device)

    def __call__(self, batch: Batch, progress: Float[Tensor, ""]) -> None:
        """Train on a batch and add its loss terms to `sums`."""
        images, labels = self.images.augmented(batch, self.augmentation)
        with autocast(labels.device, self.precision):
            outputs = self.method(images)
        terms = self.method.losses(outputs, labels, progress)
        total = torch.stack(list(terms.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()
        self.sums.update(terms, len(labels))
