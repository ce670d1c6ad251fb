"""The three components of MFEF, each usable alone."""

from codistill.modules.attention import DualAttention
from codistill.modules.fusion import FeatureFusion
from codistill.modules.multiscale import MultiScaleExtraction

__all__ = ["DualAttention", "FeatureFusion", "MultiScaleExtraction"]
