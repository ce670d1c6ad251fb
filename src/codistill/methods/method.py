"""What every method is: a module that owns students and says what their losses are."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args, get_origin

from jaxtyping import Float, Int
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.core.registry import Registry, near_matches
from codistill.methods.cohort import Cohort, Outputs
from codistill.methods.losses import mean_logits
from codistill.networks import Network

TeacherRule = Literal["required", "allowed", "refused"]
METHODS: Registry[type["Method"]] = Registry("method", "codistill.methods")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Settings that every method has."""

    shared_stages: int | None = None
    """Low stages that the students share. None: all but the last where the students are equal, else none."""

    @property
    def needs_full_batch(self) -> str:
        """What of the method needs the whole batch in one process; empty: nothing, it may be split over several."""
        return ""

    def __post_init__(self) -> None:
        if self.shared_stages is not None and self.shared_stages < 0:
            raise UsageError(f"method.shared_stages is {self.shared_stages}; it must be at least 0")
        # Without this a misspelt choice would quietly be another experiment.
        for each in fields(self):
            value = getattr(self, each.name)
            if get_origin(each.type) is Literal and value not in get_args(each.type):
                raise UsageError(f"method.{each.name} is {value!r}: {near_matches(str(value), get_args(each.type))}")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that one weight decay governs; `weight_decay` None means the run's own."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float | None = None


class MeanLogits(nn.Module):
    """Combine the logits of several students into those of their ensemble."""

    def forward(self, logits: Sequence[Float[Tensor, "batch class"]]) -> Float[Tensor, "batch class"]:
        """Give the mean."""
        return mean_logits(logits)


class EnsembleNetwork(nn.Module):
    """A predictor that needs several students: their trunk once, each branch and head once, then a combination.

    Args:
        members: Networks; their heads give what is combined.
        shared_stages: How many low stages they have in common.
        combine: Maps the list of the heads' outputs to logits.
    """

    def __init__(self, members: Sequence[Network], shared_stages: int, combine: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*members[0].stages[:shared_stages])
        self.branches = nn.ModuleList(
            Network(list(each.stages[shared_stages:]), each.head, each.widths[shared_stages:]) for each in members
        )
        self.combine = combine

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Map normalised images to logits."""
        low = self.trunk(images)
        logits: Tensor = self.combine([branch(low) for branch in self.branches])
        return logits


class Method(nn.Module):
    """A way of training students together.

    The whole protocol, in anybody's loop: `terms = method.losses(method(images), labels, progress)`, then
    `sum(terms.values()).backward()`.

    Args:
        students: Networks with equal numbers of classes.
        num_classes: That number.
        settings: An instance of the class's `Settings`; None means its defaults.
        image_size: Height and width of the images, pixels, for methods whose modules depend on it.

    Raises:
        UsageError: Too few or too many students, or settings that cannot work with them.
    """

    name: ClassVar[str] = ""
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    min_students: ClassVar[int] = 1
    max_students: ClassVar[int | None] = None
    teacher: ClassVar[TeacherRule] = "refused"
    """Whether a frozen teacher must, may or must not be given beside the students."""
    capturable: ClassVar[bool] = True
    """Whether a step may be captured as a CUDA graph."""

    def __init__(
        self,
        students: Sequence[Network],
        num_classes: int,
        settings: MethodSettings | None = None,
        image_size: tuple[int, int] = (32, 32),
    ) -> None:
        super().__init__()
        self.settings = self.Settings() if settings is None else settings
        if not isinstance(self.settings, self.Settings):
            raise UsageError(f"{self.name} takes {self.Settings.__name__}, not {type(self.settings).__name__}")
        self.num_classes = num_classes
        self.image_size = image_size
        self.require_students(len(students), self.min_students)
        if self.max_students is not None and len(students) > self.max_students:
            raise UsageError(
                f"{self.name} takes at most {self.max_students} students, got {len(students)}: name fewer --networks"
            )
        self.cohort = Cohort(students, self.settings.shared_stages)

    def require_students(self, count: int, minimum: int, mend: str = "name more --networks") -> None:
        """Refuse a cohort that is too small.

        Raises:
            UsageError: Fewer than `minimum` students.
        """
        if count < minimum:
            raise UsageError(f"{self.name} needs at least {minimum} students, got {count}: {mend}")

    @property
    def views(self) -> int:
        """How many augmented views of an image a step needs: 1, or one for each student."""
        return 1

    @property
    def parallel_branches(self) -> bool:
        """Whether the students' branches have nothing in common and may run at the same time."""
        return True

    def alternating_updates(self) -> Sequence[Sequence[nn.Parameter]]:
        """Say which parameters are updated one after the other, each from a fresh forward pass, within a step.

        Empty: all at once. A turn minimises the sum of all terms over its own parameters.
        """
        return ()

    def forward(self, images: Float[Tensor, "*view batch channel height width"]) -> Outputs:
        """Run all students on normalised images.

        Args:
            images: One batch for all, or, with a leading axis, one view of it for each student.
        """

        def finish(index: int, feature_map: Tensor) -> tuple[Tensor, Tensor]:
            return feature_map, self.cohort[index].head(feature_map)

        feature_maps, logits = zip(*self.cohort.each_branch(self.cohort.trunk(images), finish), strict=True)
        return Outputs(logits, feature_maps)

    def losses(
        self, outputs: Outputs, labels: Int[Tensor, " batch"], progress: Float[Tensor, ""]
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute the named terms of the loss, weights applied; their sum is what is minimised.

        Args:
            outputs: What `forward` gave.
            labels: Class indices.
            progress: Share of the epochs that are done, epoch / epochs, constant within an epoch.

        Returns:
            Named scalars such as `ce/student0` and `kl/fused->student0`.
        """
        raise NotImplementedError

    def parameter_groups(self) -> list[ParameterGroup]:
        """Split the trainable parameters by weight decay; by default one group."""
        return [ParameterGroup("students", tuple(self.parameters()))]

    def predictions(self, outputs: Outputs) -> dict[str, Float[Tensor, "batch class"]]:
        """Name the logits that are worth evaluating: each student, their ensemble, the fused classifier."""
        named = {f"student{index}": logits for index, logits in enumerate(outputs.logits)}
        if len(outputs.logits) > 1:
            named["ensemble"] = outputs.ensemble_logits
        if outputs.fused_logits is not None:
            named["fused"] = outputs.fused_logits
        return named

    def deployed_student(self, index: int) -> Network:
        """Give the plain network that a student is outside the cohort: no peers, no fusion, no teacher."""
        return self.cohort[index]

    def predictors(self) -> dict[str, nn.Module]:
        """Give a module for each name of `predictions`, mapping normalised images to the same logits."""
        students = [self.deployed_student(index) for index in range(len(self.cohort))]
        named: dict[str, nn.Module] = {f"student{index}": student for index, student in enumerate(students)}
        if len(students) > 1:
            named["ensemble"] = EnsembleNetwork(students, self.cohort.shared_stages, MeanLogits())
        return named

    def after_step(self) -> None:
        """Do what follows an update, such as a moving average; by default nothing."""

    def after_epoch(self) -> None:
        """Do what follows an epoch, such as new weights from statistics that were gathered; by default nothing."""
