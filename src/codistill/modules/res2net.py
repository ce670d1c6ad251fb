"""Res2Net's hierarchy of convolutions: groups of channels that each add the result of the one before."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.networks.layers import conv_bn_act, initialise


class Res2Net(nn.Module):
    """Divide a feature map into equal groups of channels; each but the last adds the one before and is convolved.

    With s groups x_1 .. x_s of w = C / s channels and f_i = ReLU(BN(conv3x3)):

        y_1 = f_1(x_1),  y_i = f_i(x_i + y_{i-1}) for i = 2 .. s-1,  y_s = x_s,  output = concat(y_1, .., y_s)

    The groups see 3, 5, .., 2s-1 pixels in each direction, the last one 1. There are 9 w^2 (s-1) weights, and 2 w (s-1)
    parameters of batch normalisation.

    Args:
        channels: C of the input and the output, a multiple of `groups`.
        groups: s, the paper's scale, at least 2.
        residual: Whether the whole block of the paper is made: 1x1 convolution + BN + ReLU before, 1x1 convolution + BN
            after, the input added, ReLU; 2 C^2 + 4 C parameters more.

    Raises:
        UsageError: Groups that do not divide the channels.

    Source: Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", TPAMI 2021, arXiv 1904.01169; authors' code
        Res2Net/Res2Net-PretrainedModels at 219c8c6, res2net.py.
    Differs: the untouched group is the last one, as in the code; the paper draws the first. The code's blocks have
        width floor(26 planes / 64) within the 1x1 convolutions; here `residual` keeps C.
    """

    def __init__(self, channels: int, groups: int = 4, residual: bool = False) -> None:
        super().__init__()
        if groups < 2 or channels % groups:
            fitting = [each for each in range(2, channels + 1) if channels % each == 0][:6]
            use = f"use {', '.join(map(str, fitting))}" if fitting else "use wider feature maps"
            raise UsageError(f"res2net: {channels} channels do not divide into {groups} equal groups: {use}")
        self.width, self.residual = channels // groups, residual
        self.before: nn.Module = conv_bn_act(channels, channels, 1) if residual else nn.Identity()
        self.transforms = nn.ModuleList(conv_bn_act(self.width, self.width, 3) for _ in range(groups - 1))
        if residual:
            self.after = conv_bn_act(channels, channels, 1, act=False)
        initialise(self)

    def forward(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return a map of the same shape whose groups have several receptive fields."""
        *groups, last = self.before(feature_map).split(self.width, dim=1)
        outputs: list[Tensor] = []
        for group, transform in zip(groups, self.transforms, strict=True):
            outputs.append(transform(group + outputs[-1] if outputs else group))
        together = torch.cat([*outputs, last], dim=1)
        return torch.relu(self.after(together) + feature_map) if self.residual else together
