"""How many runs train side by side on one GPU: as many as its memory holds."""

import copy
from collections.abc import Sequence

import torch

from codistill.checkpoint import warn
from codistill.config import RunConfig
from codistill.data.augment import DeviceImages, epoch_plan
from codistill.data.dataset import Dataset, Split
from codistill.evaluate import EVALUATION_BATCH, evaluate
from codistill.methods import Method
from codistill.optim import make_optimizer
from codistill.step import PlainStep

# Captured graphs keep their memory apart from that of the steps before them, and allocators leave gaps.
ALLOWANCE = 1.3
USED_SHARE = 0.9


def memory_of_a_run(method: Method, config: RunConfig, data: Dataset, device: torch.device) -> int:
    """Measure what two steps and an evaluation of a copy of a method take beside the data set, bytes.

    Args:
        method: Left as it is.
        config: Batch size, precision and optimiser.
        data: What it is trained on; only a few images of it are used.
        device: A CUDA device.
    """
    settings = config.train
    few = Split(data.train.images[: settings.batch_size], data.train.labels[: settings.batch_size])
    images = DeviceImages(few, data.statistics, device)
    test = Split(data.test.images[:EVALUATION_BATCH], data.test.labels[:EVALUATION_BATCH])
    held = DeviceImages(test, data.statistics, device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    probe = copy.deepcopy(method).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(probe, settings.learning_rate, settings.momentum, settings.nesterov, 0.0)
    augmentation = settings.augmentation(data)
    step = PlainStep(probe, images, augmentation, optimizer, settings.precision)
    plan = epoch_plan(len(images), settings.seed, 0, augmentation, device, probe.views)
    for _ in range(2):
        step(plan, torch.zeros((), device=device))
    evaluate(probe, held, settings.precision)
    peak = torch.cuda.max_memory_allocated(device)
    del probe, optimizer, step
    torch.cuda.empty_cache()
    return peak - before


def free_memory(device: torch.device) -> int:
    """Say how many bytes of a CUDA device nobody uses."""
    return torch.cuda.mem_get_info(device)[0]


def side_by_side(
    methods: Sequence[Method], configs: Sequence[RunConfig], data: Dataset, device: torch.device
) -> list[int]:
    """Choose how many runs train at a time, from free memory and a short measurement of what one takes.

    Says so in a line where not all of them fit. On a CPU runs take turns at each step, and all of them fit.

    Args:
        methods: On the host, not yet trained.
        configs: Their settings.
        data: Their data set.
        device: Where they will train.

    Returns:
        Sizes of the groups that train one after the other, as equal as can be.
    """
    count = len(methods)
    if device.type != "cuda" or count == 1:
        return [count]
    kinds = {(config.method_name, config.networks): index for index, config in enumerate(configs)}
    need = max(memory_of_a_run(methods[index], configs[index], data, device) for index in kinds.values())
    free = free_memory(device) * USED_SHARE
    fit = min(count, max(1, int(free // (need * ALLOWANCE))))
    groups = -(-count // fit)
    sizes = [count // groups + (index < count % groups) for index in range(groups)]
    if groups > 1:
        has, takes = (f"{bytes / 2**30:.2f} GiB" for bytes in (free, need * ALLOWANCE))
        warn(
            f"{count} runs, but {torch.cuda.get_device_name(device)} has {has} to use and a run takes about {takes}: "
            f"they train in {groups} groups of at most {sizes[0]}, one after the other"
        )
    return sizes
