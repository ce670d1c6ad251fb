"""How a step is executed, by fixed rules; and torch.compile of a method's parts, in place: weights and files stay."""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from codistill.core.console import warn_once
from codistill.core.errors import UsageError
from codistill.core.host import cache_folder
from codistill.methods import Method
from codistill.methods.cohort import Cohort
from codistill.networks import Network
from codistill.settings.config import ExecutionSettings

Granularity = Literal["block", "stage", "whole"]


GRANULARITY: Granularity = "stage"
"""What is compiled as one: each residual block, each stage, or the whole forward pass.

The branches' streams need parts. Equal parts have one code, which is compiled once; smaller parts compile faster.
"""


# The limit is per code object, and all blocks of all students, for each batch size, share one.
RECOMPILE_LIMIT = 1024


OLDEST_COMPUTE_CAPABILITY = (7, 0)


def compile_parts(method: Method, device: torch.device, deterministic: bool) -> None:
    """Compile a method's parts for training; they are compiled in their first training step.

    Only training is compiled: in evaluation mode the same modules run plainly, with the same weights. Compiled code is
    kept in TORCHINDUCTOR_CACHE_DIR for later runs, by default codistill/inductor in the user's cache folder.

    Args:
        method: Already on its device.
        device: The method's device.
        deterministic: As in `TrainSettings.deterministic`.

    Raises:
        UsageError: This machine lacks what is needed.
    """
    lack = missing_compiler(device)
    if lack is not None:
        raise UsageError(f"compile on: {lack}, or leave --compile out")
    _keep_compiled_code()
    compile_in_place(method, deterministic=deterministic)


def missing_compiler(device: torch.device) -> str | None:
    """Say what this machine lacks to compile for a device, as the first half of an error line; None: nothing."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < OLDEST_COMPUTE_CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} is too old for Triton: use a GPU from 2017 or later"
        if find_spec("triton") is None:
            return "there is no Triton: pip install triton"
        compilers: Sequence[str] = [os.environ["CC"]] if os.environ.get("CC") else ("gcc", "clang")
    else:
        compilers = [os.environ.get("CXX") or "g++"]
    if not any(shutil.which(name) for name in compilers):
        return f"there is no compiler {' or '.join(compilers)}: install one"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's header files are missing: install them (python3-dev)"
    return None


def _keep_compiled_code() -> None:
    """Let compiled code outlive a restart; torch's own default is the folder for temporary files."""
    # The compiler takes a second to import, which runs without it need not wait for.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch writes its default into the variable as soon as anything imports the compiler.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return
    try:
        folder = cache_folder() / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warn_once(f"compiled code is not kept for later runs: {error}: set TORCHINDUCTOR_CACHE_DIR to a folder")
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def compile_in_place(
    method: Method,
    granularity: Granularity = GRANULARITY,
    *,
    deterministic: bool = False,
    backend: str = "inductor",
    fullgraph: bool = False,
) -> int:
    """Let the parts of a method run compiled code in training mode.

    Args:
        method: Anything that may be captured or not.
        granularity: What is a part.
        deterministic: Whether code must not be chosen by timing it where results depend on the choice.
        backend: Of torch.compile.
        fullgraph: Whether Python that cannot be compiled is an error in the first step instead of left as it is.

    Returns:
        The number of parts.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, RECOMPILE_LIMIT
    )
    options = {"deterministic": True} if deterministic else None
    compiler = functools.partial(torch.compile, dynamic=False, backend=backend, fullgraph=fullgraph, options=options)
    parts = {id(part): part for part in parts_of(method, granularity)}
    for part in parts.values():
        _compile(part, compiler)
    return len(parts)


def parts_of(module: nn.Module, granularity: Granularity) -> Iterator[nn.Module]:
    """List what is compiled as one, in the order of registration; shared parts come more than once."""
    if granularity == "whole":
        yield module
    elif isinstance(module, Network):
        for stage in module.stages:
            yield from blocks_of(stage) if granularity == "block" else [stage]
        yield module.head
    elif isinstance(module, (Method, Cohort, nn.ModuleList)):
        for child in module.children():
            yield from parts_of(child, granularity)
    elif next(module.parameters(), None) is not None:
        yield module


def blocks_of(stage: nn.Module) -> Iterator[nn.Module]:
    """List the blocks of a stage: what stands in its chain and has layers of its own, or the stage if nothing has."""
    chained = [child for child in stage.children() if next(child.children(), None) is not None]
    if not isinstance(stage, nn.Sequential) or not chained:
        yield stage
        return
    for child in chained:
        yield from blocks_of(child)


def _compile(module: nn.Module, compiler: Callable[..., Any]) -> None:
    compiled = compiler(module._call_impl)

    def call(*arguments: Any, **named: Any) -> Any:
        return (compiled if module.training else module._call_impl)(*arguments, **named)

    # As nn.Module.compile does it, which has no word for training only; copies and pickles leave it out.
    module._compiled_call_impl = call


def run_uncompiled(method: nn.Module) -> None:
    """Let a method run plain code, whatever `compile_in_place` compiled of it before; a user's own stays compiled."""
    for module in method.modules():
        if getattr(module._compiled_call_impl, "__module__", None) == __name__:
            vars(module).pop("_compiled_call_impl")


PAID_BACK_STEPS = 100_000
"""Steps from which on a first compilation, about a minute, is less than what it saves, under 1 ms a step."""


@dataclass(frozen=True)
class Execution:
    """One way to compute a step.

    Attributes:
        compiled: Whether torch.compile compiles stages, heads and modules.
        overlap: Whether a captured step's branches run on streams of their own.
    """

    compiled: bool = False
    overlap: bool = False

    def prepare(self, method: Method, device: torch.device, deterministic: bool) -> None:
        """Make a method compute that way, whatever way it computed before.

        Args:
            method: Changed in place; weights, their names and files stay.
            device: Where it will be trained.
            deterministic: As in `ExecutionSettings.deterministic`.

        Raises:
            UsageError: This machine cannot compile.
        """
        if self.compiled:
            compile_parts(method, device, deterministic)
        else:
            run_uncompiled(method)


PLAIN = Execution()
"""Not compiled, on one stream."""


def choose_execution(settings: ExecutionSettings, device: torch.device, runs: int, steps: int) -> Execution:
    """Choose how a run computes its steps.

    Branches run on streams in a run alone on CUDA: several runs fill the device without. `compile` auto compiles on
    CUDA from `PAID_BACK_STEPS` steps on.

    Args:
        settings: The `compile` of a run.
        device: Where it is trained.
        runs: How many runs share the device.
        steps: Training steps of the run.
    """
    compiled = settings.compile == "on"
    if settings.compile == "auto" and device.type == "cuda" and steps >= PAID_BACK_STEPS:
        lack = missing_compiler(device)
        compiled = lack is None
        if lack is not None:
            warn_once(f"compile auto: {lack}; until then this trains without a compiler, perhaps more slowly")
    return Execution(compiled, overlap=device.type == "cuda" and runs == 1)
