"""Fixtures of all tests: one thread, a fixed seed, tiny networks and a batch for them."""

import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings
from torch import Tensor

import codistill as cd
from codistill.cli import commands
from codistill.core import console
from codistill.networks import Network, PooledLinear
from codistill.networks.layers import conv_bn_act, initialise
from codistill.settings.config import RunConfig
from codistill.training import trainer as loop

from . import tiny
from .pretended_gpu import pretended

# The same examples everywhere, however slow the machine is.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    """Have lines that a process says once said again."""
    console.warn_once.cache_clear()
    console.note_once.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """Exempt what is there from the collection before each training, which took a quarter of the tests of faults."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def shapes_checked(request: pytest.FixtureRequest) -> None:
    """Check annotated shapes in the tests of methods and modules; elsewhere that would cost a tenth of the time."""
    jaxtyping.config.update("jaxtyping_disable", request.path.parent.name not in ("methods", "modules"))


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def gpu_or_pretended(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests marked `gpu` on a pretended one where there is none."""
    marker = request.node.get_closest_marker("gpu")
    if marker is None or torch.cuda.is_available():
        yield
    elif marker.kwargs.get("real"):
        pytest.skip("no CUDA device")
    else:
        with pretended():
            yield


@pytest.fixture
def tiny_network() -> Callable[..., Network]:
    """Build three stages of convolution, BN and ReLU: 4 and 6 channels at 8x8, then `width` at 8x8 / `stride`."""

    def build(width: int = 8, stride: int = 2, classes: int = 3) -> Network:
        widths, strides = (4, 6, width), (1, 1, stride)
        stages = [
            conv_bn_act(in_channels, out_channels, 3, step)
            for in_channels, out_channels, step in zip((3, *widths), widths, strides, strict=False)
        ]
        built = Network(stages, PooledLinear(width, classes), widths)
        initialise(built)
        return built

    return build


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Six images of 8x8 pixels with labels of three classes, in float64."""
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor([0, 1, 2, 2, 1, 0])


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> cd.Run:
    """Two ResNet-20 after one epoch of MFEF on a few digits; to be read only, but for its exports."""
    folder = tmp_path_factory.mktemp("digits")
    whole = cd.dataset("digits")
    names = tuple(f"digit {name}" for name in whole.class_names)
    few = cd.Dataset("digits", tiny.first(whole.train, 64), tiny.first(whole.test, 40), names)
    data = cd.dataset("packed", tiny.write_npz(folder / "few.npz", few))
    settings = cd.TrainSettings(epochs=1, batch_size=8, learning_rate=0.02, flip=False)
    torch.manual_seed(0)
    method = cd.MFEF([cd.network("resnet20", 10), cd.network("resnet20", 10)], num_classes=10)
    cd.train(method, data, out=folder / "run", settings=settings, show=False)
    return cd.Run(folder / "run")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """Parse a whole command line as `codistill train` does, without training."""

    def parse(*arguments: str) -> RunConfig:
        seen: list[RunConfig] = []
        monkeypatch.setattr(commands, "train_from_config", lambda config, *_, **__: seen.append(config))
        commands.train_command([*arguments])
        return seen[0]

    return parse


@pytest.fixture
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no report, nor its pictures: they take longer than a tiny training."""
    monkeypatch.setattr(loop, "write_report", lambda run, summary: None)
    monkeypatch.setattr(loop, "keep_pictures", lambda *arguments: None)


@pytest.fixture
def empty_folder(no_pages: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Work in an empty folder, draw no pages, and restore the handler of SIGTERM."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def tiny_registered() -> Iterator[None]:
    """Register the tiny network as `tiny` for the tests of a module."""
    with tiny.registered():
        yield
