"""KD: knowledge distillation from a frozen teacher."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from codistill.core.errors import UsageError
from codistill.methods.cohort import Outputs
from codistill.methods.independent import IndependentSettings
from codistill.methods.losses import KLForm, Labels, Scalar, Terms, check_teaching
from codistill.methods.method import METHODS, Method
from codistill.methods.mistakes import is_own
from codistill.methods.teacher import Teacher, TeacherEnsemble, staged
from codistill.methods.terms import cross_entropy_terms, weighted
from codistill.networks.origin import DRAWN, mark
from codistill.networks.probe import count_classes, probing


def WithTeacher(
    method: Method,
    teacher: nn.Module | Sequence[nn.Module],
    weight: float = 1.0,
    temperature: float = 3.0,
    kl: KLForm = "kl",
    kl_weights: Sequence[float] = (),
    train: str | None = None,
) -> Method:
    """Attach a frozen teacher to a method, from which all its students learn too, and return the method.

    Adds `kl/teacher->student<j>`, b T^2 KL(softmax(z_t / T) || softmax(z_j / T)), to the terms of the method. The
    teacher runs in training only, in evaluation mode without gradients. It follows the method to its device, and
    belongs neither to its parameters nor to its checkpoints; modules that a method puts between students and teacher
    (`Method.connect`) are made here, and belong to both.

    Args:
        method: Changed in place.
        teacher: Maps the students' normalised images to logits z_t of the same classes; frozen in place. Of several, in
            a list, the mean of their softened predictions teaches, see `TeacherEnsemble`.
        weight: b, at least 0.
        temperature: T > 0.
        kl: Another form of the terms, as the setting `kl` of methods (docs/kl.md).
        kl_weights: Factors on the parts of that form; empty: the published ones.
        train: Regular expression that is found in the names of the teacher's parameters which learn from the labels,
            `ce/teacher`; the others stay frozen, and its batch normalisation keeps its statistics. None: all frozen.

    Raises:
        UsageError: A number or a form out of its range; the method has no use for a teacher, or has one; the teacher is
            no module or a student of the method, has another number of classes, cannot take images of that size,
            returns something else than logits, or has no stages or widths that the method can use.

    Source: Hinton et al., arXiv 1503.02531.
    """
    check_teacher(type(method), True)
    check_teaching(temperature, weight, kl, kl_weights)
    if method.taught_by is not None:
        raise UsageError("the method has a teacher: hand in all of them at once, in a list")
    several = [teacher] if isinstance(teacher, nn.Module) or not isinstance(teacher, Sequence) else list(teacher)
    if not several:
        raise UsageError("there is no teacher in the list: hand in at least one")
    for each in several:
        if not isinstance(each, nn.Module):
            raise UsageError(
                f"the teacher is a {type(each).__name__}: hand in a torch.nn.Module, as load_teacher returns"
            )
        if any(each is student for student in method.cohort):
            raise UsageError("the teacher is a student of the method, which would be frozen: hand in a copy of it")
        with probing(each) as probe, torch.no_grad():
            device = next((each.device for each in probe.parameters()), None)
            classes = count_classes(probe.eval(), torch.zeros(2, 3, *method.image_size, device=device), "the teacher")
        if classes != method.num_classes:
            raise UsageError(f"the teacher has {classes} classes, but the students {method.num_classes}")
    teacher = several[0] if len(several) == 1 else TeacherEnsemble(several, temperature)
    if method.teacher_maps:
        staged(teacher)
    method.connectors = nn.ModuleList(method.connect(teacher)).to(next(method.parameters()))
    mark(method.connectors, DRAWN)
    teacher.eval().requires_grad_(False)
    method.teacher_parts = nn.ParameterList() if train is None else parts_of(teacher, train, method)
    method.taught_by = Teacher(teacher, weight, temperature, kl, tuple(kl_weights), train is not None)
    return method


def check_teacher(method: type[Method], given: bool) -> None:
    """Refuse a teacher where none is used, and none where one is needed."""
    if given and method.teacher == "refused":
        own = ', or set teacher = "allowed" in its class' if is_own(method) else ""
        raise UsageError(f"{method.name} has no use for a teacher: leave --teacher out, or choose kd{own}")
    if not given and method.teacher == "required":
        raise UsageError(
            f"{method.name} needs a teacher: give --teacher a run folder, an exported file or a checkpoint"
        )


def parts_of(teacher: nn.Module, pattern: str, method: Method) -> nn.ParameterList:
    """Have the parameters of a frozen teacher be trained in whose names a regular expression is found; return them.

    Raises:
        UsageError: It is none, or found in no name, or the teacher or the updates are such that none can be trained.
    """
    if isinstance(teacher, TeacherEnsemble):
        raise UsageError(f"teacher_train is {pattern!r}, but there are {len(teacher.teachers)} teachers: name one")
    if method.alternating_updates():
        raise UsageError(f"teacher_train is {pattern!r}, but the students take turns: train them simultaneously")
    if not method.teaches_throughout:
        raise UsageError(
            f"teacher_train is {pattern!r}, but the teacher of {method.name} does not run while the labels train: "
            "set method.kl_weight above 0, or method.initial_share to 0"
        )
    names = dict(teacher.named_parameters())
    try:
        found = [each for name, each in names.items() if re.search(pattern, name)]
    except re.error as error:
        raise UsageError(f"teacher_train is {pattern!r}, which is no regular expression: {error}") from None
    if not found:
        some = ", ".join([*names][-3:])
        raise UsageError(f"teacher_train is {pattern!r}, which is in no name of the teacher's parameters, as {some}")
    return nn.ParameterList(each.requires_grad_() for each in found)


@dataclass(frozen=True, kw_only=True)
class KDSettings(IndependentSettings):
    """Settings of knowledge distillation; temperature and weight of the teacher are the run's teacher_*."""

    ce_weight: float = 1.0
    """a, the factor on the cross-entropy with the labels; RepDistiller has 0.1 beside teacher_weight 0.9."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("ce_weight", 0 <= self.ce_weight < float("inf"), "at least 0")


@METHODS.register("kd")
class KD(Method):
    """Each student learns from the labels and from a frozen teacher.

        sum_j [ a CE(z_j) + b T^2 KL(softmax(z_t / T) || softmax(z_j / T)) ]

    The teacher is attached by `WithTeacher`, which adds the same second term to any other method.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Weights a = b = 1 and T = 3
        as in DefangChen/OKDDip-AAAI2020 at c6a05de, train_kd.py; MFEF (ICANN 2022) prints none.
    Differs: HobbitLong/RepDistiller weights 0.1 and 0.9 with T = 4: --method.ce-weight 0.1 --teacher-weight 0.9
        --teacher-temperature 4.
    """

    settings: KDSettings
    family = "offline"
    year = 2015
    exchanges = "logits"
    teacher = "required"

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute a CE(z_j), `ce/student<j>`, and the KL to the teacher, `kl/teacher->student<j>`, of each student."""
        terms = weighted(self.settings.ce_weight, cross_entropy_terms(outputs.logits, labels))
        return terms | self.taught_by.terms(outputs, labels) if self.taught_by else terms
