"""How fast a training step is here: against a plain PyTorch loop of the usual style, and against the device's floor."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from codistill.compiling import compile_parts
from codistill.config import RunConfig
from codistill.data.augment import Augmentation, DeviceImages, epoch_plan
from codistill.data.dataset import Split
from codistill.device import autocast, choose_algorithms, choose_device
from codistill.errors import UsageError
from codistill.host import set_up_cpu
from codistill.kernels import use_fused
from codistill.methods import Method
from codistill.optim import make_optimizer
from codistill.roofline import MACHINES, Roofline, machine_of, roofline
from codistill.run import build_method, environment
from codistill.step import PlainStep, make_fleet

IMAGES, CLASSES, SIDE, PADDING = 10_240, 100, 32, 4
STATISTICS = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
# Beside a GPU the plain loop's workers fill their queues while others are measured, so that turns must be long; on a
# CPU short turns see the same minute of a busy machine.
ROUNDS = {"cuda": 5, "cpu": 20}
STEPS_UNTIL_CAPTURED = 8
# As many as papers' code commonly starts beside a GPU; on a CPU they would take the cores from the training.
WORKERS_BESIDE_A_GPU = 4
OWN, PLAIN, DETERMINISTIC = "codistill", "plain", "deterministic"


def images() -> Split:
    """Make random images of CIFAR-100's shape, always the same ones."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    return Split(pixels, random.integers(0, CLASSES, IMAGES))


class PlainImages(TorchDataset[tuple[Tensor, int]]):
    """The usual way: one image at a time, on the CPU, in Pillow.

    What torchvision 0.29 does for RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and Normalize on the
    Pillow image that its CIFAR data sets give, copies included and checks of arguments left out, without importing it.

    Args:
        split: The images.
    """

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.split.images[index]), border=PADDING, fill=0)
        top, left = (int(torch.randint(0, 2 * PADDING + 1, size=(1,)).item()) for _ in range(2))
        image = image.crop((left, top, left + SIDE, top + SIDE))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
        mean, std = (torch.as_tensor(each).view(-1, 1, 1) for each in STATISTICS)
        return pixels.to(torch.float32).div(255).clone().sub_(mean).div_(std), int(self.split.labels[index])


@dataclass(frozen=True)
class Contestant:
    """A loop that is measured.

    Attributes:
        name: Its name in the result.
        train: Trains so many steps.
        deterministic: Which algorithms it uses, as in `choose_algorithms`.
    """

    name: str
    train: Callable[[int], None]
    deterministic: bool


