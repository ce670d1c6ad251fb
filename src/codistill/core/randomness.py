"""Randomness: whatever is drawn is a function of the seed and of what it is for."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

CPU = torch.device("cpu")
ORDER_STREAM, EPOCH_STREAM, INIT_STREAM, STEP_STREAM, EVALUATION_STREAM, AUGMENT_STREAM = range(6)


def stream_seed(seed: int, *stream: int) -> int:
    """Compute a seed of 64 bits from the run's seed and what it is for, and from nothing else."""
    words = np.random.SeedSequence([seed, *stream]).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


def generator(seed: int, *stream: int) -> torch.Generator:
    """Make a CPU generator whose numbers depend on the seed and on what they are for, and on nothing else."""
    return torch.Generator().manual_seed(stream_seed(seed, *stream))


def default_generators(device: torch.device) -> list[torch.Generator]:
    """Return torch's default generators of the CPU and, if the device is another, of the device."""
    cuda = [torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []
    return [torch.default_generator, *cuda]


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed all that a network may draw from: torch's default generators, and the global ones of Python and NumPy."""
    # Not torch.manual_seed: before CUDA is used it keeps every call for later.
    for each in default_generators(device):
        each.manual_seed(seed)
    random.seed(seed)
    np.random.seed((seed >> 32, seed & 0xFFFFFFFF))


@contextlib.contextmanager
def draws_kept(device: torch.device) -> Iterator[None]:
    """Put the generators that `seed_draws` seeds back, afterwards, to where they were: they are the user's."""
    generators = default_generators(device)
    states, python, numpy = [each.get_state() for each in generators], random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)


class Draws:
    """Notices whether anything was drawn since it was made: on a device, by torch; on the host, by Python or NumPy."""

    def __init__(self, device: torch.device) -> None:
        self._generator = default_generators(device)[-1]
        self._began = self._generator.get_state()
        self._host = host_state()

    def on_device(self) -> bool:
        """Whether torch's default generator of the device has moved."""
        return not torch.equal(self._generator.get_state(), self._began)

    def on_host(self) -> bool:
        """Whether Python's or NumPy's global generator has moved."""
        return host_state() != self._host


def host_state() -> tuple[object, ...]:
    """Return the states of Python's and NumPy's global generators."""
    _, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), bytes(np.asarray(keys)), *rest
