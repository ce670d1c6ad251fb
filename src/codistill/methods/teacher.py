"""A frozen teacher beside the students of a method."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.methods.cohort import Images, Outputs
from codistill.methods.losses import Terms, students_kl

TEACHER_TERM = "kl/teacher->student0"


@dataclass(frozen=True)
class Teacher:
    """A frozen network that all students learn from; no module, so that neither parameters nor state contain it."""

    network: nn.Module
    weight: float
    temperature: float
    top1_error: float | None = None
    """Its error on the test set of the run, percent, known once the run begins."""

    def logits(self, images: Images) -> Float[Tensor, "*view batch class"]:
        """Compute its logits for the students' normalised images, without gradients."""
        with torch.no_grad():
            logits: Tensor = self.network(images.flatten(0, -4))
        return logits.reshape(*images.shape[:-3], -1)

    def terms(self, outputs: Outputs) -> Terms:
        """Compute `kl/teacher->student<j>`, b T^2 KL(softmax(z_t / T) || softmax(z_j / T)), of each student."""
        if outputs.teacher_logits is None:
            raise ValueError("the outputs have no teacher logits: they were computed in evaluation mode")
        return students_kl("teacher", outputs.logits, outputs.teacher_logits, self.temperature, self.weight)