def plain_loop(method: Method, config: RunConfig, device: torch.device) -> Callable[[int], None]:
    """Make the loop that papers' code has: DataLoader, eager step, `.item()` on loss and accuracy of each step."""
    settings, on_gpu = config.train, device.type == "cuda"
    optimizer = torch.optim.SGD(
        [
            {
                "params": list(group.parameters),
                "weight_decay": settings.weight_decay if group.weight_decay is None else group.weight_decay,
            }
            for group in method.parameter_groups()
        ],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
    )
    workers = WORKERS_BESIDE_A_GPU if on_gpu else 0
    loader = DataLoader(
        PlainImages(images()),
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=on_gpu,
    )
    progress = torch.tensor(0.5, device=device)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def train(steps: int) -> None:
        for _ in range(steps):
            batch, labels = (each.to(device, non_blocking=True) for each in next(batches))
            optimizer.zero_grad()
            with autocast(device, settings.precision):
                outputs = method(batch)
            loss = sum(method.losses(outputs, labels, progress).values(), torch.zeros((), device=device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()
            for logits in outputs.logits:
                (logits.argmax(dim=1) == labels).float().mean().item()

    return train


def resident_loop(methods: Sequence[Method], config: RunConfig, device: torch.device) -> Callable[[int], None]:
    """Make codistill's own loop: resident images, augmentation on the device, captured on CUDA."""
    settings = config.train
    augmentation = Augmentation(padding=PADDING)
    resident = DeviceImages(images(), STATISTICS, device)
    members = []
    for method in methods:
        optimizer = make_optimizer(
            method, settings.learning_rate, settings.momentum, settings.nesterov, settings.weight_decay
        )
        members.append(PlainStep(method, resident, augmentation, optimizer, settings.precision))
    fleet = make_fleet(members)
    plan = epoch_plan(IMAGES, 0, 0, augmentation, device, methods[0].views)
    progress = torch.tensor(0.5, device=device)
    size, batches = settings.batch_size, IMAGES // settings.batch_size

    def train(steps: int) -> None:
        for step in range(steps):
            start = step % batches * size
            fleet([plan.part(start, start + size)] * len(members), progress)

    return train


def timed(contestant: Contestant, steps: int, device: torch.device) -> float:
    """Time some steps, seconds a step, with all of the device's work done before and after."""
    choose_algorithms(device, contestant.deterministic)
    synchronise(device)
    started = time.perf_counter()
    contestant.train(steps)
    synchronise(device)
    return (time.perf_counter() - started) / steps


def synchronise(device: torch.device) -> None:
    """Wait for all of a GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds_in_turn(
    contestants: Sequence[Contestant], pace: Mapping[str, float], seconds: float, device: torch.device
) -> Mapping[str, list[float]]:
    """Measure the contestants in turn until the time is up, at least once each.

    Args:
        contestants: They have run before; on a GPU so often that what can be captured is.
        pace: About how long a step of each takes, seconds; later rounds go by the round before.
        seconds: How long to measure.
        device: Where they run.

    Returns:
        Seconds a step, one entry for each round.
    """
    share = seconds / ROUNDS[device.type] / len(contestants)
    rounds: dict[str, list[float]] = {each.name: [] for each in contestants}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or not rounds[contestants[-1].name]:
        for each in contestants:
            last = rounds[each.name][-1] if rounds[each.name] else pace[each.name]
            rounds[each.name].append(timed(each, max(1, round(share / last)), device))
    return rounds


class OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the operators that a step dispatches, backward and optimiser included, but for views and allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        allocates = func.name().split(".")[0] in ("aten::empty", "aten::empty_like", "aten::new_empty")
        self.operators += not (func.is_view or allocates)
        return func(*args, **(kwargs or {}))


def launches(contestant: Contestant, device: torch.device, table: Path | None) -> dict[str, int]:
    """Count what one step launches: kernels on CUDA, operators on a CPU.

    Args:
        contestant: A loop that has run before, so that a step that is captured is one replay.
        device: Where it runs.
        table: Where to write what took longest, as text; None: nowhere.
    """
    choose_algorithms(device, contestant.deterministic)
    found: dict[str, int] = {}
    if device.type == "cpu":
        with OperatorCount() as count:
            contestant.train(1)
        found["operators_per_step"] = count.operators
    if device.type == "cuda" or table:
        synchronise(device)
        on_gpu = device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as seen:
            contestant.train(1)
            synchronise(device)
        if on_gpu:
            kernels = [event for event in seen.events() or [] if event.device_type.name == "CUDA"]
            found["kernels_per_step"] = sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)
        if table:
            key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            text = seen.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=100)
            table.write_text(text, encoding="utf-8")
    return found


def floor(work: Roofline, config: RunConfig, milliseconds: float, device: torch.device) -> dict[str, Any]:
    """Give what a step has to do, and on devices whose constants are known the share of the floor that it reaches."""
    result: dict[str, Any] = {
        "parameters": work.parameters,
        "forward_mflop_per_image": work.forward_flop / 1e6,
        "kilobytes_per_image": {level: moved / 1e3 for level, moved in work.bytes_per_image._asdict().items()},
        "modelled_kernels_per_step": work.kernels._asdict(),
    }
    machine = machine_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if machine:
        least = work.milliseconds(config.train.batch_size, machine)
        result |= {"floor_ms_per_step": least, "share_of_floor": least / milliseconds}
    return result


def bench(
    config: RunConfig, runs: int = 1, compare: bool = False, seconds: float = 15.0, table: Path | None = None
) -> dict[str, Any]:
    """Measure training steps on random images of CIFAR-100's shape.

    Args:
        config: Method, networks, batch size, precision, device, compile and kernels; its data set is not used, and
            compile auto is off.
        runs: How many independent runs train side by side.
        compare: Whether to measure the plain loop too, and on CUDA the deterministic setting, in turn with ours.
        seconds: About how long to measure, beside making ready.
        table: A text file for what took longest in one step; None: none is written.

    Returns:
        Of each run, ms_per_step, images_per_second, operators_per_step (CPU) or kernels_per_step (CUDA) and, on CUDA,
        peak memory of all runs together; first_step_seconds from building the networks to the end of a first step;
        the work of a step, see `codistill.roofline`, with floor_ms_per_step and share_of_floor on an H100 or H200.
        With `compare`, the plain loop's speed and `ratio_to_plain`, our images per second over the plain loop's, and
        `deterministic_ratio`, those of the deterministic setting over ours: medians over rounds of all in turn.

    Raises:
        UsageError: The batch is larger than the images that are measured on, or several processes are to share it.
    """
    if config.train.processes > 1:
        raise UsageError("bench measures one process: leave --processes out")
    device = choose_device(config.train.device, config.train.precision)
    choose_algorithms(device, config.train.deterministic)
    set_up_cpu(config.train.threads, device)
    size, on_gpu = config.train.batch_size, device.type == "cuda"
    if size > IMAGES:
        raise UsageError(f"batch_size is {size}; bench has {IMAGES} images: use at most so many")

    def build() -> Method:
        return build_method(config, CLASSES, (SIDE, SIDE)).to(device).train()

    def own(name: str, deterministic: bool) -> Contestant:
        settings = replace(config.train, deterministic=deterministic)
        methods = [build() for _ in range(runs)]
        for method in methods:
            if settings.kernels == "fused":
                use_fused(method, device)
            # No steps: compile auto would take longer than it is measured for.
            compile_parts(method, settings, device, steps=0)
            method.to(memory_format=torch.channels_last)
        return Contestant(name, resident_loop(methods, config, device), deterministic)

    started = time.perf_counter()
    contestants = [own(OWN, config.train.deterministic)]
    pace = {OWN: timed(contestants[0], 1, device)}
    first_step = time.perf_counter() - started
    memory = {}
    if on_gpu:
        timed(contestants[0], STEPS_UNTIL_CAPTURED, device)
        memory["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        memory["peak_reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
    counted = {name: count // runs for name, count in launches(contestants[0], device, table).items()}
    if compare:
        contestants.append(Contestant(PLAIN, plain_loop(build(), config, device), config.train.deterministic))
        if on_gpu and not config.train.deterministic:
            contestants.append(own(DETERMINISTIC, True))
        pace |= {each.name: timed(each, STEPS_UNTIL_CAPTURED if on_gpu else 1, device) for each in contestants[1:]}
    rounds = rounds_in_turn(contestants, pace, seconds, device)
    step = {name: statistics.median(each) for name, each in rounds.items()}
    method = build()
    result: dict[str, Any] = {
        "method": config.method_name,
        "networks": list(config.networks),
        "batch_size": size,
        "precision": config.train.precision,
        "runs": runs,
        "ms_per_step": 1000 * step[OWN] / runs,
        "images_per_second": size / step[OWN],
        "first_step_seconds": first_step,
        **counted,
        **memory,
        **floor(roofline(method, (SIDE, SIDE), method.views), config, 1000 * step[OWN] / runs, device),
        "environment": environment(device),
    }
    if PLAIN in step:
        result |= {
            "plain_ms_per_step": 1000 * step[PLAIN],
            "plain_images_per_second": size / step[PLAIN],
            "ratio_to_plain": runs * ratio(rounds, PLAIN, OWN),
        }
    if DETERMINISTIC in step:
        result["deterministic_ratio"] = ratio(rounds, OWN, DETERMINISTIC)
    return result


def ratio(rounds: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """Divide the times of two contestants round by round, so that a busy minute strikes both; give the median."""
    pairs = zip(rounds[numerator], rounds[denominator], strict=True)
    return statistics.median(above / below for above, below in pairs)


def lines(result: Mapping[str, Any]) -> list[str]:
    """Write a result of `bench` for people."""
    step, work = result["ms_per_step"], result["kilobytes_per_image"]
    text = [f"{step:.2f} ms per step of a run, {result['images_per_second']:,.0f} images/s each"]
    if "ratio_to_plain" in result:
        text.append(
            f"plain loop: {result['plain_ms_per_step']:.2f} ms per step, "
            f"{result['plain_images_per_second']:,.0f} images/s; ours is {result['ratio_to_plain']:.2f} times as fast"
        )
    if "deterministic_ratio" in result:
        text.append(f"with --deterministic: {result['deterministic_ratio']:.2f} times that speed")
    for unit in ("kernels", "operators"):
        if f"{unit}_per_step" in result:
            text.append(f"{result[f'{unit}_per_step']:,} {unit} per step")
    text.append(
        f"{result['parameters']:,} parameters; an image takes {result['forward_mflop_per_image']:,.0f} MFLOP forward, "
        f"thrice that in training, and at least {work['floor']:,.0f} kB of memory traffic in bf16"
    )
    if "share_of_floor" in result:
        text.append(
            f"floor {result['floor_ms_per_step']:.2f} ms per step: {100 * result['share_of_floor']:.0f} % of it"
        )
    else:
        text.append(f"no share of the floor: its constants are known for {' and '.join(MACHINES)} only")
    if "peak_memory_mib" in result:
        text.append(f"peak memory {result['peak_memory_mib']:,.0f} MiB, reserved {result['peak_reserved_mib']:,.0f}")
    else:
        text.append("memory is measured on CUDA only")
    return text
