"""Measure what augmentation adds to a training step on a CPU, and draw a picture of augmented images.

    python benchmarks/augmentation.py --out results/augmentation-cpu
    python benchmarks/augmentation.py --picture docs/augmentation.png --data packed --data-dir cifar100.npz

Steps of MFEF on two ResNet-20, batches of 128 random images of CIFAR's size, one thread, without and with each kind of
augmentation, in turn in one process. Counted are the processor's seconds, which other programs hardly change. The ratio
is the median over the rounds of a step with it over one without.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro

from codistill.bench.loops import CLASSES, SIDE, random_images
from codistill.data.augment import DeviceImages
from codistill.data.dataset import dataset
from codistill.runs.metadata import environment
from codistill.settings.augment import AugmentSettings
from codistill.settings.build import build_method
from codistill.settings.config import default_config
from codistill.training.step import make_step

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "crops and flips": {},
    "randaugment": {"auto_augment": "randaugment"},
    "randaugment and mixup": {"auto_augment": "randaugment", "mixup": 0.2},
    "trivialaugment": {"auto_augment": "trivialaugment"},
    "resized_crop": {"resized_crop": 0.3},
    "color_jitter": {"color_jitter": 0.4},
    "random_erasing": {"random_erasing": 0.25},
    "cutmix": {"cutmix": 1.0},
    "label_smoothing": {"label_smoothing": 0.1},
}
COLUMNS = 16
"""Images in a row of the picture."""


@dataclass(frozen=True)
class Options:
    """Options of the measurement or of the picture."""

    out: Path | None = None
    """Folder for measured.json."""
    picture: Path | None = None
    """PNG to draw instead."""
    data: str = "digits"
    """Images of the picture."""
    data_dir: str | None = None
    """Where they are."""
    network: str = "resnet20"
    batch_size: int = 128
    rounds: int = 9


def measure(options: Options) -> dict[str, Any]:
    """Time a step of each kind in turn."""
    torch.set_num_threads(1)
    data = random_images()
    images = DeviceImages(data.train, data.statistics, CPU)

    def loop(settings: dict[str, Any]) -> Callable[[int], tuple[float, float]]:
        config = default_config("mfef")
        networks = (options.network, options.network)
        config = dataclasses.replace(config, networks=networks, augment=AugmentSettings(**settings))
        augmentation = config.augmentation(data)
        step = make_step(build_method(config, CLASSES, (SIDE, SIDE)), images, augmentation, config.train)
        plan, progress = images.epoch(0, 0, augmentation, 1), torch.tensor(0.5)

        def seconds(number: int) -> tuple[float, float]:
            start = number * options.batch_size % (len(images) - options.batch_size)
            batch, started = plan.part(start, start + options.batch_size), time.process_time()
            step(batch, progress)
            trained = time.process_time()
            images.augmented(batch, augmentation)
            return trained - started, time.process_time() - trained

        seconds(0)
        return seconds

    loops = {name: loop(settings) for name, settings in KINDS.items()}
    rounds = [{name: run(number) for name, run in loops.items()} for number in range(1, options.rounds + 1)]
    plain = next(iter(KINDS))
    kinds = {
        name: {
            "settings": KINDS[name],
            "step_ms": 1000 * statistics.median(each[name][0] for each in rounds),
            "of_it_images_ms": 1000 * statistics.median(each[name][1] for each in rounds),
            "step_over_step_without": statistics.median(each[name][0] / each[plain][0] for each in rounds),
        }
        for name in KINDS
    }
    return {
        "networks": [options.network] * 2,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "kinds": kinds,
        "load": os.getloadavg()[0],
        "environment": environment(CPU),
    }


def draw(options: Options) -> None:
    """Draw the same images in each row, augmented in one way a row."""
    from PIL import Image, ImageDraw

    assert options.picture is not None
    data = dataset(options.data, options.data_dir)
    images = DeviceImages(data.train, ((0.0,) * 3, (1.0,) * 3), CPU).subset(torch.arange(COLUMNS))
    height, width = data.image_size
    scale, left = max(1, 40 // height), 150
    rows = [name for name in KINDS if name != "label_smoothing"]
    sheet = Image.new("RGB", (left + COLUMNS * (scale * width + 2), len(rows) * (scale * height + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        config = dataclasses.replace(default_config("mfef"), augment=AugmentSettings(**KINDS[name]))
        augmentation = config.augmentation(data)
        batch, _ = images.augmented(images.epoch(0, 0, augmentation, 1), augmentation)
        pixels = (batch.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        top = row * (scale * height + 2)
        pen.text((4, top + scale * height // 2 - 5), name, fill="black")
        for column, each in enumerate(pixels):
            tile = Image.fromarray(each).resize((scale * width, scale * height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (scale * width + 2), top))
    sheet.quantize(256).save(options.picture, optimize=True)


def main(options: Options) -> None:
    """Measure, or draw."""
    if options.picture is not None:
        draw(options)
        return
    found = measure(options)
    for name, each in found["kinds"].items():
        print(
            f"{name:24} step {each['step_ms']:7.1f} ms, of it images {each['of_it_images_ms']:5.1f} ms, "
            f"{each['step_over_step_without']:.3f} of a step with crops and flips alone"
        )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "measured.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
