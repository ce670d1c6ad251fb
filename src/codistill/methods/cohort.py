"""The students that train together, the trunk that they share, and the outputs of a forward pass."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from codistill.core.device import critical_stream
from codistill.core.errors import UsageError
from codistill.methods.losses import Logits, mean_logits
from codistill.networks import Network
from codistill.networks.likeness import alike
from codistill.networks.probe import label

T = TypeVar("T")
FeatureMap = Float[Tensor, "batch _channel _height _width"]
AnyMap = Float[Tensor, "batch *_map"]
Images = Float[Tensor, "*view batch channel height width"]
"""Normalised images: one batch for all students or, with a leading axis, a view of it for each."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of one forward pass of a method.

    Attributes:
        logits: One [batch, classes] per student.
        feature_maps: One [batch, channels, height, width] per student: the backbone's, before pooling. Networks of
            your own may have other forms, such as [batch, tokens, channels].
        fused_logits: [batch, classes] of the fused classifier or a gated ensemble, where the method has one.
        teacher_logits: [batch, classes] of a frozen teacher, where one is given; one per student with a view each.
        stage_maps: What is compared with `teacher_maps`, of each student, where the method does so.
        teacher_maps: Outputs of all stages of a frozen teacher, where the method needs them, [*view, batch, ..].
        extras: Further tensors by name, for the method's own losses.
    """

    logits: tuple[Float[Tensor, "batch _class"], ...]
    feature_maps: tuple[AnyMap, ...]
    fused_logits: Float[Tensor, "batch _class"] | None = None
    teacher_logits: Float[Tensor, "*student batch _class"] | None = None
    stage_maps: tuple[tuple[AnyMap, ...], ...] = ()
    teacher_maps: tuple[Tensor, ...] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def fused(self) -> Logits:
        """The fused logits of a method that always has them."""
        if self.fused_logits is None:
            raise ValueError("the outputs have no fused logits")
        return self.fused_logits

    @property
    def taught(self) -> Float[Tensor, "*student batch _class"]:
        """The teacher's logits, where there is a teacher."""
        if self.teacher_logits is None:
            raise ValueError("the outputs have no teacher logits: they were computed in evaluation mode")
        return self.teacher_logits

    def of_training(self, name: str) -> Tensor:
        """Return one of `extras` that only a pass in training mode has."""
        if name not in self.extras:
            raise ValueError("the outputs lack what the losses need: they were computed in evaluation mode")
        return self.extras[name]

    @property
    def ensemble_logits(self) -> Logits:
        """Mean of the students' logits."""
        return mean_logits(self.logits)


