"""A recipe for a data set of which nothing else is known: each choice with its reason."""

import inspect
import io
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from codistill.core.errors import DataError
from codistill.core.host import cores
from codistill.core.registry import parse_spec, with_options
from codistill.data.dataset import DATASETS, Dataset, dataset
from codistill.data.images import FIX, FORMATS, MAX_FILE, decode_image
from codistill.data.listing import Listed, listed_by
from codistill.data.metadata import ORIENTATION
from codistill.data.splitting import part_of
from codistill.data.untrusted import read_file
from codistill.methods import METHODS
from codistill.networks import network
from codistill.networks.probe import forward_flop

PROBED = 1000  # images whose size is looked at
PASSES, LEAST_PASSES, MOST_PASSES = 2_000_000, 30, 200  # images seen in all; epochs
CPU_MINUTES, LEAST_CPU_PASSES = 30, 10
CORE_FLOPS = 50e9  # of float32 training a second, about what a core of 2023 does; what a run really takes is measured
SIDES = {"cpu": 64, "cuda": 64}  # of images that are made smaller, pixels
NETWORKS = {"cpu": "resnet20", "cuda": "resnet32"}


@dataclass(frozen=True)
class Known:
    """What is looked up of a data set: its training images, about, their size, and whether they may be made smaller.

    Attributes:
        images: Number of training images.
        size: Height and width, pixels, of all or, where they are unlike, of most.
        alike: Whether all that were looked at have that size.
        resized: Whether images become another size where the data set is told so.
        validation: Whether it has validation images of its own.
    """

    images: int
    size: tuple[int, int]
    alike: bool = True
    resized: bool = False
    validation: bool = False

    @property
    def text(self) -> str:
        """The images as text."""
        height, width = self.size
        size = f"of {height}x{width} pixels" if self.alike else f"of several sizes, mostly {height}x{width} pixels"
        return f"{'about ' if self.resized else ''}{self.images:,} training images {size}"


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen, and why."""

    key: str
    value: Any
    reason: str


def look_up(spec: str, root: str | None) -> Known:
    """Look up what a recipe depends on; of image files, headers of some are read and nothing is decoded.

    Raises:
        UsageError: Unknown data set, or one that needs the path of its files.
        DataError: No images there, or none that can be read.
    """
    name, options = parse_spec(spec)
    resizable = "resize" in inspect.signature(DATASETS[name]).parameters and not options.get("resize")
    found = listed_by(lambda: dataset(spec, root)) if resizable else dataset(spec, root)
    if isinstance(found, Dataset):
        return Known(len(found.train), found.image_size, validation=found.validation is not None)
    place, parts = found
    listed = parts["train"]
    positions = range(0, len(listed), math.ceil(len(listed) / PROBED)) if len(listed) else ()
    sizes = Counter(size for position in positions if (size := header_size(place, listed, position)))
    if not sizes:
        first = f", such as {listed.names[0]}" if listed.names else ""
        raise DataError(f"{root}: none of the images that were looked at can be read{first}")
    return Known(len(listed), sizes.most_common(1)[0][0], len(sizes) == 1, True, "validation" in parts)


def header_size(place: Path, listed: Listed, position: int) -> tuple[int, int] | None:
    """Return height and width of a listed image as it will be decoded, pixels, by its header; None: it has none."""
    path = place / listed.names[position]
    try:
        content = None if listed.read is None else listed.read(position)
        try:
            with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
                lies = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.width, image.height) if lies else (image.height, image.width)
        except UnidentifiedImageError:  # a HEIC picture is decoded
            pixels = decode_image(read_file(path, MAX_FILE, FIX) if content is None else content, str(path))
            return pixels.shape[0], pixels.shape[1]
    except (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def automatic(known: Known, spec: str, given: Mapping[str, Any], method: str) -> tuple[Choice, ...]:
    """Choose a recipe for a data set.

    Args:
        known: What is known of it.
        spec: Its name, with options.
        given: Settings that the user has chosen, by key; they are kept, and others chosen to go with them.
        method: Name of the method.

    Returns:
        Data set (with a size), networks, epochs, batch size, whether the last batch is dropped, learning rate,
        schedule, weight decay, validation images, augmentation and precision, as far as they were not given.
    """
    device = given.get("device", "auto")
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    kind = "cuda" if gpu else "cpu"
    chosen = dict(given)
    choices: list[Choice] = []

    def choose(key: str, value: Any, reason: str) -> Any:
        if key not in given:
            choices.append(Choice(key, value, reason))
            chosen[key] = value
        return chosen[key]

    side = _side(known, SIDES[kind])
    if side and known.resized:
        why = "unlike sizes become one" if not known.alike else "larger ones take long to train on"
        if min(known.size) >= 2 * side:
            why += f"; --data {with_options(spec, resize=str(2 * side))} keeps more"
        choices.append(Choice("data", with_options(spec, resize=str(side)), why))
    size = (side, side) if side and known.resized else known.size
    students = max(2, METHODS[method].min_students)
    if METHODS[method].max_students is not None:
        students = min(students, METHODS[method].max_students or students)
    where = "a GPU" if gpu else f"{cores()} CPU core{'s' if cores() > 1 else ''}"
    networks = choose("networks", (NETWORKS[kind],) * students, f"small enough for {where}; they teach each other")
    images = given.get("train_limit") or known.images
    left = known.images - (given.get("train_limit") or 0)
    if not known.validation and images >= 200 and part_of(known.images, "10%") <= left:
        choose("validation", "10%", "chooses the student to deploy; the test images only judge it")
    batch = choose("batch_size", 128 if images >= 4000 else 64 if images >= 1000 else 32, _steps(images))
    trained = given.get("train_limit") or images - part_of(images, chosen.get("validation") or 0)
    if trained > batch and trained % batch == 1:
        choose("drop_last", True, "the last batch of an epoch would be one image, too few for batch normalisation")
    epochs = choose("epochs", *_epochs(images, forward_flops(networks, size), gpu))
    if given.get("optimizer") == "adamw":
        choose("learning_rate", 0.001, "usual for adamw")
    else:
        choose("learning_rate", 0.1 * batch / 128, "0.1 for 128 images, in proportion to the batch")
    if chosen.get("milestones") is None:
        choose("schedule", "cosine", "falls smoothly to 0, whatever the number of epochs")
    if epochs > 1:
        choose("warm_up", max(1, round(epochs / 20)), "a twentieth of the epochs")
    choose("weight_decay", 5e-4, "usual for training from the beginning")
    if known.resized and epochs >= 100:
        choose("auto_augment", "trivialaugment", "so many passes over photos would be learnt by heart")
    choose("precision", "auto", "bf16 where the device computes it fast, else float32")
    return tuple(choices)


def _side(known: Known, largest: int) -> int:
    """Return the side of the square that images become, pixels; 0: they stay as they are."""
    if known.alike and max(known.size) <= largest:
        return 0
    return max(32, min(largest, min(known.size) // 8 * 8))


def _steps(images: int) -> str:
    return "many images" if images >= 4000 else "few images: smaller batches make more steps of them"


def _epochs(images: int, flops: float, gpu: bool) -> tuple[int, str]:
    """Return a number of epochs and its reason."""
    wanted = min(MOST_PASSES, max(LEAST_PASSES, PASSES // images))
    fit = int(CPU_MINUTES * 60 * CORE_FLOPS * cores() / (3 * flops * images))
    if gpu or fit >= wanted:
        return wanted, f"{wanted * images:,} images seen in all"
    least = max(LEAST_CPU_PASSES, fit)
    return least, f"about what {CPU_MINUTES} minutes of this CPU allow; {wanted} would be better"


def forward_flops(networks: tuple[str, ...], size: tuple[int, int]) -> int:
    """Return floating-point operations of a forward pass of some networks on one image."""
    return sum(forward_flop(network(spec, 10).eval(), size) for spec in networks)


def shown(known: Known, choices: tuple[Choice, ...]) -> list[str]:
    """Return lines that name the choices with their reasons."""
    if not choices:
        return []
    texts = [(each.key, " ".join(each.value) if isinstance(each.value, tuple) else f"{each.value}") for each in choices]
    wide, wider = (max(len(text[index]) for text in texts) for index in (0, 1))
    lines = [f"recipe for {known.text} (a flag overrides each choice):"]
    lines += [
        f"  {'--' + key.replace('_', '-'):{wide + 2}}  {value:{wider}}  {each.reason}"
        for (key, value), each in zip(texts, choices, strict=True)
    ]
    return lines
