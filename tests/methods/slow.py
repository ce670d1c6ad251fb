"""Slow derivations for whole-step tests: they take nothing of codistill but the weights of tiny networks."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codistill.methods import Method
from codistill.networks import Network


def batch_norm(features: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d, trained: bool = True) -> Tensor:
    """With the statistics of the batch or, where it is not trained, the running ones."""
    axes = (0, *range(2, features.ndim))
    form = (1, -1, *[1] * (features.ndim - 2))
    mean = features.mean(axes, keepdim=True) if trained else norm.running_mean.reshape(form)
    variance = ((features - mean) ** 2).mean(axes, keepdim=True) if trained else norm.running_var.reshape(form)
    return (features - mean) / (variance + 1e-5).sqrt() * norm.weight.reshape(form) + norm.bias.reshape(form)


def stage_sums(student: Network, images: Tensor, strides: Sequence[int], trained: bool = True) -> list[Tensor]:
    """Maps of each stage of convolution, batch normalisation and ReLU, before the ReLU."""
    sums, features = [], images
    for (conv, norm), stride in zip(student.stages, strides, strict=True):
        sums.append(batch_norm(F.conv2d(features, conv.weight, stride=stride, padding=1), norm, trained))
        features = sums[-1].clamp(min=0)
    return sums


def stage_outputs(student: Network, images: Tensor, strides: Sequence[int], trained: bool = True) -> list[Tensor]:
    """Maps after each stage of convolution, batch normalisation and ReLU."""
    return [each.clamp(min=0) for each in stage_sums(student, images, strides, trained)]


def pooled(feature_map: Tensor) -> Tensor:
    return feature_map.sum((2, 3)) / (feature_map.shape[2] * feature_map.shape[3])


def head_logits(student: Network, feature_map: Tensor) -> Tensor:
    return pooled(feature_map) @ student.head.linear.weight.T + student.head.linear.bias


def run_students(method: Method, images: Tensor, strides: Sequence[int]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Maps of all stages and logits of each student, each computed from the images on; strides of the last stages."""
    maps = [stage_outputs(each, images, (1, 1, last)) for each, last in zip(method.cohort, strides, strict=True)]
    return maps, [head_logits(each, own[-1]) for each, own in zip(method.cohort, maps, strict=True)]


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    powers = torch.exp(logits / temperature)
    return powers / powers.sum(1, keepdim=True)


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    rows = probabilities(logits)
    return -sum(torch.log(rows[image, label]) for image, label in enumerate(labels)) / len(labels)


def kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """KL(target || softmax(logits / T)) of target probabilities, mean over the batch."""
    return (target * (target / probabilities(logits, temperature)).log()).sum() / len(target)


def divergence(target: Sequence[float] | Tensor, learned: Sequence[float] | Tensor, temperature: float = 1.0) -> float:
    """KL between softened predictions of one image, with nothing but floats."""
    powers = [[math.exp(value / temperature) for value in each] for each in (target, learned)]
    p, q = ([power / sum(each) for power in each] for each in powers)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def branches(*indices: int) -> set[str]:
    """The students' own parts, as `reached` names them."""
    return {f"{part}{index}" for index in indices for part in ("branch", "head")}


def ramp(epoch: int) -> float:
    return math.exp(-5 * (1 - min(epoch, 80) / 80) ** 2)


def disturb_norms(method: nn.Module) -> None:
    """Move batch normalisation away from weight 1 and bias 0, which would hide a mistake."""
    for layer in method.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias, std=0.3)
            nn.init.normal_(layer.running_mean, std=0.3), nn.init.uniform_(layer.running_var, 0.5, 1.5)


def assert_step_agrees(
    method: Method,
    batch: tuple[Tensor, Tensor],
    epoch: int,
    by_hand: Tensor,
    gradient_scale: Callable[[str], float] = lambda name: 1.0,
) -> None:
    """Compare loss and gradients of all parameters, to 1e-8, with a loss derived by hand.

    Args:
        method: Its parameters are those that `by_hand` was computed from.
        batch: Images and labels.
        epoch: Of 300.
        by_hand: The loss.
        gradient_scale: What a parameter's gradient of `by_hand` has to be multiplied by, where that is not 1.
    """
    names, parameters = zip(*(each for each in method.named_parameters() if each[1].requires_grad), strict=True)
    expected = torch.autograd.grad(by_hand, parameters, materialize_grads=True)
    terms = method.losses(method(batch[0]), batch[1], torch.tensor(epoch / 300, dtype=torch.float64))
    loss = sum(terms.values())
    loss.backward()
    assert abs(loss - by_hand) <= 1e-8 * by_hand
    for name, parameter, gradient in zip(names, parameters, expected, strict=True):
        gradient = gradient_scale(name) * gradient
        found = 0 if parameter.grad is None else parameter.grad
        assert (found - gradient).norm() <= 1e-8 * gradient.norm() + 1e-14, name


def reached(method: Method, batch: tuple[Tensor, Tensor], term: str, **extra: nn.Module) -> set[str]:
    """Which parts a term moves: `trunk` (of student 0), `branch<j>`, `head<j>`, and modules that are given by name."""
    shared = method.cohort.shared_stages
    owners: dict[str, nn.Module] = {"trunk": method.cohort[0].stages[:shared]} if shared else {}
    for index, student in enumerate(method.cohort):
        owners |= {f"branch{index}": student.stages[shared:], f"head{index}": student.head}
    value = method.losses(method(batch[0]), batch[1], torch.tensor(1.0))[term]
    found = set()
    for owner, module in (owners | extra).items():
        gradients = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True)
        if any(gradient is not None and gradient.any() for gradient in gradients):
            found.add(owner)
    return found