class Cohort(nn.Module):
    """Students that may share their low stages.

    Sharing replaces the first stages of all students by the very modules of the first student, so each student stays
    a complete network that can be called, counted and exported alone.

    Attributes:
        streams: CUDA streams that the branches run on, one for each student; empty: one after the other.

    Args:
        students: Networks.
        shared_stages: How many low stages to share. None: all but the last one where the students are equal, else none.

    Raises:
        UsageError: No student, the same object twice, or a trunk asked for that the students cannot share.
    """

    def __init__(self, students: Sequence[Network], shared_stages: int | None = None) -> None:
        super().__init__()
        if not students:
            raise UsageError("a cohort needs at least one student")
        for index, student in enumerate(students):
            check_student(index, student)
        if len({id(student) for student in students}) < len(students):
            raise UsageError("a cohort got the same network object twice: build one network for each student")
        self.students = nn.ModuleList(students)
        self.shared_stages = self._trunk_length(students, shared_stages)
        trunk = list(students[0].stages[: self.shared_stages])
        self.streams: list[torch.cuda.Stream] = []
        for student in students[1:]:
            student.stages = nn.ModuleList([*trunk, *student.stages[self.shared_stages :]])

    @staticmethod
    def _trunk_length(students: Sequence[Network], asked: int | None) -> int:
        if len(students) == 1 or asked == 0:
            return 0
        if asked is None:
            equal = all(alike(student.stages, students[0].stages) for student in students[1:])
            return len(students[0].stages) - 1 if equal else 0
        names = " + ".join(map(label, students))
        shortest = min(len(student.stages) for student in students)
        if not 0 <= asked <= shortest:
            raise UsageError(f"cannot share {asked} stages of {names}: share between 0 and {shortest}")
        for student in students[1:]:
            if not alike(student.stages[:asked], students[0].stages[:asked]):
                raise UsageError(f"cannot share {asked} stages of {names}: unlike networks share nothing (use 0)")
        return asked

    def require_likeness(self, method: str) -> None:
        """Raise a UsageError for a method that needs equal students, where they are not."""
        wholes = [nn.ModuleList([*student.stages, student.head]) for student in self]
        if not all(alike(wholes[0], each) for each in wholes[1:]):
            names = " + ".join(map(label, self))
            raise UsageError(f"{method} needs equal students, got {names}: name one network several times")

    def trunk(self, images: Images) -> Float[Tensor, "*form"]:
        """Apply the shared stages once; to all views together where each student has its own."""
        low = images.flatten(0, -4)
        for stage in self[0].stages[: self.shared_stages]:
            low = stage(low)
        return low.reshape(*images.shape[:-3], *low.shape[1:])

    def each_branch(self, low: Images, finish: Callable[[int, FeatureMap], T], views: bool | None = None) -> list[T]:
        """Run each student's branch on the output of `trunk`, then `finish` with its index and feature map.

        `finish` belongs to the branch: it may run at the same time as those of the others. `views` says whether `low`
        has a view for each student; None: if it has five dimensions.
        """
        viewed, first = low.ndim == 5 if views is None else views, self.shared_stages
        return self.each_student(lambda at: finish(at, self[at].feature_map(low[at] if viewed else low, first)))

    def each_staged(self, images: Images, finish: Callable[[int, tuple[FeatureMap, ...]], T]) -> list[T]:
        """Run the stages of each student on normalised images, then `finish` with its index and all stages' outputs."""
        shared = []
        low = images.flatten(0, -4)
        for stage in self[0].stages[: self.shared_stages]:
            low = stage(low)
            shared.append(low.reshape(*images.shape[:-3], *low.shape[1:]))

        def branch(index: int) -> T:
            maps = [each if each.ndim == 4 else each[index] for each in (images, *shared)]
            for stage in self[index].stages[self.shared_stages :]:
                maps.append(stage(maps[-1]))
            return finish(index, tuple(maps[1:]))

        return self.each_student(branch)

    def each_student(self, branch: Callable[[int], T]) -> list[T]:
        """Call a function with each student's index; the calls may run at the same time on streams of their own."""
        if not self.streams:
            return [branch(index) for index in range(len(self))]
        current, results = torch.cuda.current_stream(), []
        for index, stream in enumerate(self.streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results.append(branch(index))
        for stream in self.streams:
            current.wait_stream(stream)
        return results

    @contextlib.contextmanager
    def branches_on_streams(self, device: torch.device) -> Iterator[None]:
        """Run the branches of several students at the same time until this context ends; for a captured step."""
        if len(self) > 1:
            self.streams = [critical_stream(device) for _ in self]
        try:
            yield
        finally:
            self.streams = []

    def __iter__(self) -> Iterator[Network]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self.students)

    def __getitem__(self, index: int) -> Network:
        student = self.students[index]
        assert isinstance(student, Network)
        return student


class EnsembleNetwork(nn.Module):
    """A predictor of several students: the shared trunk once, then each branch and head, then their combination.

    `combine` maps the list of the heads' outputs to logits; None: their mean. Without heads it gets the feature maps.
    """

    def __init__(
        self, cohort: Cohort, combine: nn.Module | None = None, heads: Sequence[nn.Module] | None = None
    ) -> None:
        super().__init__()
        shared = cohort.shared_stages
        self.trunk = nn.Sequential(*cohort[0].stages[:shared])
        self.branches = nn.ModuleList(
            Network(list(each.stages[shared:]), nn.Identity() if heads is None else heads[index], each.widths[shared:])
            for index, each in enumerate(cohort)
        )
        self.combine = combine

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Logits:
        """Map normalised images to logits."""
        low = self.trunk(images)
        outputs = [branch(low) for branch in self.branches]
        logits: Tensor = mean_logits(outputs) if self.combine is None else self.combine(outputs)
        return logits

    def maps_and_logits(self, low: FeatureMap) -> tuple[list[FeatureMap], list[Logits]]:
        """Return the last feature map and the logits of each branch, from the output of the trunk on."""
        branches = [each for each in self.branches if isinstance(each, Network)]
        maps = [branch.feature_map(low) for branch in branches]
        return maps, [branch.head(each) for branch, each in zip(branches, maps, strict=True)]


def check_student(index: int, student: nn.Module) -> None:
    """Raise `UsageError` for a student that is no `Network`, or has weights without a shape yet."""
    form = "a student is a Network(stages, head, widths)"
    if isinstance(getattr(student, "_orig_mod", None), Network):
        raise UsageError(f"student {index} is a compiled Network: hand in the Network, and compile with --compile on")
    if isinstance(getattr(student, "module", None), Network):
        raise UsageError(f"student {index} is a Network within {type(student).__name__}: hand in its .module")
    if not isinstance(student, Network):
        found = f"student {index} is a {type(student).__name__}"
        raise UsageError(f"{found}, but {form}: codistill.network_from(module) makes one")
    if any(is_lazy(each) for each in (*student.parameters(), *student.buffers())):
        lazy = f"student {index} ({label(student)}) has lazy layers without weights"
        raise UsageError(f"{lazy}: call it once on some images first")
