"""SwitOKD: mutual learning in which the better of two networks pauses while the gap between them is too wide."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from codistill.methods.cohort import Outputs
from codistill.methods.losses import Labels, Logits, Scalar, Terms, at_least_float32, label_shares
from codistill.methods.method import METHODS, Method, ParameterGroup
from codistill.methods.terms import DistillationSettings, cross_entropy_terms, ramped_kl


class Gap(NamedTuple):
    """Distances of a batch, each a mean over its images of a sum over the classes.

    Attributes:
        student: s = ||p_s - y||_1, from the student's probabilities to the labels.
        teacher: t = ||p_t - y||_1.
        between: G = ||p_s - p_t||_1, of probabilities softened by T.
        ratio: epsilon = exp(-t / (s + t)).
        threshold: delta = s - epsilon t.
    """

    student: Scalar
    teacher: Scalar
    between: Scalar
    ratio: Scalar
    threshold: Scalar

    @property
    def expert(self) -> Tensor:
        """Whether the teacher is the better one and too far ahead, as one truth value on the device."""
        return (self.between > self.threshold) & (self.teacher < self.student)


@torch.no_grad()
def gap(student: Logits, teacher: Logits, labels: Labels, temperature: float) -> Gap:
    """Measure how far two networks are from the labels, and from each other."""
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    shares = label_shares(labels, student)

    def distance(first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().sum(dim=1).mean()

    s, t = distance(student.softmax(dim=1), shares), distance(teacher.softmax(dim=1), shares)
    between = distance((student / temperature).softmax(dim=1), (teacher / temperature).softmax(dim=1))
    ratio = torch.exp(-t / (s + t))
    return Gap(s, t, between, ratio, s - ratio * t)


@dataclass(frozen=True, kw_only=True)
class SwitOKDSettings(DistillationSettings):
    """Settings of SwitOKD."""

    shared_stages: int | None = 0
    """Low stages that the two share, which never pause. 0: nothing, as in SwitOKD."""
    temperature: float = 1.0
    """T of the distillation terms and of the gap between the two, > 0; the authors' code has 1."""
    ramp_up: float = 0.0
    """Share of the training over which the distillation terms grow to full weight; 0: at once, as in SwitOKD."""

    @property
    def needs_full_batch(self) -> str:
        """The switch looks at means over all images; see `MethodSettings.needs_full_batch`."""
        return "its switch, which compares means over the batch,"


@METHODS.register("switokd")
class SwitOKD(Method):
    """A student and a larger network, its teacher, learn from each other; the teacher waits when it is too far ahead.

        CE(z_s) + KL(z_t -> z_s) + (1 - e) [ CE(z_t) + KL(z_s -> z_t) ],   e = 1 where G > delta and t < s, else 0

    KL(a -> b) = T^2 KL(softmax(a / T) || softmax(b / T)) with a detached; s, t, G and delta as in `Gap`. With e = 0 the
    step is one of DML, the learning mode. With e = 1, the expert mode, the teacher takes no step at all: neither one of
    the loss, nor one of momentum or weight decay. Its batch normalisation gathers statistics in both modes.

    Args:
        students: The student, which is the one to deploy, and the teacher, which trains beside it.

    Attributes:
        pause: e of the last call of `losses`, a number on the device that optimisers of a run obey.

    Source: Qian, Wang, Yin, Hong, Wang, "Switchable Online Knowledge Distillation", ECCV 2022, arXiv 2209.04996;
        authors' code hfutqian/SwitOKD at 300f729, SwitOKD_code/CIFAR-100/WRN16-2_0.5mobilenetv2/main.py.
    Differs: the authors branch on the host and skip the teacher's optimiser; here its terms are multiplied by 1 - e,
        and its parameters keep still by the same number, so that all steps are one computation.
    """

    settings: SwitOKDSettings
    family = "online"
    year = 2022
    exchanges = "logits"
    min_students = 2
    max_students = 2

    def build(self) -> None:
        """Make the number that pauses the teacher."""
        self.pause: Tensor
        self.register_buffer("pause", torch.zeros(()), persistent=False)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/` and `kl/` of both; those of the teacher, student1, are 0 while it waits."""
        student, teacher = outputs.logits
        expert = gap(student, teacher, labels, self.settings.temperature).expert
        self.pause.copy_(expert)
        pairs = {"kl/student1->student0": (student, teacher), "kl/student0->student1": (teacher, student)}
        terms = cross_entropy_terms(outputs.logits, labels)
        terms |= ramped_kl(pairs, labels, progress, self.settings, self.settings.detach_teachers)
        return {name: term * ~expert if name.endswith("student1") else term for name, term in terms.items()}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Split into what the student trains and the teacher's own parameters, which pause with it."""
        trained = tuple(self.cohort[0].parameters())
        held = {id(each) for each in trained}
        own = tuple(each for each in self.cohort[1].parameters() if id(each) not in held)
        return [ParameterGroup("students", trained), ParameterGroup("teacher", own, pause=self.pause)]
