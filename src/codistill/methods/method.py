"""The contract of a method: a module that owns students and computes the terms of their loss."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.core.kinds import take_kinds
from codistill.core.registry import Registry
from codistill.methods.cohort import Cohort, EnsembleNetwork, Images, Outputs
from codistill.methods.losses import Labels, Logits, Scalar, Terms
from codistill.methods.mistakes import checked_terms, title
from codistill.methods.teacher import TEACHER_TERM, Teacher
from codistill.modules.attention import AttentionMaps
from codistill.networks import Network
from codistill.networks.origin import DRAWN, Marked, mark
from codistill.networks.probe import probing

TeacherRule = Literal["required", "allowed", "refused"]
Family = Literal["baseline", "offline", "online", "self"]
"""Section 2 of MFEF (ICANN 2022): from a trained teacher, from each other, or from the network's own deeper parts."""
MethodClass = type["Method"]


class MethodRegistry(Registry[MethodClass]):
    """The registry of methods, which gives each class its public name."""

    def register(self, name: str) -> Callable[[MethodClass], MethodClass]:
        """Register the decorated class under a public name; see `Registry.register`."""
        enter = super().register(name)

        def named(kind: MethodClass) -> MethodClass:
            kind.name = name
            return enter(kind)

        return named


METHODS = MethodRegistry("method", "codistill.methods")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Settings that every method has."""

    shared_stages: int | None = None
    """Low stages that the students share. None: all but the last where the students are equal, else none."""
    views_per_student: bool = False
    """Whether each student is trained on crops and flips of its own instead of the same ones for all. In evaluation
    all students see the same images."""

    @property
    def needs_full_batch(self) -> str:
        """Setting that needs the whole batch in one process; empty: the batch may be split over several."""
        return ""

    def __post_init__(self) -> None:
        take_kinds(self, "method.")
        self.check("shared_stages", self.shared_stages is None or self.shared_stages >= 0, "at least 0")

    def check(self, name: str, valid: bool, bounds: str) -> None:
        """Raise a UsageError if a setting's value is not valid; `bounds` tells which ones are."""
        if not valid:
            raise UsageError(f"method.{name} is {getattr(self, name)}; it must be {bounds}")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one weight decay; `weight_decay` None means the run's own.

    `pause` is a number on the device, 0 or 1, that `losses` may set in place: at 1 the step that follows leaves the
    parameters, and what the optimiser keeps of them, as they are.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float | None = None
    pause: Tensor | None = None


def with_teacher_terms(losses: Callable[..., Terms]) -> Callable[..., Terms]:
    """Add the terms of a frozen teacher, where there is one, to a method's `losses`; progress may be a number."""

    @functools.wraps(losses)
    def added(method: "Method", outputs: Outputs, labels: Labels, progress: Scalar | float | int) -> Terms:
        if method.initialising:
            return checked_terms(type(method), method.initial_losses(outputs, labels))
        if not isinstance(progress, Tensor):
            if not 0 <= progress <= 1:
                raise UsageError(f"progress is {progress}; it must be epoch / epochs, 0 to 1")
            progress = torch.tensor(float(progress), device=labels.device)
        terms = checked_terms(type(method), losses(method, outputs, labels, progress))
        teacher = method.taught_by
        if teacher is None:
            return terms
        adds = method.adds_teacher_terms and TEACHER_TERM not in terms
        return terms | (teacher.terms(outputs, labels) if adds else {}) | teacher.label_terms(outputs, labels)

    return added


