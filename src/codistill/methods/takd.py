"""TAKD: knowledge distillation through assistants between a teacher and a student."""

from codistill.methods.kd import KD, KDSettings
from codistill.methods.method import METHODS


@METHODS.register("takd")
class TAKD(KD):
    """A teacher teaches an assistant, and the assistant the student: a chain of kd, each link a run of its own.

        a CE(z) + b T^2 KL(softmax(z_t / T) || softmax(z / T)),  z_t of the link before

    `codistill train takd --networks TEACHER ASSISTANT.. STUDENT` trains the chain. As a method it is `kd`, as
    each link is but the first.

    Source: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020, arXiv 1902.03393;
        authors' code imirzadeh/Teacher-Assistant-Knowledge-Distillation at 0f8168f.
    Differs: their code divides the KL by the number of classes once more, by `KLDivLoss` with its default reduction,
        weighs the terms 1 - l and l, and trains without augmentation: docs/takd.md.
    """

    settings: KDSettings
    family = "offline"
    year = 2020
    exchanges = "logits"
