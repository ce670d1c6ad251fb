"""Pyramid split attention: kernels of several sizes, whose maps compete for each channel."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from codistill.modules.pyconv import Pyramid
from codistill.networks.layers import BatchNormAct2d


class PSA(nn.Module):
    """Weight the maps of a pyramid of convolutions by attention across its four scales.

    With F_i the maps of `Pyramid`, C / 4 channels each:

        a_i = sigmoid(W_2 relu(W_1 mean over places of F_i)),  the same two linear layers, with biases, for all scales
        w = softmax over i of a_i, for each channel
        output = ReLU(BN(concat(w_1 F_1, .., w_4 F_4)))

    The softmax is of values between 0 and 1, so a scale's weight lies between 0.109 and 0.475: none is switched off.

    Args:
        channels: C of the input and the output, at least 4.
        reduction: The hidden width is that of a scale divided by it, at least 1.

    Raises:
        UsageError: Fewer than four channels.

    Source: Zhang et al., "EPSANet: An Efficient Pyramid Squeeze Attention Block on Convolutional Neural Network",
        arXiv 2105.14447; authors' code murufeng/EPSANet at 9955041, models/epsanet.py.
    Differs: the paper draws a split of the input; as in the code, each convolution sees all channels. The code
        concatenates the last scale first. It has no hidden unit below 64 channels, and needs channels that its groups
        divide: here scales are as wide as `PyConv`'s levels, and what a narrower one lacks takes no part.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.pyramid = Pyramid(channels)
        widest = max(self.pyramid.widths)
        hidden = max(1, widest // reduction)
        self.attention = nn.Sequential(nn.Linear(widest, hidden), nn.ReLU(), nn.Linear(hidden, widest), nn.Sigmoid())
        there = torch.arange(widest) < torch.tensor(self.pyramid.widths)[:, None]
        self.absent: Tensor
        self.register_buffer("absent", torch.where(there, 0.0, -torch.inf), persistent=False)
        self.norm = BatchNormAct2d(channels)

    def scale_weights(
        self, scales: list[Float[Tensor, "batch _scale_channel height width"]]
    ) -> Float[Tensor, "batch scale channel"]:
        """Compute the weight of each scale for each channel, which add up to 1 over the scales."""
        widest = self.absent.shape[1]
        pooled = [F.pad(each.mean(dim=(2, 3)), (0, widest - each.shape[1])) for each in scales]
        weights: Tensor = self.attention(torch.stack(pooled, dim=1)) + self.absent
        return weights.softmax(dim=1)

    def forward(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return a map of the same shape whose channels have several receptive fields."""
        scales = self.pyramid(feature_map)
        weights = self.scale_weights(scales).unbind(dim=1)
        weighted = [weight[:, : each.shape[1], None, None] * each for weight, each in zip(weights, scales, strict=True)]
        normed: Tensor = self.norm(torch.cat(weighted, dim=1))
        return normed