class Method(Marked):
    """A way of training students together.

    In any loop: `terms = method.losses(method(images), labels, progress)`, then `sum(terms.values()).backward()`. What
    else a loop does for methods that override the hooks below is in docs/training.md.

    A new method is a subclass with the decorator `@METHODS.register("my-method")`, an annotation
    `settings: MySettings`, `losses`, and `build` where it has modules of its own. Everything else has a default.

    Args:
        students: Networks with equal numbers of classes.
        num_classes: Number of classes.
        settings: An instance of `Settings`; None: its defaults.
        image_size: Height and width of the images, pixels, for modules whose shape depends on it.

    Attributes:
        cohort: The students, with the stages that they share.
        settings: As above; `Settings` is the class that the annotation names.
        taught_by: A frozen teacher, set by `WithTeacher`, whose terms are added to the method's own.
        connectors: Modules between students and teacher, made by `connect`; empty without a teacher.
        teacher_parts: Parameters of the teacher that are trained, too; empty unless `WithTeacher` was asked for some.
        initialising: Whether the run is in its initialisation, of methods that have one; set by the loop.

    Raises:
        UsageError: Too few or too many students, or settings that cannot work with them.
    """

    name: str = ""
    """The public name, set by the registry; of a class that is not registered, that of its base, or of the class."""
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    settings: MethodSettings
    min_students: ClassVar[int] = 1
    max_students: ClassVar[int | None] = None
    like_students: ClassVar[bool] = False
    """Whether all students must be the same network."""
    title: ClassVar[str] = ""
    """How its paper writes its name, where that is not the name of the class."""
    family: ClassVar[Family | None] = None
    """Its place in docs/methods.md, of methods of this package."""
    year: ClassVar[int | None] = None
    """Of the publication."""
    exchanges: ClassVar[str] = "nothing"
    """What students learn from each other or from a teacher, such as logits, features, embeddings or weights."""
    teacher: ClassVar[TeacherRule] = "refused"
    """Whether a frozen teacher must, may or must not be given beside the students."""
    teacher_maps: ClassVar[bool] = False
    """Whether the outputs of a training step hold the maps of the teacher's stages; it must then be a `Network`."""
    adds_teacher_terms: ClassVar[bool] = True
    """Whether the KL terms of a frozen teacher are added to what `losses` returns."""
    initialising: bool = False
    capturable: bool = True
    """Whether a step may be captured as a CUDA graph."""
    memory_format: torch.memory_format = torch.channels_last
    """Memory format of weights and images, as `choose_memory_format` has found it."""

    @classmethod
    def alone(cls, settings: Any) -> MethodSettings | None:
        """Return settings with which one student trains alone, with all that a deployed student of a run carries.

        None: a deployed student is its network and no more.
        """
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.Settings = inspect.get_annotations(cls, eval_str=True).get("settings", cls.Settings)
        if not cls.name:
            cls.name = cls.__name__
        if "losses" in vars(cls):
            cls.losses = with_teacher_terms(cls.losses)  # type: ignore[method-assign]

    def __init__(
        self,
        students: Sequence[Network],
        num_classes: int,
        settings: MethodSettings | None = None,
        image_size: tuple[int, int] = (32, 32),
    ) -> None:
        super().__init__()
        self.taught_by: Teacher | None = None
        self.settings = self.Settings() if settings is None else settings
        if not isinstance(self.settings, self.Settings):
            raise UsageError(f"{self.name} takes {self.Settings.__name__}, not {type(self.settings).__name__}")
        self.num_classes = num_classes
        self.image_size = image_size
        if isinstance(students, nn.Module):
            raise UsageError(f"{self.name}: students is one network: hand in a list of networks")
        students = list(students)
        self.require_students(len(students), self.min_students)
        if self.max_students is not None and len(students) > self.max_students:
            raise UsageError(
                f"{self.name} takes at most {self.max_students} students, got {len(students)}: name fewer --networks"
            )
        self.cohort = Cohort(students, self.settings.shared_stages)
        if self.like_students:
            self.cohort.require_likeness(self.name)
        self.build()
        self.connectors = nn.ModuleList()
        self.teacher_parts = nn.ParameterList()
        mark(self, DRAWN, but=self.cohort)

    def require_students(self, count: int, minimum: int, fix: str = "name more --networks") -> None:
        """Raise a UsageError if there are fewer than `minimum` students."""
        if count < minimum:
            raise UsageError(f"{self.name} needs at least {minimum} students, got {count}: {fix}")

    def __call__(self, images: Images) -> Outputs:
        """Run `forward` and, where `runs_teacher`, the frozen teacher."""
        if self.memory_format == torch.contiguous_format:
            images = images.contiguous()
        outputs: Outputs = super().__call__(images)
        if self.taught_by is None or not self.runs_teacher:
            return outputs
        if not self.teacher_maps:
            return replace(outputs, teacher_logits=self.taught_by.logits(images))
        maps, logits = self.taught_by.maps_and_logits(images)
        return replace(outputs, teacher_logits=logits, teacher_maps=maps)

    def _apply(self, *arguments: Any, **options: Any) -> "Method":
        if self.taught_by is not None:
            self.taught_by.network._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    def choose_memory_format(self, images: Images) -> None:
        """Choose channels_last, which is faster, unless a network cannot run in it, as one with `view` of its maps."""
        with probing(self, images.device) as probe, torch.no_grad():
            try:
                probe.to(memory_format=torch.channels_last).eval()(images)
                if probe.taught_by is not None:
                    probe.taught_by.network(images)
            except RuntimeError:
                self.memory_format = torch.contiguous_format

    # Every method defines losses, and build if it has modules of its own.

    def build(self) -> None:
        """Make the method's own modules, as attributes; `cohort`, `settings` and the sizes are there already."""

    def losses(self, outputs: Outputs, labels: Labels, progress: Scalar) -> Terms:
        """Compute the named terms of the loss, weights applied; their sum is minimised.

        Those of a frozen teacher (`WithTeacher`) are added to what a subclass returns.

        Args:
            outputs: Those of a forward pass.
            labels: Class indices; where they are mixed, smoothed or weighted (docs/augmentation.md) rows of the shares
                of all classes.
            progress: Share of the epochs that are done, epoch / epochs, constant within an epoch; also a number, which
                reaches a subclass as a tensor.

        Returns:
            Named scalars such as `ce/student0` and `kl/fused->student0`.

        Raises:
            UsageError: A number that is no share of the epochs, or a subclass returns something else.
        """
        raise UsageError(f"{title(type(self))} defines no losses(outputs, labels, progress)")

    # Some methods override the rest.

    def refuse_useless(self) -> None:
        """Refuse settings of which a term would teach nothing, or nonsense, before a run begins; older runs have them.

        Raises:
            UsageError: A distillation term of two standardised logits, which are the same for every image.
        """
        taught = self.taught_by
        forms = {"method.kl": getattr(self.settings, "kl", "kl"), "teacher_kl": taught.kl if taught else "kl"}
        for name, form in forms.items():
            if form == "standardised" and self.num_classes == 2:
                raise UsageError(f"{name} is standardised, which teaches nothing with two classes: choose another form")

    def connect(self, teacher: nn.Module) -> Sequence[nn.Module]:
        """Make the modules between students and a teacher, `connectors`, which are trained; by default none.

        `forward` applies them, for it runs in the precision of the run, and `losses` in float32.

        Raises:
            UsageError: The method has no answer to their unlike widths or stages.
        """
        return ()

    def initial_epochs(self, epochs: int) -> int:
        """Return how many of the first epochs of a run are its initialisation; by default none.

        In it `initialising` is set: `losses` returns `initial_losses`, which train `initial_parameters` alone. At its
        end the momentum of all parameters is 0 again. Learning rate and progress are those of the whole run.
        """
        return 0

    def initial_losses(self, outputs: Outputs, labels: Labels) -> Terms:
        """Compute the named terms of the initialisation; as `losses`, but without a ramp-up and a teacher's KL."""
        raise UsageError(f"{title(type(self))} defines no initial_losses(outputs, labels)")

    def initial_parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters that the initialisation trains; the others stay as they are."""
        return tuple(self.parameters())

    def forward(self, images: Images) -> Outputs:
        """Run all students on one batch of normalised images or, with a leading axis, a view of it for each."""
        return self.branches(self.cohort.trunk(images), images.ndim == 5)

    def branches(self, low: Tensor, views: bool | None = None) -> Outputs:
        """Run each student from the output of `Cohort.trunk` on; `views` as in `Cohort.each_branch`."""
        found = self.cohort.each_branch(low, lambda index, each: (each, self.cohort[index].head(each)), views)
        maps, logits = zip(*found, strict=True)
        return Outputs(logits, maps)

    @property
    def runs_teacher(self) -> bool:
        """Whether a pass runs the frozen teacher: in training, where there is one."""
        return self.training and self.taught_by is not None

    @property
    def teaches_throughout(self) -> bool:
        """Whether the teacher runs in all of the training, or in an initialisation alone."""
        return True

    @property
    def parallel_branches(self) -> bool:
        """Whether no module is used by two branches, so that they may run at the same time."""
        return True

    @property
    def views(self) -> int:
        """Views of an image in a pass: in training one per student if `views_per_student`, else 1."""
        return len(self.cohort) if self.training and self.settings.views_per_student else 1

    def parameter_groups(self) -> list[ParameterGroup]:
        """Split the trainable parameters by weight decay; by default one group."""
        return [ParameterGroup("students", tuple(self.parameters()))]

    def alternating_updates(self) -> Sequence[Sequence[nn.Parameter]]:
        """Return the parameters that are updated one after the other within a step, each from a fresh forward pass.

        Empty: all at once. An update minimises the sum of all terms over its own parameters.
        """
        return ()

    def after_step(self) -> None:
        """Do what follows an update, such as a moving average; by default nothing."""

    def after_epoch(self) -> None:
        """Do what follows an epoch, such as new weights from gathered statistics; by default nothing.

        It is called after the evaluation and is in the epoch's checkpoint: it must not change predictions.
        """

    def between_epochs(self) -> None:
        """Do what comes before the first step of each epoch but the first; by default nothing.

        Such as a change of weights: the evaluation and the checkpoint of the epoch before do not see it.
        """

    def predictions(self, outputs: Outputs) -> dict[str, Logits]:
        """Name the logits to evaluate: of each student, of their ensemble, and the fused ones."""
        named = {f"student{index}": logits for index, logits in enumerate(outputs.logits)}
        if len(outputs.logits) > 1:
            named["ensemble"] = outputs.ensemble_logits
        if outputs.fused_logits is not None:
            named["fused"] = outputs.fused_logits
        return named

    def predictors(self) -> dict[str, nn.Module]:
        """Return a module for each name of `predictions`; it maps normalised images to the same logits."""
        students = [self.deployed_student(index) for index in range(len(self.cohort))]
        named: dict[str, nn.Module] = {f"student{index}": student for index, student in enumerate(students)}
        if len(students) > 1:
            named["ensemble"] = EnsembleNetwork(self.cohort, heads=[student.head for student in students])
        return named

    def attention_maps(self, images: Images) -> dict[str, AttentionMaps]:
        """Compute, for a report, how each predictor weights its last map; by default there is no attention.

        Args:
            images: Normalised, one view, on the method's device; the method is in evaluation mode.
        """
        return {}

    def deployed_student(self, index: int) -> Network:
        """Return a student as a plain network without peers, fusion and teacher."""
        return self.cohort[index]
