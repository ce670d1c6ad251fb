"""Multi-scale feature extraction: the hierarchical split of MFEF's first component."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.networks.layers import BatchNormAct2d, conv, initialise

Half = Literal["second", "first"]


def group_widths(channels: int, groups: int) -> list[int]:
    """Split channels into groups whose sizes differ by at most one, the larger ones first."""
    base, larger = divmod(channels, groups)
    return [base + 1] * larger + [base] * (groups - larger)


class MultiScaleExtraction(nn.Module):
    """Divide a feature map into groups of channels and convolve them in a cascade, so that receptive fields differ.

    With groups x_1 .. x_p and f_i = ReLU(BN(conv3x3)):

        y_1 = x_1,  y_2 = f_2(x_2),  y_i = f_i(concat(x_i, carried half of y_{i-1}))  for i = 3 .. p
        output = concat(x_1, exported half of y_2, .., exported half of y_{p-1}, y_p)

    The output has as many channels as the input, whatever the split; group i sees (2 (i-1) + 1)^2 pixels of the
    input, the first group one. There is no residual connection and no 1x1 convolution.

    Args:
        channels: C of the input and the output.
        groups: p, at least 2. Sizes of groups differ by at most one.
        exported: Which half of a divided group goes to the output; the other one is carried on. The first half of an
            odd group is the larger one. Both choices make the same class of functions where the halves are even.
        depthwise: Convolve each channel for itself (the paper gives no evidence for this; 3x3 dense is the default).

    Raises:
        UsageError: The split leaves a middle group with fewer than two channels to divide.

    Source: Zou, Teng, Niu, "Multi-scale Feature Extraction and Fusion for Online Knowledge Distillation", ICANN 2022,
        section 3.2, Eq. (4), after Yuan et al., "HS-ResNet", arXiv 2010.07621. No code was published for either.
    Differs: Eq. (4) as printed uses one index for both halves; here one half is exported and the other carried.
    """

    def __init__(self, channels: int, groups: int = 4, exported: Half = "second", depthwise: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.exported = exported
        # Of the groups that are divided, the second one is the narrowest: those behind it have carried channels too.
        if groups < 2 or channels < groups or (groups > 2 and group_widths(channels, groups)[1] < 2):
            cut = f"cannot split {channels} channels into {groups} groups"
            raise UsageError(f"multi-scale extraction: {cut}: use 2 to {max(2, channels // 2)} groups")
        self.group_widths = group_widths(channels, groups)
        widths, carried = [], 0
        for width in self.group_widths[1:]:
            widths.append(width + carried)
            carried = widths[-1] // 2 if exported == "first" else widths[-1] - widths[-1] // 2
        self.conv_widths = tuple(widths)
        self.transforms = nn.ModuleList(
            nn.Sequential(conv(width, width, 3, groups=width if depthwise else 1), BatchNormAct2d(width))
            for width in widths
        )
        initialise(self)

    def forward(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return a map of the same shape whose channels have several receptive fields."""
        first, *rest = feature_map.split_with_sizes(self.group_widths, dim=1)
        exported, carried = [first], None
        for group, transform in zip(rest[:-1], self.transforms, strict=False):
            convolved = transform(group if carried is None else torch.cat([group, carried], dim=1))
            smaller = convolved.shape[1] // 2
            halves = convolved.split_with_sizes([convolved.shape[1] - smaller, smaller], dim=1)
            output, carried = halves if self.exported == "first" else halves[::-1]
            exported.append(output)
        last = rest[-1] if carried is None else torch.cat([rest[-1], carried], dim=1)
        exported.append(self.transforms[-1](last))
        return torch.cat(exported, dim=1)
