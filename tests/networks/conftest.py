"""What the tests of the networks share: networks without memory, and statistics that are not trivial."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codistill.networks import Network, network


def norm(layer: nn.BatchNorm2d, features: Tensor) -> Tensor:
    """Batch normalisation alone, in evaluation mode, whatever follows it in the layer."""
    return F.batch_norm(features, layer.running_mean, layer.running_var, layer.weight, layer.bias)


@pytest.fixture
def on_meta() -> Callable[[str, int], Network]:
    """Build a network that has shapes but no numbers, so that the big ones cost nothing."""

    def build(spec: str, num_classes: int) -> Network:
        with torch.device("meta"):
            return network(spec, num_classes)

    return build


@pytest.fixture
def shaken() -> Callable[[nn.Module], nn.Module]:
    """Fill weights and statistics of batch normalisation, so that a forgotten or misplaced one shows."""

    def shake(module: nn.Module) -> nn.Module:
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
        return module.eval()

    return shake
