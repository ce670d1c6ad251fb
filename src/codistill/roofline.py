"""What a training step has to do at least: floating-point operations, bytes and kernels, counted from the networks."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from codistill.networks.network import parameter_count

aten = torch.ops.aten
ACTIVATIONS = (aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_)
POOLS = (aten.avg_pool2d, aten.max_pool2d_with_indices)
# Activations are bf16; weights, gradients, momentum and casts move 28 bytes a parameter and step.
VALUE_BYTES, PARAMETER_BYTES = 2, 28
# Tensors that one launch of the fused optimiser, and of a cast of many tensors, takes.
TENSORS_PER_UPDATE, TENSORS_PER_CAST = 30, 40
# No parameter has such an axis: a tensor that has it is an activation.
PROBE_BATCH = 1_000_003


class Levels(NamedTuple):
    """One number for each of three ways to write the same step.

    Attributes:
        floor: Ideal kernels: batch statistics in the epilogue of a convolution, normalisation and ReLU in the prologue
            of the next one, both gradients of a convolution in one kernel, no copies for concatenation.
        fused: What a compiler makes of PyTorch: convolutions and their two gradients apart, and four passes of batch
            normalisation (statistics; normalise, ReLU and sum; two backward).
        eager: One kernel for each operator, casts of single weights included.
    """

    floor: float = 0
    fused: float = 0
    eager: float = 0

    def plus(self, other: "Levels", times: float = 1) -> "Levels":
        """Add another count, so many times."""
        return Levels(*(own + times * more for own, more in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Machine:
    """What a device sustains.

    Attributes:
        bytes_per_second: Memory traffic of large kernels.
        flop_per_second: Dense bf16 matrix products of large kernels.
        kernel_seconds: The time that a kernel takes however little it does.
    """

    bytes_per_second: float
    flop_per_second: float
    kernel_seconds: float = 2e-6


# Nine tenths of the nominal memory bandwidth (3.35 and 4.8 TB/s), eight tenths of the nominal 989 TFLOP/s.
MACHINES: Mapping[str, Machine] = {"H100": Machine(3.0e12, 8.0e14), "H200": Machine(4.3e12, 8.0e14)}


def machine_of(device_name: str) -> Machine | None:
    """Find the constants of a device by its name; None where nobody has determined them."""
    return next((machine for name, machine in MACHINES.items() if name in device_name), None)


@dataclass(frozen=True)
class Roofline:
    """The work of one training step, whatever the batch size.

    Attributes:
        parameters: Trained numbers, each shared one once.
        forward_flop: Floating-point operations of the forward pass for one image, a multiply-add being two. The
            backward pass has twice as many.
        bytes_per_image: Memory traffic of activations, forward and backward.
        kernels: Kernels of a step.
        products: (bytes, operations) for one image of each convolution and matrix product of the `fused` level.
    """

    parameters: int
    forward_flop: float
    bytes_per_image: Levels
    kernels: Levels
    products: tuple[tuple[float, float], ...]

    def milliseconds(self, batch_size: int, machine: Machine) -> float:
        """Give the additive floor of a step: the sum over `fused` kernels of launch time + max(memory, arithmetic).

        Kernels that run at the same time, as those of several runs in one CUDA graph do, can stay below it.

        Args:
            batch_size: Images.
            machine: Constants of the device.
        """
        rate, speed = machine.bytes_per_second, machine.flop_per_second
        passes = self.bytes_per_image.fused - sum(moved for moved, _ in self.products)
        seconds = batch_size * (passes / rate + sum(max(moved / rate, flop / speed) for moved, flop in self.products))
        seconds += self.parameters * PARAMETER_BYTES / rate + self.kernels.fused * machine.kernel_seconds
        return 1000 * seconds


class StepAccount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count while a forward pass runs on the meta device. N is a map's elements, C those of a concatenation's input.

    | operator | elements moved, floor | fused | eager | kernels, floor | fused | eager |
    |---|---|---|---|---|---|---|
    | convolution, matrix product | 3 in + 3 out | the same | the same | 3 | 3 | 7 |
    | batch normalisation (+ ReLU where fused) | - | 10 N | 8 N | - | 4 | 6 |
    | ReLU | - | - | 5 N | - | - | 2 |
    | sum of two maps, right behind batch normalisation | 4 N | 2 N | 6 N | - | - | 2 |
    | sum of two maps elsewhere | 4 N | 4 N | 6 N | - | 1 | 2 |
    | concatenation, C without its last part | 4 C | 3 C | 5 C | - | 2 | 2 |
    | pooling by windows | 2 in + 2 out | the same | the same | 2 | 2 | 2 |
    | any other that touches a map | - | 2 in + 2 out | the same | - | 2 | 2 |
    | any other | - | - | 2 in + 2 out | - | - | 2 |

    A convolution of the images themselves has no gradient for its input. A bias is one kernel more for its gradient.
    To these come 5, 7 and 15 kernels of a step for augmentation, loss and metrics, the fused optimiser, and the casts
    of weights and gradients.

    Args:
        images: What the forward pass will get.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = Levels()
        self.kernels = Levels(5, 7, 15)
        self.products: list[tuple[float, float]] = []
        self.forward_flop = 0.0
        self._kinds = {id(images): "images"}
        # Python gives the id of a tensor that is gone to the next one.
        self._alive: list[Any] = [images]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _activations(args), _activations((result,))
        self._alive += [*inputs, *outputs]
        kinds = {self._kinds.get(id(each), "") for each in inputs}
        kind = str(func.overloadpacket)
        if func.is_view:
            kind = next(iter(kinds), "")
        elif outputs:
            self._count(func.overloadpacket, args, inputs, outputs, kinds)
        self._kinds |= {id(each): kind for each in outputs}
        return result

    def _count(
        self, operator: Any, args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor], kinds: set[str]
    ) -> None:
        before, behind = _elements(inputs), _elements(outputs)
        if operator is aten.convolution:
            weight = args[1]
            self._product(before, behind, 2 * behind * weight[0].numel(), args[2] is not None, "images" in kinds)
        elif operator in (aten.mm, aten.addmm):
            self._product(before, behind, 2 * before * outputs[0].shape[1], operator is aten.addmm)
        elif operator is aten.native_batch_norm:
            self._pass(behind, (0, 10, 8), (0, 4, 6))
        elif operator in ACTIVATIONS and outputs[0].dim() == 4:
            self._pass(behind, (0, 0, 5), (0, 0, 2))
        elif operator in (aten.add, aten.add_) and before == 2 * behind and outputs[0].dim() == 4:
            fused = str(aten.native_batch_norm) in kinds
            self._pass(behind, (4, 2 if fused else 4, 6), (0, 0 if fused else 1, 2))
        elif operator is aten.cat and outputs[0].dim() == 4:
            self._pass(_elements(inputs[:-1]), (4, 3, 5), (0, 2, 2))
        elif operator in POOLS:
            self._pass(before + behind, (2, 2, 2), (2, 2, 2))
        else:
            on_map = any(each.shape[2:].numel() > 1 for each in (*inputs, *outputs))
            self._pass(before + behind, (0, 2 if on_map else 0, 2), (0, 2 if on_map else 0, 2))

    def _pass(self, elements: float, moved: tuple[int, int, int], kernels: tuple[int, int, int]) -> None:
        self.bytes = self.bytes.plus(Levels(*moved), elements * VALUE_BYTES)
        self.kernels = self.kernels.plus(Levels(*kernels))

    def _product(self, before: float, behind: float, flop: float, bias: bool, first: bool = False) -> None:
        self.forward_flop += flop
        self.products += [((before + behind) * VALUE_BYTES, flop)] * (2 if first else 3)
        # Without a gradient for the input, the floor's one backward kernel only spares writing it.
        moved = Levels(2 * before + 3 * behind, *[2 * before + 2 * behind] * 2) if first else None
        self.bytes = self.bytes.plus(moved or Levels(*[3 * (before + behind)] * 3), VALUE_BYTES)
        self.kernels = self.kernels.plus(Levels(3, 2 + bias if first else 3 + bias, 6 + bias if first else 7 + bias))


def _activations(values: Any) -> list[Tensor]:
    """Find tensors of one row for each probe image, which may stand behind an axis of views."""
    if isinstance(values, Tensor):
        return [values] if any(size and size % PROBE_BATCH == 0 for size in values.shape[:2]) else []
    return [each for value in values for each in _activations(value)] if isinstance(values, (tuple, list)) else []


def _elements(tensors: Sequence[Tensor]) -> float:
    return sum(each.numel() for each in tensors) / PROBE_BATCH


def roofline(module: nn.Module, image_size: tuple[int, int] = (32, 32), views: int = 1) -> Roofline:
    """Count the work of training a network, or a method with all its students, without computing anything.

    A trunk that students share counts once, branches and modules of the method as its forward pass runs them; losses
    of further students, and second forward passes of methods that update students in turn, are left out.

    Args:
        module: A network or a method; copied, not changed.
        image_size: Height and width, pixels.
        views: Views of an image that a step sees, `Method.views`.
    """
    probe = copy.deepcopy(module).to("meta").train()
    shape = (PROBE_BATCH, 3, *image_size)
    images = torch.empty(shape if views == 1 else (views, *shape), device="meta")
    with torch.no_grad(), StepAccount(images) as account:
        probe(images)
    tensors = sum(1 for _ in module.parameters())
    updates, casts = math.ceil(tensors / TENSORS_PER_UPDATE), 2 * math.ceil(tensors / TENSORS_PER_CAST)
    return Roofline(
        parameters=parameter_count(module),
        forward_flop=account.forward_flop,
        bytes_per_image=account.bytes,
        kernels=account.kernels.plus(Levels(updates, updates + casts, 3 * updates + casts)),
        products=tuple(account.products),
    )
