"""A frozen teacher beside the students of any method that allows one."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.kd import teacher_terms
from codistill.methods.method import Method, ParameterGroup


class WithTeacher(Method):
    """A method whose students also learn from a frozen teacher.

    Adds the terms of `kd.teacher_terms` to the method's own. The teacher runs in evaluation mode without gradients,
    and belongs neither to the parameters nor to the checkpoints. All else is the method's.

    Args:
        method: Students and their losses.
        teacher: Maps the students' normalised images to logits of the same classes.
        weight: Factor on the teacher's terms, at least 0.
        temperature: T > 0.

    Raises:
        UsageError: The teacher has another number of classes.

    Source: Hinton et al., arXiv 1503.02531.
    """

    def __init__(self, method: Method, teacher: nn.Module, weight: float = 1.0, temperature: float = 3.0) -> None:
        nn.Module.__init__(self)
        probe = copy.deepcopy(teacher).to("meta").eval()
        classes = probe(torch.empty(1, 3, *method.image_size, device="meta")).shape[-1]
        if classes != method.num_classes:
            raise UsageError(f"the teacher has {classes} classes, but the students {method.num_classes}")
        self.method, self.weight, self.temperature = method, weight, temperature
        # In a tuple, so that it is neither a parameter nor in the state; `_apply` moves it.
        self._frozen = (teacher.eval().requires_grad_(False),)
        self.name, self.settings, self.cohort = method.name, method.settings, method.cohort
        self.num_classes, self.image_size, self.capturable = method.num_classes, method.image_size, method.capturable

    def _apply(self, *arguments: Any, **options: Any) -> "WithTeacher":
        self._frozen[0]._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    def forward(self, images: Float[Tensor, "*view batch channel height width"]) -> Outputs:
        """Run the method and, in training, the teacher."""
        outputs: Outputs = self.method(images)
        if not self.training:
            return outputs
        with torch.no_grad():
            logits = self._frozen[0](images.flatten(0, -4))
        return dataclasses.replace(outputs, teacher_logits=logits.reshape(*images.shape[:-3], -1))

    def losses(
        self, outputs: Outputs, labels: Int[Tensor, " batch"], progress: Float[Tensor, ""]
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute the method's terms and `kl/teacher->student<j>`; see `Method.losses`."""
        terms = self.method.losses(outputs, labels, progress)
        return {**terms, **teacher_terms(outputs, self.weight, self.temperature)}

    # Everything from here on is the method's.

    @property
    def views(self) -> int:  # noqa: D102
        return self.method.views

    @property
    def parallel_branches(self) -> bool:  # noqa: D102
        return self.method.parallel_branches

    def alternating_updates(self) -> Sequence[Sequence[nn.Parameter]]:  # noqa: D102
        return self.method.alternating_updates()

    def parameter_groups(self) -> list[ParameterGroup]:  # noqa: D102
        return self.method.parameter_groups()

    def predictions(self, outputs: Outputs) -> dict[str, Float[Tensor, "batch class"]]:  # noqa: D102
        return self.method.predictions(outputs)

    def predictors(self) -> dict[str, nn.Module]:  # noqa: D102
        return self.method.predictors()

    def after_step(self) -> None:  # noqa: D102
        self.method.after_step()

    def after_epoch(self) -> None:  # noqa: D102
        self.method.after_epoch()

    def state_dict(self, *arguments: Any, **options: Any) -> Any:  # noqa: D102
        return self.method.state_dict(*arguments, **options)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:  # noqa: D102
        return self.method.load_state_dict(*arguments, **options)
