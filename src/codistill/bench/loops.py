"""The training loops that `codistill bench` measures, ours and that of papers' code, and the images they train on."""

import os
from collections.abc import Callable, Sequence
from itertools import chain, repeat

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from codistill.core.device import autocast
from codistill.core.errors import UsageError
from codistill.data.augment import Augmentation, DeviceImages
from codistill.data.dataset import Dataset, Split
from codistill.methods import Method
from codistill.networks.chains import compiled_chains
from codistill.settings.augment import AugmentSettings
from codistill.settings.config import RunConfig
from codistill.training.capture import make_fleet
from codistill.training.step import make_step

IMAGES, CLASSES, SIDE = 10_240, 100, 32
# As many as papers' code commonly starts beside a GPU; on a CPU they would take the cores from the training.
WORKERS_BESIDE_A_GPU = 4


def random_images() -> Dataset:
    """Make random images of CIFAR-100's shape, always the same ones."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    train = Split(pixels, random.integers(0, CLASSES, IMAGES))
    return Dataset("random images", train, train, tuple(map(str, range(CLASSES))))


class PlainImages(TorchDataset[tuple[Tensor, int]]):
    """The usual way: one image at a time, on the CPU, in Pillow, without importing torchvision.

    Source: torchvision 0.29: RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and Normalize, copies included.
    Differs: Arguments are not checked. The padding is that of the augmentation, and always black.
    """

    def __init__(self, data: Dataset, augmentation: Augmentation) -> None:
        self.split, self.statistics, self.augmentation = data.train, data.statistics, augmentation

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, padding = Image.fromarray(self.split.images[index]), self.augmentation.padding
        width, height = image.size
        top, left = (int(torch.randint(0, 2 * padding + 1, size=(1,)).item()) for _ in range(2))
        image = ImageOps.expand(image, border=padding, fill=0).crop((left, top, left + width, top + height))
        if self.augmentation.flip and torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
        mean, std = (torch.as_tensor(each).view(-1, 1, 1) for each in self.statistics)
        return pixels.to(torch.float32).div(255).clone().sub_(mean).div_(std), int(self.split.labels[index])


def refuse_unlike_work(method: Method, config: RunConfig) -> None:
    """Refuse to compare with the plain loop where it would do less in a step than ours."""
    settings = config.train
    less = {
        f"a view of each image for each student, as {config.method_name} has": method.views > 1,
        "alternating updates (method.update)": bool(method.alternating_updates()),
        "optimizer adamw": settings.optimizer != "sgd",
        "ema_decay": settings.ema_decay > 0,
        "clip_norm": settings.clip_norm is not None,
        "settings of augmentation, labels and sampling": config.augment != AugmentSettings(),
    }
    if lacks := [what for what, is_there in less.items() if is_there]:
        raise UsageError(f"--compare: the plain loop does not have {lacks[0]}: leave out one of the two")


def plain_loop(method: Method, config: RunConfig, device: torch.device, data: Dataset) -> Callable[[int], None]:
    """Make the loop that papers' code has: DataLoader, eager step, `.item()` on loss and accuracy of each step."""
    settings, on_gpu, groups = config.train, device.type == "cuda", method.parameter_groups()
    decays = [settings.weight_decay if each.weight_decay is None else each.weight_decay for each in groups]
    optimizer = torch.optim.SGD(
        [{"params": list(each.parameters), "weight_decay": decay} for each, decay in zip(groups, decays, strict=True)],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
    )
    workers = min(WORKERS_BESIDE_A_GPU, os.cpu_count() or 1) if on_gpu else 0
    loader = DataLoader(
        PlainImages(data, settings.augmentation(data)),
        batch_size=min(settings.batch_size, len(data.train)),
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=on_gpu,
    )
    progress, batches = torch.tensor(0.5, device=device), chain.from_iterable(repeat(loader))

    @compiled_chains(None)
    def train(steps: int) -> None:
        for _ in range(steps):
            batch, labels = (each.to(device, non_blocking=True) for each in next(batches))
            optimizer.zero_grad()
            with autocast(device, config.execution.precision):
                outputs = method(batch)
            loss = sum(method.losses(outputs, labels, progress).values(), torch.zeros((), device=device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss.item()
            for logits in outputs.logits:
                (logits.argmax(dim=1) == labels).float().mean().item()

    return train


def resident_loop(
    methods: Sequence[Method],
    config: RunConfig,
    device: torch.device,
    data: Dataset,
    memory_format: torch.memory_format | None = None,
) -> Callable[[int], None]:
    """Make codistill's own loop, which moves methods to a device: resident images, captured steps on CUDA.

    `memory_format` of the weights; None: what a training would choose.
    """
    resident, precision = DeviceImages(data.train, data.statistics, device), config.execution.precision
    augmentation = config.augmentation(data)
    for method in methods if memory_format is None else ():
        method.choose_memory_format(resident.batch(0, 1)[0])
    members = [
        make_step(method, resident, augmentation, config.train, precision, memory_format=memory_format)
        for method in methods
    ]
    fleet = make_fleet(members)
    plan = resident.epoch(0, 0, augmentation, methods[0].views)
    progress = torch.tensor(0.5, device=device)
    size = min(config.train.batch_size, len(resident))
    batches = len(resident) // size

    def train(steps: int) -> None:
        for step in range(steps):
            start = step % batches * size
            fleet([plan.part(start, start + size)] * len(members), progress, range(len(members)))

    return train
