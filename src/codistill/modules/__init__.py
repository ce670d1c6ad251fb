"""The three components of MFEF and what may stand in their place, each usable alone."""

from collections.abc import Mapping

from torch import nn

from codistill.modules.aspp import ASPP
from codistill.modules.attention import ATTENTION, DualAttention
from codistill.modules.fusion import FeatureFusion
from codistill.modules.multiscale import MultiScaleExtraction
from codistill.modules.psa import PSA
from codistill.modules.pyconv import PyConv
from codistill.modules.res2net import Res2Net

MULTISCALE: Mapping[str, type[nn.Module]] = {
    "hs": MultiScaleExtraction,
    "res2net": Res2Net,
    "pyconv": PyConv,
    "psa": PSA,
    "aspp": ASPP,
}
"""Blocks that return a feature map of the same shape with several receptive fields, by name; made for its channels."""

__all__ = [
    "ASPP",
    "ATTENTION",
    "MULTISCALE",
    "PSA",
    "DualAttention",
    "FeatureFusion",
    "MultiScaleExtraction",
    "PyConv",
    "Res2Net",
]
