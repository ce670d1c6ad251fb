"""Dual attention: channel attention, then spatial attention; MFEF's second component. Either alone, or turned round."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches
from codistill.networks import chains

Part = Literal["channel", "spatial"]
AttentionKind = Literal["cbam", "channel", "spatial", "spatial-channel"]
ATTENTION: dict[AttentionKind, tuple[Part, ...]] = {
    "cbam": ("channel", "spatial"),
    "channel": ("channel",),
    "spatial": ("spatial",),
    "spatial-channel": ("spatial", "channel"),
}
"""The parts of each kind of attention, in their order."""


class AttentionMaps(NamedTuple):
    """What attention weights with, for some images; all in (0, 1); None: it does not weight these."""

    channels: Float[Tensor, "batch channel"] | None
    places: Float[Tensor, "batch height width"] | None


class DualAttention(nn.Module):
    """Weight the channels of a feature map, then its places, each by a sigmoid of pooled values.

        w_c = sigmoid(W(mean over places) + W(maximum over places)),  W a shared two-layer perceptron with ReLU
        w_s = sigmoid(conv(concat(mean over channels, maximum over channels))) of the map weighted by w_c
        output = w_s * w_c * input

    Other kinds than `cbam` have one of the parts alone, or the spatial one first, whose result the other one then sees.
    Maxima are taken by index: their gradient then goes to exactly one place, also where bf16 rounding makes ties.

    Args:
        channels: C of the input.
        reduction: Hidden width of W is C // reduction, at least 1.
        kernel_size: Side of the spatial convolution, odd, pixels.
        bias: Whether the two layers of W have biases.
        norm: Whether batch normalisation follows the spatial convolution.
        kind: Which parts there are, and in which order: a key of `ATTENTION`.

    Raises:
        UsageError: A reduction below 1, an even kernel, or a kind that there is not.

    Source: MFEF (ICANN 2022), section 3.2, Eqs. (5)-(8), after Woo et al., "CBAM", arXiv 1807.06521; authors' code
        Jongchan/attention-module, MODELS/cbam.py.
    Initial weights are the framework's: the fan-out rule of the backbones would give the 7x7 convolution with its one
    output a standard deviation of 0.2, and sigmoids that begin between 0.04 and 0.95 depending on the seed. With norm
    the gate begins at 1/2 exactly, as in CBAM's code.

    Differs: Eq. (5) is printed with unbalanced brackets and read as above, as in CBAM. CBAM's code has biases in W
        and batch normalisation in the spatial part; both are off by default.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        bias: bool = False,
        norm: bool = False,
        kind: AttentionKind = "cbam",
    ) -> None:
        super().__init__()
        if reduction < 1:
            raise UsageError(f"dual attention: reduction is {reduction}; it must be at least 1")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(f"dual attention: kernel_size is {kernel_size}; it must be odd, for example 7 or 3")
        if kind not in ATTENTION:
            raise UsageError(f"dual attention: kind is {kind!r}: {near_matches(str(kind), ATTENTION)}")
        self.parts = ATTENTION[kind]
        if "channel" in self.parts:
            hidden = max(1, channels // reduction)
            self.channel = nn.Sequential(
                nn.Linear(channels, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, channels, bias=bias)
            )
        if "spatial" in self.parts:
            spatial: list[nn.Module] = [nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)]
            if norm:
                gate = nn.BatchNorm2d(1, momentum=0.01)
                nn.init.zeros_(gate.weight)
                spatial.append(gate)
            self.spatial = nn.Sequential(*spatial)

    def channel_weights(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel 1 1"]:
        """Compute w_c, in (0, 1)."""
        pooled = torch.stack([feature_map.mean(dim=(2, 3)), feature_map.flatten(2).max(dim=2).values])
        return self._of_channels(pooled)[:, :, None, None]

    def spatial_weights(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch 1 height width"]:
        """Compute w_s, in (0, 1)."""
        average = feature_map.mean(dim=1, keepdim=True)
        maximum = feature_map.max(dim=1, keepdim=True).values
        return self._of_places(torch.cat([average, maximum], dim=1))

    def maps(self, feature_map: Float[Tensor, "batch channel height width"]) -> AttentionMaps:
        """Compute the weights of channels and places, w_c and w_s, without their axes of length 1."""
        _, weights = self._weighted(feature_map)
        channels, places = weights.get("channel"), weights.get("spatial")
        return AttentionMaps(
            None if channels is None else channels[:, :, 0, 0], None if places is None else places[:, 0]
        )

    def forward(
        self, feature_map: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the weighted map, of the same shape."""
        if self.parts == ATTENTION["cbam"] and chains.on(self):
            return chains.attend(feature_map, self._of_channels, self._of_places)
        return self._weighted(feature_map)[0]

    def _weighted(self, feature_map: Tensor) -> tuple[Tensor, dict[Part, Tensor]]:
        found: dict[Part, Tensor] = {}
        for part in self.parts:
            found[part] = self.channel_weights(feature_map) if part == "channel" else self.spatial_weights(feature_map)
            feature_map = found[part] * feature_map
        return feature_map, found

    def _of_channels(self, pooled: Float[Tensor, "2 batch channel"]) -> Float[Tensor, "batch channel"]:
        of_average, of_maximum = self.channel(pooled)
        return torch.sigmoid(of_average + of_maximum)

    def _of_places(self, pooled: Float[Tensor, "batch 2 height width"]) -> Float[Tensor, "batch 1 height width"]:
        return torch.sigmoid(self.spatial(pooled))
