"""Training-mode batch normalisation, addition of a shortcut and ReLU as one differentiable function."""

# mypy: disable-error-code="no-untyped-call"

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.kernels.batch_norm_passes import input_gradient, normalise, part_gradients, part_statistics
from codistill.kernels.batch_norm_tiling import Tiling
from codistill.kernels.reach import reached
from codistill.networks.network import normalised as stock_normalised

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        skipped: Tensor | None,
        running: tuple[Tensor, Tensor],
        momentum: float,
        eps: float,
        activated: bool,
    ) -> tuple[Tensor, Tensor]:
        tiling = Tiling.of(features)
        result, partial = torch.empty_like(features), tiling.partial(features)
        mean, scale = torch.empty_like(weight), torch.empty_like(weight)
        with torch.cuda.device_of(features):
            part_statistics[tiling.grid](features, partial, *tiling.sizes, **tiling.blocks)
            normalise[tiling.grid](
                features,
                features if skipped is None else skipped,
                result,
                partial,
                weight,
                bias,
                mean,
                scale,
                *running,
                *tiling.sizes,
                momentum,
                eps,
                HAS_SKIPPED=skipped is not None,
                ACTIVATED=activated,
                BLOCK_PARTS=tiling.block_parts,
                **tiling.blocks,
            )
        ctx.set_materialize_grads(False)
        ctx.has_skipped, ctx.activated = skipped is not None, activated
        # The result is kept by the next convolution in any case; without a shortcut it is not needed.
        ctx.save_for_backward(
            features, weight, bias, mean, scale, result if skipped is not None and activated else None
        )
        return result, result.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        features, weight, bias, mean, scale, result = ctx.saved_tensors
        tiling = Tiling.of(features)
        given = [each for each in gradients if each is not None]
        if not given:
            return (None,) * 8
        given = [each.to(features.dtype).contiguous(memory_format=torch.channels_last) for each in given]
        gradient, added, has_added = given[0], given[-1], len(given) == 2
        # Else the gradient is the shortcut's as it is, or is computed once more.
        stored = ctx.has_skipped and (ctx.activated or has_added)
        skipped_gradient = torch.empty_like(features) if stored else gradient
        feature_gradient, partial = torch.empty_like(features), tiling.partial(features)
        weight_gradient, bias_gradient = torch.empty_like(weight), torch.empty_like(bias)
        flags = {"HAS_SKIPPED": ctx.has_skipped, "ACTIVATED": ctx.activated}
        result = features if result is None else result
        parameters = (partial, weight, bias, mean, scale)
        with torch.cuda.device_of(features):
            part_gradients[tiling.grid](
                gradient,
                added,
                features,
                result,
                skipped_gradient,
                *parameters,
                *tiling.sizes,
                HAS_ADDED=has_added,
                **flags,
                **tiling.blocks,
            )
            input_gradient[tiling.grid](
                skipped_gradient,
                added,
                features,
                result,
                feature_gradient,
                *parameters,
                weight_gradient,
                bias_gradient,
                *tiling.sizes,
                HAS_ADDED=has_added,
                **flags,
                BLOCK_PARTS=tiling.block_parts,
                **tiling.blocks,
            )
        passed = skipped_gradient if ctx.has_skipped else None
        return feature_gradient, weight_gradient, bias_gradient, passed, None, None, None, None


def batch_norm_relu(
    features: Float[Tensor, "batch channel height width"],
    weight: Float[Tensor, " channel"],
    bias: Float[Tensor, " channel"],
    running_mean: Float[Tensor, " channel"],
    running_var: Float[Tensor, " channel"],
    skipped: Float[Tensor, "batch channel height width"] | None = None,
    activated: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "batch channel height width"]:
    """Compute relu(batch_norm(features) + skipped) with the statistics of the batch, as in training.

    No host read, nothing random and no atomics: it may be captured in a CUDA graph and repeats to the last bit.

    A result of this function that another call is given as `skipped` has two gradients, the other one of the layers
    that were skipped. They arrive separately and are added (and rounded, as autograd does) by this function's kernels
    in place of a launch of autograd's. A hook on such a result, or torch.autograd.grad of it, sees only one of the two.

    Args:
        features: float32, bfloat16 or float16; brought to channels_last where it is not.
        weight: float32, as are all that have its shape.
        bias: Added behind the weight.
        running_mean: Moved in place by `momentum` towards the batch's mean.
        running_var: Moved in place by `momentum` towards the batch's unbiased variance.
        skipped: What is added before the ReLU, or nothing.
        activated: Whether there is a ReLU.
        momentum: Share of the batch in the running statistics.
        eps: Added to the (biased) variance.

    Returns:
        The result in channels_last, of the type of `features`. It is rounded once; stock layers round after each of
        the three operations.

    Raises:
        TypeError: Another type of activations or parameters.
        ValueError: One value a channel, which has no variance.
    """
    if features.dtype not in DTYPES or weight.dtype != torch.float32:
        raise TypeError(
            f"fused batch normalisation takes float32, bfloat16 or float16 with float32 weights, "
            f"not {features.dtype} with {weight.dtype}"
        )
    if features.numel() == features.shape[1]:
        raise ValueError(f"batch normalisation needs more than 1 value per channel, got {list(features.shape)}")
    features = features.contiguous(memory_format=torch.channels_last)
    if skipped is not None:
        skipped = _for_shortcut(skipped).to(features.dtype).contiguous(memory_format=torch.channels_last)
    running = (running_mean, running_var)
    result, twin = _BatchNormReLU.apply(features, weight, bias, skipped, running, momentum, eps, activated)
    result.twin = twin
    return result  # type: ignore[no-any-return]


def _for_shortcut(features: Tensor) -> Tensor:
    """Give the second output of the kernels that made a map, which is the same map, unless it was changed since."""
    twin: Tensor | None = getattr(features, "twin", None)
    return features if twin is None or twin.grad_fn is not features.grad_fn else twin


def takes(norm: nn.BatchNorm2d) -> bool:
    """Say whether the kernels know a normalisation: one with momentum, weights and running statistics."""
    return norm.momentum is not None and norm.affine and norm.track_running_stats


def normalised(
    features: Float[Tensor, "batch channel height width"],
    norm: nn.BatchNorm2d,
    skipped: Float[Tensor, "batch channel height width"] | None,
    activated: bool,
) -> Float[Tensor, "batch channel height width"]:
    """Compute in training mode what `networks.network.normalised` computes, by `batch_norm_relu` if that can."""
    if not norm.training or not takes(norm) or not reached(features):
        return stock_normalised(features, norm, skipped, activated)
    mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
    assert mean is not None and var is not None and momentum is not None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return batch_norm_relu(features, norm.weight, norm.bias, mean, var, skipped, activated, momentum, norm.eps)
