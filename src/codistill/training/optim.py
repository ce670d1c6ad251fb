"""The optimiser with its parameter groups, and the learning rate as a function of the epoch."""

import inspect
from collections.abc import Sequence

import torch

from codistill.methods import Method
from codistill.settings.config import TrainSettings


class SGD(torch.optim.SGD):
    """SGD that does not import the compiler, for which a first step would wait 2 s; nothing here compiles updates."""

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def make_optimizer(method: Method, settings: TrainSettings) -> torch.optim.SGD:
    """Make SGD with one group for each of `Method.parameter_groups`, of a method that is on its device.

    Fused, with the learning rate as a tensor on the device of the parameters, so that a captured step sees changes.
    Momentum buffers exist from the start: a step never depends on whether it is the first. Weight decay reaches all
    tensors, biases and batch normalisation included, as in the papers' code.
    """
    groups = [
        {
            "params": list(group.parameters),
            "weight_decay": settings.weight_decay if group.weight_decay is None else group.weight_decay,
            "name": group.name,
        }
        for group in method.parameter_groups()
    ]
    device = next(method.parameters()).device
    optimizer = SGD(
        groups,
        lr=torch.tensor(settings.learning_rate, device=device),
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        fused=True,
    )
    if settings.momentum > 0:
        for trained in optimizer.param_groups:
            for parameter in trained["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate_at(epoch: int, initial: float, milestones: Sequence[int], decay: float) -> float:
    """Return the learning rate of an epoch, counted from 0: initial * decay ^ (number of milestones reached).

    Source: MFEF (ICANN 2022), section 4.1: 0.1, times 0.1 at epochs 150 and 225 of 300.
    """
    return initial * decay ** sum(epoch >= milestone for milestone in milestones)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write a learning rate into the tensors that a step reads."""
    for group in optimizer.param_groups:
        group["lr"].fill_(learning_rate)


def momentum_buffers(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """List the optimiser's momentum in the order of its parameters; empty without momentum."""
    parameters = (each for group in optimizer.param_groups for each in group["params"])
    return [optimizer.state[each]["momentum_buffer"] for each in parameters if each in optimizer.state]
