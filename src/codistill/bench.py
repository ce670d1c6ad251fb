"""How fast a training step is here, and against a plain PyTorch loop of the usual style, in turn in one process."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from codistill.config import RunConfig
from codistill.data.augment import Augmentation, DeviceImages, epoch_plan
from codistill.data.dataset import Split
from codistill.device import autocast, choose_algorithms, choose_device
from codistill.methods import Method
from codistill.optim import make_optimizer
from codistill.run import build_method, environment
from codistill.step import PlainStep, make_fleet

IMAGES, CLASSES, SIDE = 2048, 100, 32
STATISTICS = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
ROUNDS = 5


def images() -> Split:
    """Make random images of CIFAR-100's shape, always the same ones."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    return Split(pixels, random.integers(0, CLASSES, IMAGES))


class PlainImages(TorchDataset[tuple[Tensor, int]]):
    """The usual way: one image at a time, on the CPU, as torchvision's Pad, RandomCrop, flip and Normalize do it.

    Args:
        split: The images.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.mean, self.std = (torch.tensor(each)[:, None, None] for each in STATISTICS)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.split.images[index]).permute(2, 0, 1).float().div(255)
        image = torch.nn.functional.pad(image, (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = image[:, top : top + SIDE, left : left + SIDE]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image - self.mean) / self.std, int(self.split.labels[index])


def plain_loop(method: Method, config: RunConfig, device: torch.device) -> Callable[[int], None]:
    """Make the loop that papers' code has: DataLoader, eager step, `.item()` on loss and accuracy of each step."""
    settings = config.train
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
    loader = DataLoader(PlainImages(images()), batch_size=settings.batch_size, shuffle=True, drop_last=True)
    progress = torch.tensor(0.5, device=device)

    def run(steps: int) -> None:
        done = 0
        while True:
            for batch, labels in loader:
                batch, labels = batch.to(device), labels.to(device)
                optimizer.zero_grad()
                with autocast(device, settings.precision):
                    outputs = method(batch)
                loss = sum(method.losses(outputs, labels, progress).values(), torch.zeros((), device=device))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                loss.item()
                for logits in outputs.logits:
                    (logits.argmax(dim=1) == labels).float().mean().item()
                done += 1
                if done == steps:
                    return

    return run


def resident_loop(methods: list[Method], config: RunConfig, device: torch.device) -> Callable[[int], None]:
    """Make codistill's own loop: resident images, augmentation on the device, captured on CUDA."""
    settings = config.train
    augmentation = Augmentation()
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

    def run(steps: int) -> None:
        for step in range(steps):
            start = step % batches * size
            fleet([plan.part(start, start + size)] * len(members), progress)

    return run


def timed(run: Callable[[int], None], steps: int, device: torch.device) -> float:
    """Time some steps, seconds a step, with all of the device's work done before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / steps


def bench(config: RunConfig, runs: int = 1, compare: bool = False, seconds: float = 20.0) -> dict[str, Any]:
    """Measure training steps on random images of CIFAR-100's shape.

    Args:
        config: Method, networks, batch size, precision and device; its data set is not used.
        runs: How many independent runs train side by side.
        compare: Whether to measure the plain loop too, in turn with ours.
        seconds: About how long to measure, beside making ready.

    Returns:
        ms_per_step and images_per_second of each run, peak memory on CUDA and, with `compare`, the plain loop's and
        `ratio_to_plain`, our images per second over the plain loop's: the median over rounds of both in turn.
    """
    device = choose_device(config.train.device, config.train.precision)
    choose_algorithms(device, config.train.deterministic)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    size = config.train.batch_size

    def build() -> Method:
        return build_method(config, CLASSES, (SIDE, SIDE)).to(device).train()

    layout: Any = torch.channels_last
    loops = {"codistill": resident_loop([build().to(memory_format=layout) for _ in range(runs)], config, device)}
    if compare:
        loops["plain"] = plain_loop(build(), config, device)
    once = {}
    for name, run in loops.items():
        run(2 if device.type == "cpu" else 8)
        once[name] = timed(run, 1 if device.type == "cpu" else 8, device)
    share = seconds / ROUNDS / len(loops)
    rounds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(ROUNDS):
        for name, run in loops.items():
            rounds[name].append(timed(run, max(1, round(share / once[name])), device))
    own = statistics.median(rounds["codistill"])
    result: dict[str, Any] = {
        "method": config.method_name,
        "networks": list(config.networks),
        "batch_size": size,
        "precision": config.train.precision,
        "runs": runs,
        "ms_per_step": 1000 * own / runs,
        "images_per_second": size / own,
        "environment": environment(device),
    }
    if device.type == "cuda":
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    if compare:
        plain = statistics.median(rounds["plain"])
        ratios = [theirs / (ours / runs) for theirs, ours in zip(rounds["plain"], rounds["codistill"], strict=True)]
        result |= {
            "plain_ms_per_step": 1000 * plain,
            "plain_images_per_second": size / plain,
            "ratio_to_plain": statistics.median(ratios),
        }
    return result
