"""Presets: all settings of a paper or of its code."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from codistill.core.errors import UsageError
from codistill.core.registry import near_matches
from codistill.settings.config import RunConfig
from codistill.settings.mapping import run_from_mapping


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one paper: of the run and of the method, by key."""

    method: str
    source: str
    run: Mapping[str, Any]
    settings: Mapping[str, Any]
    networks: Mapping[str, str] = field(default_factory=dict)
    """The network that the paper's code builds under a name, where it is not the usual one."""


_RUN: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 128,
    "learning_rate": 0.1,
    "learning_rate_decay": 0.1,
    "milestones": [150, 225],
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "padding": 4,
    "padding_mode": "zeros",
    "drop_last": False,
}
# Of MFEF; the code of FFL, ONE and OKDDip adds 1e-7 to the teaching probabilities.
_METHOD: dict[str, Any] = {"temperature": 3.0, "ramp_up": 80 / 300, "detach_teachers": True}
_CODE = _METHOD | {"target_epsilon": 1e-7}
PRESETS: dict[str, Preset] = {
    "mfef": Preset(
        method="mfef",
        source="MFEF (ICANN 2022), section 4.1; where it is silent, FFL's code",
        run=_RUN,
        settings=_METHOD
        | {"detach_fusion_input": False, "fusion_weight_decay": 1e-5}
        | {"groups": 4, "attention_reduction": 16, "attention_kernel": 7},
    ),
    "ffl": Preset(
        method="ffl",
        source="Jangho-Kim/FFL-pytorch at 546d478, train_FFL.py: 301 epochs, reflected padding, 1e-7 on soft targets",
        run=_RUN | {"epochs": 301, "padding_mode": "reflect"},
        settings=_CODE | {"ramp_up": 80 / 301, "detach_fusion_input": False, "fusion_weight_decay": 1e-5},
    ),
    "one": Preset(
        method="one",
        source="Lan1991Xu/ONE_NeurIPS2018, scripts: no Nesterov, milestones 151 and 225; bottlenecks from depth 44 on",
        run=_RUN | {"milestones": [151, 225], "nesterov": False},
        settings=_CODE,
        networks={"resnet56": "resnet83-bottleneck", "resnet110": "resnet164-bottleneck"},
    ),
    "okddip": Preset(
        method="okddip",
        source="DefangChen/OKDDip-AAAI2020 at c6a05de, train_GL.py: weight decay 5e-4, targets not detached",
        run=_RUN | {"weight_decay": 5e-4},
        settings=_CODE | {"detach_teachers": False},
        networks={"resnet110": "resnet110-bottleneck"},
    ),
    "okd-cheap": Preset(
        method="okd-cheap",
        source="EthanZhangYC/OD-cheap-convolution at a405c9e: no Nesterov, weight decay 2e-4, KL averaged over classes",
        run=_RUN | {"nesterov": False, "weight_decay": 2e-4},
        settings={"temperature": 4.0, "ramp_up": 0.0, "detach_teachers": False, "mean_over_classes": True},
    ),
    "dml": Preset(
        method="dml",
        source="Zhang et al., CVPR 2018 (200 epochs, lr / 10 every 60), and their code: T = 1, in turn, no 1/(n-1)",
        run=_RUN | {"epochs": 200, "milestones": [60, 120, 180]},
        settings={"temperature": 1.0, "update": "alternating", "target": "pairwise", "divide_by_peers": False},
    ),
    "kdcl": Preset(
        method="kdcl",
        source="Guo et al., CVPR 2020, as two independent notes report it; no official code: KDCL-General, T = 2",
        run=_RUN,
        settings={"variant": "general", "temperature": 2.0, "views_per_student": True},
    ),
}


def find_preset(name: str, method: str | None) -> Preset:
    """Look a preset up; raise UsageError if it is unknown or of another method than the one that was named."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}: {near_matches(name, PRESETS)}")
    preset = PRESETS[name]
    if method is not None and method != preset.method:
        raise UsageError(f"preset {name} is for {preset.method}, not for {method}: leave the method or the preset out")
    return preset


def preset_config(preset: Preset) -> RunConfig:
    """Return the run that a preset sets, without milestones: those move with the epochs; see `completed`."""
    run = {key: value for key, value in preset.run.items() if key != "milestones"}
    return run_from_mapping({**run, "method": {"name": preset.method, **preset.settings}}, lambda key: "preset")


def completed(preset: Preset, config: RunConfig) -> RunConfig:
    """Return a run with the networks that the paper's code builds under these names.

    Milestones, where it has none, are the preset's, in proportion to the epochs.
    """
    epochs, milestones = config.train.epochs, config.train.milestones
    if milestones is None and config.train.schedule == "step":
        moved = {round(each * epochs / preset.run["epochs"]) for each in preset.run["milestones"]}
        milestones = tuple(sorted(each for each in moved if 0 < each < epochs))
    networks = tuple(preset.networks.get(name, name) for name in config.networks)
    return replace(config, networks=networks, train=replace(config.train, milestones=milestones))
