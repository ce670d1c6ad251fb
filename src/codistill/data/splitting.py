"""Images that are held out of others: of each class its share, drawn by a seed."""

import re

import numpy as np
import numpy.typing as npt

from codistill.core.errors import UsageError
from codistill.data.augment import seeded_order
from codistill.data.dataset import Labels

Positions = npt.NDArray[np.int64]


def checked_part(name: str, part: int | str) -> None:
    """Raise `UsageError` for a part of images that is neither a number of them, at least 0, nor a percentage."""
    if not isinstance(part, int) and not (re.fullmatch(r"\d{1,2}(\.\d{1,9})?%", part, re.ASCII) and float(part[:-1])):
        either = "a whole number, or a percentage between 0 and 100 as 20%"
        raise UsageError(f"{name} is {part!r}; it must be {either}")
    if isinstance(part, int) and part < 0:
        raise UsageError(f"{name} is {part}; it must be at least 0")


def part_of(images: int, part: int | str) -> int:
    """Return how many of so many images a part is, with a percentage at least one."""
    return part if isinstance(part, int) else max(1, round(images * float(part[:-1]) / 100))


def divided(labels: Labels, held_out: int, seed: int) -> tuple[Positions, Positions]:
    """Divide images into those that stay and those that are held out, each in the seeded order of all.

    Of each class its share is held out, rounded so that the whole number is right, and where that allows at least one
    image and never all. Of a class the last images of the seeded order are taken.

    Args:
        labels: int64 [images], class indices.
        held_out: Number of images, from 0 to all.
        seed: Seed of the order.

    Source: shares are rounded by A. Sainte-Lague, La representation proportionnelle et la methode des moindres carres,
        1910: the n-th image of a class of c images goes out before those of a lower (c / (n - 1/2)).
    """
    order = seeded_order(len(labels), seed).numpy()
    found = labels[order]
    by_class = np.argsort(found[::-1], kind="stable")
    sizes = np.bincount(found, minlength=1)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    size, place = np.repeat(sizes, sizes), np.arange(len(found)) - starts  # of each image in its class, from the last
    priority = size / (place + 0.5)
    priority[place == 0] += len(found) * 2
    priority[place == size - 1] = 0
    ranked = np.empty(len(found))
    ranked[by_class] = priority
    taken = np.zeros(len(found), bool)
    taken[np.argsort(-ranked, kind="stable")[:held_out]] = True
    taken = taken[::-1]
    return order[~taken], order[taken]
