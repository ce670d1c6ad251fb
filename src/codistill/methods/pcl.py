"""PCL: peer collaborative learning."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codistill.methods.cohort import EnsembleNetwork, FeatureMap, Images, Outputs
from codistill.methods.losses import Labels, Logits, Scalar, Terms
from codistill.methods.method import METHODS, Method, ParameterGroup
from codistill.methods.terms import DistillationSettings, cross_entropy_terms, ramped_kl
from codistill.networks.probe import copied


@dataclass(frozen=True, kw_only=True)
class PCLSettings(DistillationSettings):
    """Settings of peer collaborative learning."""

    mean_decay: float = 0.999
    """Largest decay of the moving averages, from 0 to below 1; in the first steps they are the plain mean of all steps
    so far."""
    views_per_student: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("mean_decay", 0 <= self.mean_decay < 1, "at least 0 and below 1")


class ConcatenatedClassifier(nn.Module):
    """A linear classifier on the pooled feature maps of all students, concatenated."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(sum(widths), num_classes)

    def forward(self, feature_maps: Sequence[FeatureMap]) -> Logits:
        """Map one feature map per student to logits."""
        logits: Tensor = self.linear(torch.cat([each.mean(dim=(2, 3)) for each in feature_maps], dim=1))
        return logits


@METHODS.register("pcl")
class PCL(Method):
    """Students learn from a classifier on the features of all, and from the moving averages of their peers.

    z_f are the logits of one linear classifier on the concatenated pooled features of all students (the peer ensemble
    teacher); m_l those of the moving average of student l's weights (its peer mean teacher):

        sum_j CE(z_j) + CE(z_f) + r(t) T^2 sum_j [ KL(z_f -> z_j) + 1/(n-1) sum_{l != j} KL(m_l -> z_j) ]

    KL(a -> b) = KL(softmax(a / T) || softmax(b / T)) with a detached. Each student sees an augmentation of its own, and
    m_l is computed on that of student l. After step s = 0, 1, .. of the optimiser every weight w of a student enters
    its mean: m <- d m + (1 - d) w, d = min(1 - 1/(s+1), 0.999). Batch normalisation in a mean teacher uses the batch in
    training, as in the students, and has running statistics of its own, from its own passes.

    Predictors: the students, `ensemble` (mean of their logits), `fused` (z_f) and `mean0`, `mean1`, .. (the mean
    teachers, networks of the students' shape).

    Args:
        students: At least two networks; equal ones share all stages but the last, and so do their means. The authors
            have three.

    Source: Wu and Gong, "Peer Collaborative Learning for Online Knowledge Distillation", AAAI 2021, arXiv 2006.04147;
        formulas after the third party's shaoeric/Peer-Collaborative-Learning-for-Online-Knowledge-Distillation at
        9d0909b: docs/pcl.md says what is verified. The authors' code is not public.
    Differs: there the shared stages see one student's view at a time, here all views as one batch; that concerns only
        the statistics of their batch normalisation. There the means start from weights of their own, here from the
        students'; after the first step both are the students' weights.
    """

    settings: PCLSettings
    family = "online"
    year = 2021
    exchanges = "logits, features"
    teacher = "allowed"
    min_students = 2

    def build(self) -> None:
        """Make the classifier of all features and the mean teachers."""
        self.fusion = ConcatenatedClassifier([student.widths[-1] for student in self.cohort], self.num_classes)
        self.means = copied(self.cohort).requires_grad_(False)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Images) -> Outputs:
        """Run all students, the classifier of their features and the mean teachers on normalised images."""
        with torch.no_grad():
            mean_low = self.means.trunk(images)

        def finish(index: int, feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean = self.means[index]
            with torch.no_grad():
                own = mean_low if mean_low.ndim == 4 else mean_low[index]
                taught = mean.head(mean.feature_map(own, self.means.shared_stages))
            return feature_map, self.cohort[index].head(feature_map), taught

        maps, logits, means = zip(*self.cohort.each_branch(self.cohort.trunk(images), finish), strict=True)
        extras = {f"mean{index}": each for index, each in enumerate(means)}
        return Outputs(logits, maps, self.fusion(maps), extras=extras)

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/` of each student and of `fused`, and `kl/fused->` and `kl/mean<l>->` it."""
        fused, chosen, count = outputs.fused, self.settings, len(self.cohort)
        terms = cross_entropy_terms(outputs.logits, labels, fused=fused)
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for index, logits in enumerate(outputs.logits):
            pairs[f"kl/fused->student{index}"] = (logits, fused)
            for peer in (each for each in range(count) if each != index):
                pairs[f"kl/mean{peer}->student{index}"] = (logits, outputs.extras[f"mean{peer}"].detach())
        divergences = ramped_kl(pairs, labels, progress, chosen, chosen.detach_teachers)
        shares = {name: 1 / (count - 1) if name.startswith("kl/mean") else 1.0 for name in pairs}
        return terms | {name: shares[name] * divergence for name, divergence in divergences.items()}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Put students and classifier into one group; the mean teachers are not trained."""
        return [ParameterGroup("students", (*self.cohort.parameters(), *self.fusion.parameters()))]

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the moving averages of the students' weights."""
        means: list[Tensor] = list(self.means.parameters())
        students: list[Tensor] = list(self.cohort.parameters())
        steps = self.steps.to(means[0].dtype)
        decay = (1 - 1 / (steps + 1)).clamp(max=self.settings.mean_decay)
        torch._foreach_mul_(means, decay)
        torch._foreach_add_(means, list(torch._foreach_mul(students, 1 - decay)))
        self.steps += 1

    def predictions(self, outputs: Outputs) -> dict[str, Logits]:
        """Name the logits of students, ensemble, classifier and mean teachers; see `Method.predictions`."""
        return {**super().predictions(outputs), **outputs.extras}

    def predictors(self) -> dict[str, nn.Module]:
        """Return the students, their ensemble, the classifier and the mean teachers."""
        means = {f"mean{index}": mean for index, mean in enumerate(self.means)}
        return {**super().predictors(), "fused": EnsembleNetwork(self.cohort, self.fusion), **means}
