"""Measure each chain of small operations alone: PyTorch's own kernels, compiled ones and fused ones.

    python benchmarks/kernels.py --out runs/kernels     # on a GPU: a few minutes
    python benchmarks/kernels.py --out runs/dry --device cpu --batch-size 8 --rounds 1 --seconds 0.1     # does it run?

Chains are layer/<channels>x<side> (batch normalisation, with and without the addition of a shortcut, and ReLU),
attention/<channels>x<side>, losses/<heads>x<classes> and augmentation/<images>; all but the last forward and backward.
On CUDA calls are measured within a graph, as in training; on a CPU, where stock kernels are all there is, plainly.

Each case is a process of its own and a JSON file below --out; a case whose file is there is not measured again.
`table.md` has all results. benchmarks/executions.py measures whole training steps.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cases
import torch
import tyro
from torch import Tensor, nn

from codistill.bench_loop import AUGMENTATION, resident_images
from codistill.data.augment import DeviceImages, epoch_plan
from codistill.device import choose_device, set_up_gpu
from codistill.losses import cross_entropy, soft_target_kl
from codistill.modules.attention import DualAttention, attended
from codistill.networks.network import normalised

# Of resnet32 and resnet110 (the same ones), then of wrn-16-2; attention is for the last maps.
CHAINS: tuple[str, ...] = (
    *("layer/16x32", "layer/32x16", "layer/64x8", "attention/64x8", "losses/3x100", "augmentation/128"),
    *("layer/32x32", "layer/64x16", "layer/128x8", "attention/128x8"),
)
# Fused last: what an error on the GPU leaves behind is in nobody's way.
WAYS = ("stock", "compiled", "fused")
TEMPERATURE = 3.0
CALLS_IN_A_GRAPH = 20
CALLS_UNTIL_CAPTURED = 4

Call = Callable[[], object]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Options(cases.Options):
    """What to measure."""

    chains: tuple[str, ...] = CHAINS
    seconds: float = 1.0
    """How long to measure each implementation, all rounds together, beside making ready."""


def computed(way: str, stock: Function, module: str) -> Function:
    """Give a stock function, or what computes the same: compiled, or the function of the same name in own kernels."""
    if way == "compiled":
        return torch.compile(stock, dynamic=False)
    return getattr(importlib.import_module(f"codistill.kernels.{module}"), stock.__name__) if way == "fused" else stock


def maps(count: int, channels: int, side: int, options: Options, device: torch.device) -> list[Tensor]:
    """Make random maps as stages have them."""
    values = torch.randn(count, options.batch_size, channels, side, side, device=device, dtype=type_of(options))
    return [each.contiguous(memory_format=torch.channels_last) for each in values]


def type_of(options: Options) -> torch.dtype:
    return torch.bfloat16 if options.precision == "bf16" else torch.float32


def layer(way: str, options: Options, device: torch.device, channels: int, side: int) -> dict[str, Call]:
    """Batch normalisation with ReLU, alone and with an addition between."""
    compute = computed(way, normalised, "batch_norm")

    def call(skipped: Tensor | None) -> Call:
        norm = nn.BatchNorm2d(channels).to(device)
        features, gradient = maps(2, channels, side, options, device)
        inputs = [each for each in (features, skipped, norm.weight, norm.bias) if each is not None]
        for each in inputs:
            each.requires_grad_()
        return lambda: torch.autograd.grad(compute(features, norm, skipped, True), inputs, gradient)

    return {"alone": call(None), "added": call(*maps(1, channels, side, options, device))}


def attention(way: str, options: Options, device: torch.device, channels: int, side: int) -> dict[str, Call]:
    """Dual attention of one student, with weights of the map's type as in training."""
    compute = computed(way, attended, "attention")
    features, gradient = maps(2, channels, side, options, device)
    module = DualAttention(channels).to(device, features.dtype, memory_format=torch.channels_last).train()
    inputs = [features.requires_grad_(), *module.parameters()]
    return {"": lambda: torch.autograd.grad(compute(features, module), inputs, gradient)}


def losses(way: str, options: Options, device: torch.device, heads: int, classes: int) -> dict[str, Call]:
    """The two losses of n heads: with labels, and with soft targets; two students and a fused classifier are three."""
    shape = (heads, options.batch_size, classes)
    logits, targets = torch.randn(2, *shape, device=device, dtype=type_of(options))
    labels = torch.randint(classes, (options.batch_size,), device=device)
    gradient = torch.ones(heads, device=device)
    logits.requires_grad_()
    entropy, divergence = (computed(way, each, "losses") for each in (cross_entropy, soft_target_kl))
    return {
        "labels": lambda: torch.autograd.grad(entropy(logits, labels), logits, gradient),
        "targets": lambda: torch.autograd.grad(divergence(logits, targets, TEMPERATURE), logits, gradient),
    }


def augmentation(way: str, options: Options, device: torch.device, count: int) -> dict[str, Call]:
    """Gathering, cropping, flipping and normalising so many of the images that steps are measured with."""
    compute = computed(way, DeviceImages.augmented, "augment")
    images = resident_images(device)
    batch = epoch_plan(len(images), 0, 0, AUGMENTATION, device).part(0, count)
    return {"": lambda: compute(images, batch, AUGMENTATION)}


KINDS = {"layer": layer, "attention": attention, "losses": losses, "augmentation": augmentation}


def alone(call: Call, options: Options, device: torch.device) -> list[float]:
    """Time calls, microseconds each, for each round; on CUDA within a graph, captured on the current stream."""

    def plainly(times: int) -> None:
        for _ in range(times):
            call()

    plainly(CALLS_UNTIL_CAPTURED)
    if device.type != "cuda":
        return [1000 * each for each in cases.rounds_of(plainly, options, device)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        plainly(CALLS_IN_A_GRAPH)

    def replay(times: int) -> None:
        for _ in range(times):
            graph.replay()

    return [1000 * each / CALLS_IN_A_GRAPH for each in cases.rounds_of(replay, options, device)]


def measure(options: Options) -> dict[str, Any]:
    """Measure the chain that the options name, each way there is: microseconds a call for each round, and failures."""
    device = choose_device(options.device, options.precision)
    set_up_gpu(device, deterministic=False)
    kind, sizes = options.case.split("/")
    found: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
        for way in WAYS if device.type == "cuda" else WAYS[:1]:
            try:
                calls = KINDS[kind](way, options, device, *(int(each) for each in re.findall(r"\d+", sizes)))
                for name, call in calls.items():
                    found[f"{way}, {name}" if name else way] = alone(call, options, device)
            except Exception as error:  # the other ways are worth knowing
                failures[way] = f"{type(error).__name__}: {error}"
    return {"microseconds": found, "failures": failures}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Write Markdown: medians of the rounds, and their range."""
    lines = ["| chain | computed by | us a call | of stock |", "|---|---|---|---|"]
    for result in results:
        found: Mapping[str, list[float]] = result.get("microseconds", {})
        for name, each in found.items():
            stock = found.get(", ".join(["stock", *name.split(", ")[1:]]))
            lines.append(f"| {result['case']} | {name} | {cases.spread(each)} | {cases.share(each, stock)} |")
        failed = list(result.get("failures", ())) + ["all"] * ("failed" in result)
        lines += [f"| {result['case']} | {way} | failed | - |" for way in failed]
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    if options.case:
        print(cases.described(measure(options), options))
        return
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str((options.out / "compiled").absolute())}
    print(cases.measure_missing(__file__, options.chains, options, lambda case: compiled, table), end="")


if __name__ == "__main__":
    main(tyro.cli(Options))
