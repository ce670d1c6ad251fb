"""A frozen teacher beside the students of any method that allows one."""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.losses import soft_target_kl
from codistill.methods.method import Method, ParameterGroup


class WithTeacher(Method):
    """A method whose students also learn from a frozen teacher.

    Adds to the method's terms, for each student, weight * T^2 KL(softmax(z_t / T) || softmax(z_j / T)). The teacher
    runs in evaluation mode without gradients, and belongs neither to the parameters nor to the checkpoints.

    Args:
        method: Its students, its losses; everything but the teacher's terms is its own.
        teacher: Maps the students' normalised images to logits of the same classes.
        weight: Factor on the terms.
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
        self.method = method
        self.weight = weight
        self.temperature = temperature
        # In a tuple, so that it is neither a parameter nor in the state; `_apply` moves it.
        self._frozen = (teacher.eval().requires_grad_(False),)
        self.name = method.name  # type: ignore[misc]
        self.capturable = method.capturable  # type: ignore[misc]
        self.settings, self.num_classes, self.image_size = method.settings, method.num_classes, method.image_size
        self.cohort = method.cohort

    def _apply(self, *arguments: Any, **options: Any) -> "WithTeacher":
        self._frozen[0]._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    @property
    def views(self) -> int:
        """See `Method.views`."""
        return self.method.views

    @property
    def parallel_branches(self) -> bool:
        """See `Method.parallel_branches`."""
        return self.method.parallel_branches

    def alternating_updates(self) -> Any:
        """See `Method.alternating_updates`."""
        return self.method.alternating_updates()

    def forward(self, images: Float[Tensor, "*view batch channel height width"]) -> Outputs:
        """Run the method and, in training, the teacher."""
        outputs: Outputs = self.method(images)
        if not self.training:
            return outputs
        with torch.no_grad():
            logits = self._frozen[0](images.flatten(0, -4))
        logits = logits.reshape(*images.shape[:-3], -1)
        return Outputs(outputs.logits, outputs.feature_maps, outputs.fused_logits, logits, outputs.extras)

    def losses(
        self, outputs: Outputs, labels: Int[Tensor, " batch"], progress: Float[Tensor, ""]
    ) -> dict[str, Float[Tensor, ""]]:
        """Give the method's terms and `kl/teacher->student<j>`; see `Method.losses`."""
        terms = dict(self.method.losses(outputs, labels, progress))
        given = outputs.teacher_logits
        if given is None:
            raise ValueError("the outputs have no teacher logits: they were computed in evaluation mode")
        learning = torch.stack(list(outputs.logits))
        divergences = self.weight * soft_target_kl(learning, given.expand_as(learning), self.temperature)
        return terms | {f"kl/teacher->student{index}": each for index, each in enumerate(divergences.unbind())}

    def parameter_groups(self) -> list[ParameterGroup]:
        """See `Method.parameter_groups`."""
        return self.method.parameter_groups()

    def predictions(self, outputs: Outputs) -> dict[str, Float[Tensor, "batch class"]]:
        """See `Method.predictions`."""
        return self.method.predictions(outputs)

    def predictors(self) -> dict[str, nn.Module]:
        """See `Method.predictors`."""
        return self.method.predictors()

    def after_step(self) -> None:
        """See `Method.after_step`."""
        self.method.after_step()

    def after_epoch(self) -> None:
        """See `Method.after_epoch`."""
        self.method.after_epoch()

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Give the method's state: a run is read back without its teacher."""
        return self.method.state_dict(*arguments, **options)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Load the method's state."""
        return self.method.load_state_dict(*arguments, **options)


class Renormalised(nn.Module):
    """A network that is given images in another data set's normalisation.

    Args:
        network: Maps images normalised with (mean, std) to logits.
        given: Mean and standard deviation that the images come with, in units of the full range (0..1).
        wanted: Those that the network was trained with.
    """

    def __init__(self, network: nn.Module, given: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
        super().__init__()
        self.network = network
        (mean, std), (own_mean, own_std) = (
            tuple(torch.tensor(list(each), dtype=torch.float64).reshape(1, 3, 1, 1) for each in pair)
            for pair in (given, wanted)
        )
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch class"]:
        """Map images to logits."""
        logits: Tensor = self.network(images * self.scale + self.shift)
        return logits
