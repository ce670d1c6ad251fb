"""Images that are in two splits, the same pixels or nearly so, and equal images of one split with two labels."""

import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from codistill.core.files import replaced
from codistill.core.host import cores
from codistill.data.dataset import Dataset, Labels, Pixels, Split
from codistill.data.mapped import facts_of, is_mapped, pieces

Kind = Literal["exact", "near"]

SIDE = 16  # pixels of a thumbnail
ALIKE = 0.98  # correlation of two thumbnails from which on images are nearly the same
CANDIDATE = 0.95  # the same of grey ones of half the side, which find the most similar image
MOST_PAIRS = 4_000_000_000  # of images that are compared; with more of them equal thumbnails are found only
BLOCK, STEP = 1 << 24, 1 << 14  # pairs that are compared together; thumbnails that are prepared together
NAMED = 3  # pairs that a line names

_thumbnails: WeakKeyDictionary[Split, Pixels] = WeakKeyDictionary()


@dataclass(frozen=True)
class Duplicate:
    """An image that is in two splits, or twice in one with two labels.

    Attributes:
        kind: Whether all pixels are equal, or nearly so.
        split: The split that should know nothing of the other one, and the image's position in it.
        other: The other split, or the same one, and the position there.
    """

    kind: Kind
    split: tuple[str, int]
    other: tuple[str, int]


def duplicates(
    data: Dataset, training: Iterable[int] | None = None, held_out: Iterable[int] | None = None
) -> list[Duplicate]:
    """Find the images of a data set that are in two splits; for each at most one in the other split, the most similar.

    Images of one split that are equal in all pixels are found where their labels differ, each with the first of them.

    Thumbnails of 16x16 pixels are compared, less that of the mean image, which plain drawings have in common; those of
    near duplicates correlate by at least 0.98: copies that were scaled, compressed, made a little brighter, or moved by
    a pixel or two. Mirrored images and larger crops are not found.

    Args:
        data: The data set.
        training: Positions of the training images that are used; None: all.
        held_out: Positions of training images that are held out for validation; None: none.
    """
    places = {name: (split, np.arange(len(split))) for name, split in data.splits.items()}
    if training is not None:
        places["train"] = data.train, _array(training)
    if held_out is not None:
        places = {"train": places["train"], "validation": (data.train, _array(held_out)), **places}
    found = []
    for (other, (there, others)), (name, (here, positions)) in combinations(places.items(), 2):
        thumbs, known = thumbnails(here)[positions], thumbnails(there)[others]
        for position, match in (_most_similar(thumbs, known) | _equal(thumbs, known)).items():
            image, copy = here.images[positions[position]], there.images[others[match]]
            kind: Kind = "exact" if np.array_equal(image, copy) else "near"
            found.append(Duplicate(kind, (name, int(positions[position])), (other, int(others[match]))))
    for name, (split, positions) in places.items():
        for position, first in _contradictions(thumbnails(split)[positions], split.labels[positions]).items():
            image, copy = positions[position], positions[first]
            if np.array_equal(split.images[image], split.images[copy]):
                found.append(Duplicate("exact", (name, int(image)), (name, int(copy))))
    return found


