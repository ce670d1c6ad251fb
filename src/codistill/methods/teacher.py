"""A frozen teacher beside the students of a method."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Images, Outputs
from codistill.methods.losses import (
    KLForm,
    Labels,
    Logits,
    Terms,
    check_teaching,
    cross_entropy,
    mixture_logits,
    students_kl,
)
from codistill.networks import Network

TEACHER_TERM = "kl/teacher->student0"


@dataclass(frozen=True)
class Teacher:
    """A frozen network that all students learn from; no module, so that neither parameters nor state contain it.

    Parts of it may be trained (`trained`): then `Method.teacher_parts` holds their parameters.
    """

    network: nn.Module
    weight: float
    temperature: float
    kl: KLForm = "kl"
    kl_weights: Sequence[float] = ()
    trained: bool = False
    """Whether some of its parameters learn from the labels."""
    top1_error: float | None = None
    """Its error on the test set of the run, percent, known once the run begins."""

    def __post_init__(self) -> None:
        check_teaching(self.temperature, self.weight, self.kl, self.kl_weights)

    def logits(self, images: Images) -> Float[Tensor, "*view batch class"]:
        """Compute its logits for the students' normalised images, with gradients for what is trained of it."""
        with self._gradients():
            logits: Tensor = self.network(images.flatten(0, -4))
        return logits.reshape(*images.shape[:-3], -1)

    def maps_and_logits(self, images: Images) -> tuple[tuple[Tensor, ...], Float[Tensor, "*view batch class"]]:
        """Compute the maps of its stages, [*view, batch, channels, height, width], and its logits, likewise."""
        prepare, network = staged(self.network)
        views = images.shape[:-3]
        with self._gradients():
            maps = [prepare(images.flatten(0, -4))]
            for stage in network.stages:
                maps.append(stage(maps[-1]))
            logits = network.head(maps[-1])
        return tuple(each.reshape(*views, *each.shape[1:]) for each in maps[1:]), logits.reshape(*views, -1)

    def _gradients(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.trained and torch.is_grad_enabled())

    def label_terms(self, outputs: Outputs, labels: Labels) -> Terms:
        """Compute `ce/teacher`, the mean over the students' views, where a part of it is trained."""
        return {"ce/teacher": cross_entropy(outputs.taught, labels).mean()} if self.trained else {}

    def terms(self, outputs: Outputs, labels: Labels) -> Terms:
        """Compute `kl/teacher->student<j>`, b T^2 KL(softmax(z_t / T) || softmax(z_j / T)), of each student."""
        how = self.temperature, self.weight, self.kl, self.kl_weights
        return students_kl("teacher", outputs.logits, outputs.taught, labels, *how)


class TeacherEnsemble(nn.Module):
    """Several teachers as one: its softened predictions are the mean of theirs.

    Args:
        teachers: Networks that take the same images and return logits of the same classes.
        temperature: T at which their probabilities are averaged.

    Source: You et al., "Learning from Multiple Teacher Networks", KDD 2017.
    """

    def __init__(self, teachers: Sequence[nn.Module], temperature: float) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.temperature = temperature

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Logits:
        """Return logits whose softmax at T is the mean of the teachers'."""
        return mixture_logits([teacher(images) for teacher in self.teachers], self.temperature)


def staged(teacher: nn.Module) -> tuple[nn.Module, Network]:
    """Split a teacher into what prepares the students' images for it, and the network whose stages have maps.

    Raises:
        UsageError: It is no network with stages, as an ensemble is not.
    """
    if isinstance(teacher, TeacherEnsemble):
        raise UsageError(f"there are {len(teacher.teachers)} teachers, but this method needs the maps of one: name one")
    prepare: nn.Module = nn.Identity()
    if isinstance(teacher, nn.Sequential) and len(teacher) == 2:  # from a run with statistics of its own
        prepare, teacher = teacher
    if not isinstance(teacher, Network):
        raise UsageError(
            f"the teacher is a {type(teacher).__name__} without stages, but this method needs their maps: name a "
            "student of the run with --teacher-predictor, or a Network"
        )
    return prepare, teacher
