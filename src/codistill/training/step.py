"""One training step: plain PyTorch, and the same captured as a CUDA graph, for one run or several at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from codistill.data.augment import Augmentation, BatchIndices, DeviceImages
from codistill.evaluation.metrics import TermSums
from codistill.methods import Method
from codistill.training.compiling import PLAIN, Execution
from codistill.training.finite import GRADIENT, NonFiniteDetector, norms, parameter_names
from codistill.training.forward import TrainingForward
from codistill.training.ranks import ALONE, Ranks


class TrainStep:
    """Gather, augment, forward, losses, one backward, one optimiser step; no host read.

    Args:
        method: What is trained, in training mode and on the device of the images.
        images: The training split.
        augmentation: Crops and flips; the same as the batches were drawn with.
        optimizer: Over `Method.parameter_groups`.
        precision: float32, or bf16 for autocast in the forward pass; losses are computed in float32 in any case.
        ranks: The processes that share the run. Each gets the whole batch, works on its part, and ends with the
            gradients and terms of the whole batch; batch statistics are those of its part.
        execution: How the method was prepared to compute; overlap is for captured steps.
    """

    def __init__(
        self,
        method: Method,
        images: DeviceImages,
        augmentation: Augmentation,
        optimizer: torch.optim.Optimizer,
        precision: str = "float32",
        ranks: Ranks = ALONE,
        execution: Execution = PLAIN,
    ) -> None:
        self.method = method
        self.execution = execution
        self.images = images
        self.augmentation = augmentation
        images.crops(augmentation)  # here and not on the stream of whichever run comes first
        self.optimizer = optimizer
        self.forward = TrainingForward(method, precision)
        self.ranks = ranks
        self.sums = TermSums(images.labels.device)
        self.finite = NonFiniteDetector(images.labels.device)
        self._names = parameter_names(method)

    def __call__(self, batch: BatchIndices, progress: Float[Tensor, ""]) -> None:
        """Train on a batch, add its loss terms to `sums` and let `watch` look at them and at all gradients."""
        count = batch.image.shape[-1]
        batch = self.ranks.part(batch)
        own = batch.image.shape[-1]
        flat = BatchIndices(*(table.flatten() for table in batch))
        images, labels = self.images.augmented(flat, self.augmentation)
        images, labels = images.reshape(*batch.image.shape, *images.shape[1:]), labels[:own]
        turns: Sequence[Sequence[Tensor] | None] = self.method.alternating_updates() or [None]
        names: list[str] = []
        sizes: list[Tensor] = []
        for parameters in turns:
            terms = self.terms(images, labels, progress)
            total = torch.stack(list(terms.values())).sum()
            total.backward(inputs=parameters)  # type: ignore[no-untyped-call]
            trained = [each for group in self.optimizer.param_groups for each in group["params"]]
            gradients = [(GRADIENT + self._names[id(each)], each.grad) for each in trained if each.grad is not None]
            self.ranks.average([*(gradient for _, gradient in gradients), *terms.values()], own / count)
            names += [name for name, _ in gradients]
            sizes += norms([gradient for _, gradient in gradients])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step()
        self.sums.update(terms, count)
        self.finite.update([*terms, *names], torch.stack([term.detach().float() for term in terms.values()] + sizes))

    def overlap(self) -> None:
        """Let the branches run at the same time from now on, on streams of their own; for a step that is captured."""
        if self.method.parallel_branches:
            self.method.cohort.run_branches_on_streams(self.images.labels.device)

    def terms(self, images: Tensor, labels: Tensor, progress: Tensor) -> dict[str, Tensor]:
        """Run the method and compute its losses."""
        outputs = self.forward(images)
        return self.method.losses(outputs, labels, progress)
