"""KDGAN: a classifier and a teacher learn from each other, and against a discriminator."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from codistill.methods.cohort import Images, Outputs
from codistill.methods.independent import IndependentSettings
from codistill.methods.losses import Labels, Logits, Scalar, Terms, at_least_float32, distillation, label_shares
from codistill.methods.method import METHODS, Method, ParameterGroup
from codistill.methods.terms import KLSettings, cross_entropy_terms
from codistill.networks import network


@dataclass(frozen=True, kw_only=True)
class KDGANSettings(IndependentSettings, KLSettings):
    """Settings of KDGAN."""

    alpha: float = 0.2
    """a, from 0 to 1: weight of the classifier's adversarial term; the teacher's has 1 - a."""
    student_kl_weight: float = 1.0
    """b, weight of the distillation from the teacher to the classifier, at least 0."""
    teacher_kl_weight: float = 1e-4
    """g, weight of the distillation from the classifier to the teacher, at least 0."""
    temperature: float = 3.0
    """T of both distillation terms, > 0."""
    first_tau: float = 10.0
    """Temperature of the Gumbel softmax at the start, > 0."""
    last_tau: float = 0.1
    """Its temperature at the end, > 0; between them it falls geometrically."""
    discriminator: str = "resnet8"
    """Network that tells labels from those that the two name: a name of --networks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("alpha", 0 <= self.alpha <= 1, "between 0 and 1")
        for name in ("student_kl_weight", "teacher_kl_weight"):
            self.check(name, 0 <= getattr(self, name) < math.inf, "a number, at least 0")
        for name in ("temperature", "first_tau", "last_tau"):
            self.check(name, 0 < getattr(self, name) < math.inf, "a number above 0")


@METHODS.register("kdgan")
class KDGAN(Method):
    """A classifier, student0, and a teacher, student1, teach each other, and generate labels to fool a discriminator.

    With s(y, x) = <y, D(x)> the discriminator's logit of a label y, and y_c and y_t labels that the two name:

        min over c, t, max over d:  log d(y, x) + a log(1 - d(y_c, x)) + (1 - a) log(1 - d(y_t, x)),  d = sigmoid(s)

    beside CE(z_c) + CE(z_t) + b T^2 KL(z_t -> z_c) + g T^2 KL(z_c -> z_t), whose sources are detached. A named label is
    a relaxed sample, softmax((z + Gumbel noise) / tau), so that the gradient goes through it.

    Args:
        students: The classifier, which is the one to deploy, and the teacher, which trains beside it.

    Source: Wang, Zhang, Sun, Qi, "KDGAN: Knowledge Distillation with Generative Adversarial Networks", NeurIPS 2018:
        the paper's objective, in our reading. It publishes no number on CIFAR-100.
    Differs: the authors' code (xiaojiew94/KDGAN at 8f1367d) alternates epochs of three pre-trained networks, and
        rewards sampled labels without a gradient through the sample. Here all three train from the start, and at once.
    """

    settings: KDGANSettings
    family = "offline"
    year = 2018
    exchanges = "logits"
    min_students = 2
    max_students = 2

    def build(self) -> None:
        """Make the discriminator."""
        self.discriminator = network(self.settings.discriminator, self.num_classes, image_size=self.image_size)

    def forward(self, images: Images) -> Outputs:
        """Run both networks on normalised images and, in training, the discriminator; draw the noise of the samples."""
        outputs = super().forward(images)
        if not self.training:
            return outputs
        scores = self.discriminator(images.flatten(0, -4)).reshape(*images.shape[:-3], self.num_classes)
        extras = {"scores": scores}
        for index, logits in enumerate(outputs.logits):
            noise = torch.empty_like(at_least_float32(logits)).exponential_().log().neg()
            extras[f"noise/student{index}"] = noise
        return replace(outputs, extras=extras)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/` and `adversarial/` of each student, `adversarial/discriminator` and both `kl/`."""
        chosen, scores = self.settings, at_least_float32(outputs.of_training("scores"))
        tau = chosen.first_tau * (chosen.last_tau / chosen.first_tau) ** progress
        weights = (chosen.alpha, 1 - chosen.alpha)
        terms = cross_entropy_terms(outputs.logits, labels)
        real = scores if scores.ndim == 2 else scores[0]
        believed = F.softplus(-score(label_shares(labels, real), real)).mean()
        for index, logits in enumerate(outputs.logits):
            own = scores if scores.ndim == 2 else scores[index]
            noisy = at_least_float32(logits) + outputs.extras[f"noise/student{index}"]
            named = F.softmax(noisy / tau.to(noisy.dtype), dim=1)
            # -softplus(s) is log(1 - sigmoid(s)): the discriminator's half of it, and the student's.
            believed = believed + weights[index] * F.softplus(score(named.detach(), own)).mean()
            terms[f"adversarial/student{index}"] = -weights[index] * F.softplus(score(named, own.detach())).mean()
        terms["adversarial/discriminator"] = believed
        classifier, teacher = outputs.logits
        there = distillation(classifier, teacher, labels, chosen.temperature, *chosen.form)
        back = distillation(teacher, classifier, labels, chosen.temperature, *chosen.form)
        terms["kl/student1->student0"] = chosen.student_kl_weight * there
        terms["kl/student0->student1"] = chosen.teacher_kl_weight * back
        return terms

    def parameter_groups(self) -> list[ParameterGroup]:
        """Split into the two networks and the discriminator, with one weight decay."""
        students = ParameterGroup("students", tuple(self.cohort.parameters()))
        return [students, ParameterGroup("discriminator", tuple(self.discriminator.parameters()))]


def score(named: Logits, scores: Logits) -> Tensor:
    """Return the discriminator's logit of a label, [batch]: the mean of its scores by the shares of the classes."""
    return (named * scores).sum(dim=1)
