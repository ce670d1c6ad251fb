"""Count what a training step launches with PyTorch's kernels and with fused ones, on a machine without a GPU.

    python benchmarks/launches.py > results/launches.json       # two resnet32; a minute

Operators that PyTorch dispatches are counted, but for views and allocations, and launches of own kernels, which run in
Triton's interpreter. On a GPU some operators are more than one kernel: a convolution's backward pass is at least two.
"""

import json
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from triton.runtime.interpreter import GridExecutor

from codistill.bench_loop import AUGMENTATION, CLASSES, SIDE, STATISTICS, images
from codistill.bench_measurement import OperatorCount
from codistill.config import Kernels, RunConfig, TrainSettings, default_config
from codistill.data.augment import DeviceImages, epoch_plan
from codistill.data.dataset import Split
from codistill.execution import Execution
from codistill.kernels import install_fused
from codistill.optim import make_optimizer
from codistill.record import environment
from codistill.run import build_method
from codistill.step import PlainStep

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """What is counted."""

    method: str = "mfef"
    networks: tuple[str, ...] = ("resnet32", "resnet32")
    precision: str = "bf16"
    batch_size: int = 2
    """Images; it changes no count, and interpreting takes time."""
    side: int = SIDE
    """Height and width of the images, pixels, at most 32; nor does it."""


class LaunchCount(OperatorCount):
    """Counts launches of own kernels, too, without what the interpreter does within them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __enter__(self) -> "LaunchCount":
        self._run = run = GridExecutor.__call__

        def launch(*args: Any, **kwargs: Any) -> None:
            self.kernels += 1
            with torch.utils._python_dispatch._disable_current_modes():
                run(*args, **kwargs)

        GridExecutor.__call__ = launch
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        GridExecutor.__call__ = self._run
        super().__exit__(*raised)


def count(options: Options, kernels: Kernels) -> dict[str, int]:
    """Count what the second step of a training launches."""
    torch.manual_seed(0)
    settings = TrainSettings(batch_size=options.batch_size)
    config: RunConfig = replace(default_config(options.method), networks=options.networks, train=settings)
    method = build_method(config, CLASSES, (options.side, options.side)).to(memory_format=torch.channels_last).train()
    if kernels == "fused":
        install_fused(method)
    whole = images()
    part = Split(whole.images[:, : options.side, : options.side].copy(), whole.labels)
    resident = DeviceImages(part, STATISTICS, CPU)
    optimizer = make_optimizer(method, 0.1, 0.9, True, 1e-4)
    step = PlainStep(method, resident, AUGMENTATION, optimizer, options.precision, execution=Execution(kernels))
    batch = epoch_plan(len(resident), 0, 0, AUGMENTATION, CPU, method.views).part(0, options.batch_size)
    step(batch, torch.tensor(0.5))
    with LaunchCount() as counted:
        step(batch, torch.tensor(0.5))
    return {"operators": counted.operators, "own_kernels": counted.kernels}


def main(options: Options) -> None:
    found = {kernels: count(options, kernels) for kernels in ("stock", "fused")}
    asked = {"method": options.method, "networks": options.networks, "precision": options.precision}
    print(json.dumps({**asked, **found, "environment": environment(CPU)}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))
