"""Try a run's method on two images before anything is written: what cannot train is refused in one line."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from codistill.core.device import autocast
from codistill.core.errors import CodistillError, UsageError, in_words
from codistill.data.augment import Augmentation, DeviceImages, epoch_indices
from codistill.data.dataset import Dataset, Split
from codistill.methods import Method
from codistill.networks.probe import count_classes, label, odd_types, probing, stage_maps
from codistill.settings.config import TrainSettings
from codistill.training.rehearsal import rehearse
from codistill.training.step import make_step

IMAGES = 2  # the fewest that batch normalisation can use
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal}
MASKS = (torch.bool, torch.uint8)


def try_method(
    method: Method,
    data: Dataset,
    settings: TrainSettings,
    precision: str,
    device: torch.device,
    augmentation: Augmentation,
) -> None:
    """Train and evaluate a copy of a method on two images, as the run will, and choose the method's memory format.

    The method itself, its statistics and all random numbers stay as they are. On CUDA a method that reads values on the
    host in its pass is marked as one that cannot be captured as a graph.

    Raises:
        UsageError: Students, method and data do not go together.
    """
    transforms = augmentation.transforms
    few = DeviceImages(Split(data.train.images[:IMAGES], data.train.labels[:IMAGES]), data.statistics, device)
    names = " + ".join(map(label, method.cohort))
    height, width = data.image_size
    try:
        check_networks(method, data, few)
        rehearse(method, data, settings.epochs, device, transforms is not None and transforms.softens)
        try:
            reads = train_and_evaluate(method, few, settings, precision, augmentation)
        except RuntimeError:
            method.choose_memory_format(few.normalised(few.images))
            if method.memory_format == torch.channels_last:
                raise
            reads = train_and_evaluate(method, few, settings, precision, augmentation)
    except (CodistillError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        check_networks(method, data, few, training=True)  # which has better words
        raise UsageError(
            f"{method.name} with {names} cannot be trained on {height}x{width} images: {in_words(error)}"
            f"{odd_types(method)}{odd_widths(method, few)}"
        ) from error
    if reads and method.capturable:
        method.capturable = False


def check_networks(method: Method, data: Dataset, few: DeviceImages, training: bool = False) -> None:
    """Refuse networks whose outputs are not maps and logits, and unlike numbers of classes.

    In float32, in which predictors are deployed.
    """
    pixels, shared = few.normalised(few.images).contiguous(), method.cohort.shared_stages
    for student in method.cohort:
        name = label(student)
        if any(not isinstance(each, Tensor) for each in student.state_dict(keep_vars=True).values()):
            raise UsageError(f"network {name}: its state has more than tensors (get_extra_state), which is not saved")
        if any(each.is_inference() for each in (*student.parameters(), *student.buffers())):
            raise UsageError(f"network {name} was made within torch.inference_mode: make it outside")
        with probing(student, few.device) as probe, torch.no_grad():
            maps = stage_maps(probe.train(training), pixels)
            classes = count_classes(probe.head, maps[-1], f"network {name}: the head")
            parts, entered = [*probe.stages, probe.head], [pixels, *maps][shared]
            version = entered._version
            parts[shared](entered)
            if entered._version > version and len(method.cohort) > 1:
                part = f"stage {shared}" if shared < len(maps) else "the head"
                raise UsageError(f"network {name}: {part} writes to its input, which others read: use inplace=False")
        if classes != data.num_classes:
            raise UsageError(f"network {name} has {classes} classes, but data set {data.name} {data.num_classes}")
    if method.num_classes != data.num_classes:
        made, has = method.num_classes, data.num_classes
        raise UsageError(f"{method.name} was made for {made} classes, but data set {data.name} has {has}")


def train_and_evaluate(
    method: Method, few: DeviceImages, settings: TrainSettings, precision: str, augmentation: Augmentation
) -> list[str]:
    """Train a copy of a method for a step, evaluate it, and return what no CUDA graph can do.

    These are operators that read on the host, and layers that assign a buffer instead of writing into it.
    """
    reads = HostReads()
    with probing(method, few.device) as probe, torch.enable_grad():
        step = make_step(probe, few, augmentation, settings, precision)
        buffers = {name: id(each) for name, each in probe.named_buffers()}
        indices = epoch_indices(len(few), 0, 0, augmentation, few.device, probe.views)
        with reads if few.device.type == "cuda" else contextlib.nullcontext():
            for initialising in (True, False) if method.initial_epochs(settings.epochs) else (False,):
                probe.initialising = initialising
                step.update(*few.augmented(indices, augmentation), torch.zeros((), device=few.device), 1.0)
                probe.after_step()
            with torch.no_grad(), autocast(few.device, precision):
                probe.eval().predictions(probe(few.normalised(few.images)))
        assigned = [name for name, each in probe.named_buffers() if id(each) != buffers.get(name)]
    return reads.found + assigned


def odd_widths(method: Method, few: DeviceImages) -> str:
    """Return a remark on maps that are not [batch, channels, height, width], or whose width is not what was named."""
    for student in method.cohort:
        with probing(student, few.device) as probe, torch.no_grad():
            maps = stage_maps(probe.eval(), few.normalised(few.images).contiguous())
        for index, (each, width) in enumerate(zip(maps, student.widths, strict=True)):
            if each.ndim != 4 or each.shape[1] != width:
                form = ", ".join(map(str, ("batch", *each.shape[1:])))
                return f" (stage {index} of {label(student)} returns [{form}], and its width was named as {width})"
    return ""


class HostReads(TorchDispatchMode):
    """Find the operators that make the host wait for values, which a CUDA graph cannot do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = packet is aten.index and any(each is not None and each.dtype in MASKS for each in args[1])
        if masks or packet in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
