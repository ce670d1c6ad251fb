"""What tests of kernels share: they run on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
runs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETED, reason="runs in a process of its own, see the test of the interpreter"
)
starts_the_interpreter = pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="runs here")
compiles = pytest.mark.skipif(INTERPRETED, reason="compiles, outside the interpreter")


def needs_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that a pretended GPU and the interpreter are not enough for."""
    missing = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")
    return pytest.mark.gpu(real=True)(missing(test))


def run_in_the_interpreter(file: str) -> None:
    """Run a file of tests where Triton interprets; that has to be chosen before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def compiled_sizes(program: str, cache: Path) -> list[int]:
    """Run a program that compiles kernels for an H100, which need not be there.

    Returns:
        The whole numbers that it prints: how large each kernel is, bytes, and what else it counts.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(size) for size in done.stdout.split()]


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Compare tensors by their largest difference, as a share of the largest value or of 1."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        size = other.abs().max().clamp_min(1.0)
        assert float(((one.double() - other.double()).abs().max() / size).item()) < tolerance
