"""How a step is executed, by fixed rules; and torch.compile of a method's parts, in place: weights and files stay."""

import contextlib
import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codistill.core.console import warn_once
from codistill.core.errors import UsageError
from codistill.core.host import cache_folder
from codistill.methods import Method
from codistill.methods.cohort import Cohort
from codistill.networks import Network
from codistill.settings.config import ExecutionSettings

BACKEND = "inductor"
# The limit is per code object, and all blocks of all students, for each batch size, share one.
RECOMPILE_LIMIT = 1024
OLDEST_COMPUTE_CAPABILITY = (7, 0)
PAID_BACK_STEPS = 100_000  # compilation takes about a minute, and saves less than 1 ms a step


def missing_compiler(device: torch.device) -> str | None:
    """Return what this machine lacks to compile for a device, as the first half of an error line; None: nothing."""
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
    """Keep compiled code over a restart; torch's own default is the folder for temporary files."""
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


@contextlib.contextmanager
def compiled(method: Method, *, deterministic: bool = False, fullgraph: bool = False) -> Iterator[None]:
    """Have the parts of a method run compiled code in training mode until this context ends.

    Parts are compiled in their first training step. In evaluation mode the same modules run uncompiled, with the same
    weights. Afterwards modules that a user had compiled are compiled as before.

    Args:
        method: Already on its device.
        deterministic: Whether code must not be chosen by timing where results depend on the choice.
        fullgraph: Whether Python that cannot be compiled is an error in the first step.
    """
    _keep_compiled_code()
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, RECOMPILE_LIMIT)
    options = {"deterministic": True} if deterministic else None
    compiler = functools.partial(torch.compile, dynamic=False, backend=BACKEND, fullgraph=fullgraph, options=options)
    before = {part: part._compiled_call_impl for part in parts_of(method)}
    for part in before:
        # As nn.Module.compile does it, which has no word for training only; copies and pickles leave it out.
        part._compiled_call_impl = _in_training(part, compiler(part._call_impl))
    try:
        yield
    finally:
        for part, implementation in before.items():
            part._compiled_call_impl = implementation


def _in_training(module: nn.Module, code: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        return (code if module.training else module._call_impl)(*arguments, **named)

    return call


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are compiled, in the order of registration; shared ones come more than once.

    Each stage is a part: branches on streams of their own need parts, and equal parts are compiled once.
    """
    if isinstance(module, Network):
        yield from module.stages
        yield module.head
    elif isinstance(module, (Method, Cohort, nn.ModuleList)):
        for child in module.children():
            yield from parts_of(child)
    elif next(module.parameters(), None) is not None:
        yield module


@dataclass(frozen=True)
class Execution:
    """One way to compute a step: with compiled parts, and with branches on streams of their own in a captured step."""

    compiled: bool = False
    overlap: bool = False

    @contextlib.contextmanager
    def on(self, method: Method, device: torch.device, deterministic: bool = False) -> Iterator[None]:
        """Have a method compute this way, in place, until the context ends."""
        with contextlib.ExitStack() as changes:
            if self.compiled:
                changes.enter_context(compiled(method, deterministic=deterministic))
            if self.overlap and method.parallel_branches:
                changes.enter_context(method.cohort.branches_on_streams(device))
            yield


def choose_execution(settings: ExecutionSettings, device: torch.device, steps: int, overlap: bool = True) -> Execution:
    """Choose how a run computes its steps; `compile` auto compiles on CUDA from `PAID_BACK_STEPS` steps on.

    Branches overlap only in a captured step of a run that is alone on its device: several runs fill it without.
    """
    auto = settings.compile == "auto" and device.type == "cuda" and steps >= PAID_BACK_STEPS
    compiled = auto or settings.compile == "on"
    lack = missing_compiler(device) if compiled else None
    if lack is not None and not auto:
        raise UsageError(f"compile on: {lack}, or leave --compile out")
    if lack is not None:
        warn_once(f"compile auto: {lack}; until then this trains without a compiler, perhaps more slowly")
    return Execution(compiled and lack is None, overlap and device.type == "cuda")