def _array(positions: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.array([int(position) for position in positions], np.int64)


def line_about(data: Dataset, found: Sequence[Duplicate]) -> str:
    """Return a line that counts and names duplicates; empty: there are none."""
    parts = []
    for name, other in dict.fromkeys((each.split[0], each.other[0]) for each in found):
        pairs = [each for each in found if (each.split[0], each.other[0]) == (name, other)]
        exact = sum(each.kind == "exact" for each in pairs)
        first = [f"{named(data, *each.split)} = {named(data, *each.other)}" for each in pairs[:NAMED]]
        listed = ", ".join([*first, *([".."] if len(pairs) > NAMED else [])])
        of = f"{len(pairs)} {name} images are"
        if name == other:
            parts.append(f"{of} there with another label, too ({listed})")
        else:
            parts.append(f"{of} in {other}, too ({exact} exactly: {listed})")
    return f"data set {data.name}: {'; '.join(parts)}" if parts else ""


def named(data: Dataset, split: str, position: int) -> str:
    """Return the file of an image, or its split and position where it has none."""
    files = (data.validation or data.train if split == "validation" else data.splits[split]).files
    return files[position] if files else f"{split} {position}"


def thumbnails(split: Split) -> Pixels:
    """Return images of 16x16 pixels, uint8 [images, 16, 16, 3]: means of areas.

    Those of a file of decoded images are kept beside it, so that a start need not read all of it.
    """
    if split not in _thumbnails:
        images = split.images
        kept = facts_of(images) is not None and is_mapped(images)
        place = Path(str(images.filename)).with_name(f"thumbnails-{SIDE}.npy") if kept else None  # type: ignore[attr-defined]
        found = None if place is None else _read(place, (len(images), SIDE, SIDE, 3))
        if found is None:
            found = _shrunk(images)
            if place is not None:
                _write(place, found)
        _thumbnails[split] = found
    return _thumbnails[split]


def _read(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """Read thumbnails; None where there are none, or none of this shape."""
    try:
        with path.open("rb") as file:
            found: Pixels = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.shape == shape else None


def _write(path: Path, found: Pixels) -> None:
    with contextlib.suppress(OSError), replaced(path) as part, part.open("wb") as file:  # they are made again next time
        np.save(file, found)


def _shrunk(images: Pixels) -> Pixels:
    def thumbnail(image: Pixels) -> Pixels:
        return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))

    found, position = np.empty((len(images), SIDE, SIDE, 3), np.uint8), 0
    with ThreadPoolExecutor(cores()) as pool:  # Pillow works outside Python's global lock
        for piece in pieces(images):
            for small in pool.map(thumbnail, piece):
                found[position] = small
                position += 1
    return found


def _equal(thumbs: Pixels, others: Pixels) -> dict[int, int]:
    """Return the position of an equal thumbnail among others for each that has one."""
    known = {each.tobytes(): position for position, each in enumerate(others)}
    found = ((position, known.get(each.tobytes())) for position, each in enumerate(thumbs))
    return {position: match for position, match in found if match is not None}


def _contradictions(thumbs: Pixels, labels: Labels) -> dict[int, int]:
    """Return the position of the first equal thumbnail for each that is not the first and has another label."""
    first: dict[bytes, int] = {}
    places = ((position, first.setdefault(each.tobytes(), position)) for position, each in enumerate(thumbs))
    return {position: place for position, place in places if labels[position] != labels[place]}


def _most_similar(thumbs: Pixels, others: Pixels) -> dict[int, int]:
    """Return the position of the most similar thumbnail among others for each that has one which is nearly the same."""
    if len(thumbs) * len(others) > MOST_PAIRS:
        return {}
    found: dict[int, int] = {}
    mean, step = torch.from_numpy(others.mean(axis=0)).float(), max(1, BLOCK // len(others))
    known = torch.cat([_grey(part, mean) for part in np.array_split(others, len(others) // STEP + 1)])
    for start in range(0, len(thumbs), step):
        part = thumbs[start : start + step]
        alike, matches = (_grey(part, mean) @ known.T).max(dim=1)
        places = (alike >= CANDIDATE).nonzero().flatten()
        matched = matches[places]
        pairs = _centred(part[places.numpy()], mean), _centred(others[matched.numpy()], mean)
        near = (pairs[0] * pairs[1]).sum(dim=1) >= ALIKE
        found |= dict(zip((places[near] + start).tolist(), matched[near].tolist(), strict=True))
    return found


def _grey(thumbs: Pixels, mean: Tensor) -> Float[Tensor, "image pixel"]:
    """Return grey thumbnails of half the side, as `_centred` returns those of full colour."""
    grey = (torch.from_numpy(thumbs).float() - mean).mean(dim=3)
    return _unit(F.avg_pool2d(grey, 2))


def _centred(thumbs: Pixels, mean: Tensor) -> Float[Tensor, "image pixel"]:
    """Return thumbnails less the mean one, each of mean 0 and length 1; uniform ones are 0."""
    return _unit(torch.from_numpy(thumbs).float() - mean)


def _unit(images: Tensor) -> Float[Tensor, "image pixel"]:
    flat = images.flatten(1)
    return F.normalize(flat - flat.mean(dim=1, keepdim=True))
