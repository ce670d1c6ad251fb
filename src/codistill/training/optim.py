"""The optimiser with its parameter groups, and the learning rate as a function of the epoch."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from codistill.methods import Method
from codistill.methods.method import ParameterGroup
from codistill.settings.config import TrainSettings


def pausing(step: Callable[[Any], Any]) -> Any:
    """Have a fused step leave groups alone whose `pause` is 1, without a host read; see `ParameterGroup`."""

    def step_by_groups(optimizer: Any) -> None:
        groups = optimizer.param_groups
        try:
            for group in groups:
                # What fused kernels skip a step for, when gradients overflow.
                optimizer.param_groups, optimizer.found_inf = [group], group.get("pause")
                step(optimizer)
        finally:
            optimizer.param_groups = groups

    return step_by_groups


class SGD(torch.optim.SGD):
    """SGD that does not import the compiler, for which a first step would wait 2 s; nothing here compiles updates."""

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    step = pausing(torch.no_grad()(inspect.unwrap(torch.optim.SGD.step)))


class AdamW(torch.optim.AdamW):
    """AdamW that does not import the compiler; see `SGD`."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = pausing(torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step)))
    _warned_capturable_if_run_uncaptured = True  # the first steps before a capture are plain ones


def make_optimizer(method: Method, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make SGD or AdamW with one group for each of `Method.parameter_groups`, of a method that is on its device.

    Fused, with the learning rate as a tensor on the device of the parameters, so that a captured step sees changes.
    All state exists from the start: a step never depends on whether it is the first. Weight decay reaches all tensors,
    as in the papers' code, or not those of one dimension, which are biases and those of normalisation layers.

    Source of AdamW: Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101; epsilon 1e-8, beta 1 is the momentum. Without
        decay of biases and normalisation as in timm.
    """
    groups: list[dict[str, Any]] = []
    of_method = method.parameter_groups()
    held = {id(each) for group in of_method for each in group.parameters}
    # Not those of methods that list their modules.
    if left := tuple(each for each in method.teacher_parts if id(each) not in held):
        of_method = [*of_method, ParameterGroup("teacher", left)]
    for group in of_method:
        decay = settings.weight_decay if group.weight_decay is None else group.weight_decay
        decayed = [each for each in group.parameters if settings.decays_norms or each.ndim > 1]
        kept = {id(each) for each in decayed}
        groups.append({"params": decayed, "weight_decay": decay, "name": group.name, "pause": group.pause})
        if plain := [each for each in group.parameters if id(each) not in kept]:
            groups.append({**groups[-1], "params": plain, "weight_decay": 0.0, "name": f"{group.name}, not decayed"})
    device = next(method.parameters()).device
    rate = torch.tensor(settings.learning_rate, device=device)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        betas = (settings.momentum, settings.adam_beta2)
        optimizer = AdamW(groups, rate, betas, capturable=device.type == "cuda", fused=True)
    else:
        nesterov = settings.nesterov and settings.momentum > 0
        optimizer = SGD(groups, rate, settings.momentum, nesterov=nesterov, fused=True)
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        if settings.optimizer == "adamw":
            step = torch.zeros((), dtype=torch.float32, device=device)
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": step, **moments}
        elif settings.momentum > 0:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def rate_of(settings: TrainSettings, epoch: int, share: float = 1.0) -> float:
    """Return the learning rate of a step in an epoch, counted from 0.

    The first `warm_up` epochs w rise in a straight line, step by step, to the learning rate l: l (epoch + share) / w.
    From there a cosine falls epoch by epoch from l to m, `min_learning_rate`:
    m + (l - m) (1 + cos(pi (epoch - w) / (epochs - w))) / 2. The milestones of the schedule step count all epochs.

    Args:
        settings: Those of the run.
        epoch: The epoch.
        share: Part of it that is done with this step, above 0 to 1; only the warm-up looks at it.

    Source: warm-up by Goyal et al., arXiv 1706.02677, section 2.2; cosine by Loshchilov and Hutter, ICLR 2017, arXiv
        1608.03983, without restarts, as in torchvision's references.
    """
    rate, lowest = settings.learning_rate, settings.min_learning_rate
    if epoch < settings.warm_up:
        return rate * (epoch + share) / settings.warm_up
    if settings.schedule == "cosine":
        done = (epoch - settings.warm_up) / (settings.epochs - settings.warm_up)
        return lowest + (rate - lowest) * (1 + math.cos(math.pi * done)) / 2
    return learning_rate_at(epoch, rate, settings.learning_rate_steps, settings.learning_rate_decay)


def learning_rate_at(epoch: int, initial: float, milestones: Sequence[int], decay: float) -> float:
    """Return the learning rate of an epoch, counted from 0: initial * decay ^ (number of milestones reached).

    Source: MFEF (ICANN 2022), section 4.1: 0.1, times 0.1 at epochs 150 and 225 of 300.
    """
    return initial * decay ** sum(epoch >= milestone for milestone in milestones)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write a learning rate into the tensors that a step reads."""
    for group in optimizer.param_groups:
        group["lr"].fill_(learning_rate)


def clip(gradients: list[torch.Tensor], norm: float) -> None:
    """Scale gradients down, in place, to a largest L2 norm of all together; no host read.

    As `torch.nn.utils.clip_grad_norm_`, on one device, which needs no sorting of tensors in each step.

    Source: Pascanu et al., ICML 2013, arXiv 1211.5063.
    """
    length = torch.stack(torch._foreach_norm(gradients)).norm()
    torch._foreach_mul_(gradients, (norm / (length + 1e-6)).clamp(max=1))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """List what the optimiser keeps from step to step, by parameter and name; empty for SGD without momentum."""
    parameters = (each for group in optimizer.param_groups for each in group["params"])
    kept = (optimizer.state[each] for each in parameters if each in optimizer.state)
    return [tensors[name] for tensors in kept for name in sorted(tensors)]
