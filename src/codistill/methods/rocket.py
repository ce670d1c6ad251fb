"""Rocket launching: a light network learns beside a larger one, the booster."""

import math
from dataclasses import dataclass
from typing import Literal

from codistill.methods.cohort import Outputs
from codistill.methods.losses import Labels, Scalar, Terms, at_least_float32, squared_distance
from codistill.methods.method import METHODS, Method, MethodSettings
from codistill.methods.terms import cross_entropy_terms


@dataclass(frozen=True, kw_only=True)
class RocketSettings(MethodSettings):
    """Settings of rocket launching."""

    hint_weight: float = 0.03
    """Factor on the hint, at least 0."""
    hint: Literal["logits", "softmax"] = "logits"
    """Output of the booster that the light network matches: logits or probabilities."""
    detach_booster: bool = True
    """The gradient block: whether the hint trains the light network alone, and not the booster too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("hint_weight", 0 <= self.hint_weight < math.inf, "at least 0")


@METHODS.register("rocket")
class Rocket(Method):
    """A light network, student0, matches the logits of a booster, student1, while both learn from the labels.

        CE(z_L) + CE(z_B) + gamma ||z_L - z_B||^2

    The squared distance is summed over classes and averaged over the batch; the gradient block detaches z_B in it.

    Args:
        students: The light network, which is the one to deploy, and the booster. Equal ones share all stages but the
            last; unlike ones share nothing unless `shared_stages` says how many of their first stages are alike.

    Source: Zhou et al., "Rocket Launching: A Universal and Efficient Framework for Training Well-performing Light Net",
        AAAI 2018, arXiv 1708.04106; authors' code zhougr1993/Rocket-Launching at aa6b8f5, rocket_interval.py.
    Differs: their code shares convolutions and gives each network batch normalisations of its own; here shared stages
        are the very same modules, as the paper draws them. It divides the hint of a smaller last batch by the full
        batch size.
    """

    settings: RocketSettings
    family = "online"
    year = 2018
    exchanges = "logits"
    min_students = 2
    max_students = 2

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute `ce/student0`, `ce/student1` and `hint/student1->student0`."""
        terms = cross_entropy_terms(outputs.logits, labels)
        light, booster = (at_least_float32(logits) for logits in outputs.logits)
        if self.settings.hint == "softmax":
            light, booster = light.softmax(dim=1), booster.softmax(dim=1)
        distance = squared_distance(light, booster, self.settings.detach_booster)
        terms["hint/student1->student0"] = self.settings.hint_weight * distance
        return terms
