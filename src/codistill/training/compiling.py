"""How a step is executed, by fixed rules: with compiled chains, and with branches on streams of their own."""

import contextlib
import functools
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from codistill.core.console import warn_once
from codistill.core.errors import UsageError
from codistill.core.host import cache_folder
from codistill.methods import Method
from codistill.networks.chains import Compiler, compiled_chains
from codistill.settings.config import ExecutionSettings

OLDEST_COMPUTE_CAPABILITY = (7, 0)
# Compiling takes up to a minute, and saves about a tenth of a step: 40 ms of one of resnet20 with 128 images of 32x32.
PAID_BACK_PIXELS = 2_000 * 128 * 32 * 32


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


@dataclass(frozen=True)
class Execution:
    """One way to compute a step: with compiled chains, and with branches on streams of their own in a captured step."""

    compiled: bool = False
    overlap: bool = False

    @contextlib.contextmanager
    def on(self, method: Method, device: torch.device, deterministic: bool = False) -> Iterator[None]:
        """Have a method compute this way, in place, until the context ends."""
        with contextlib.ExitStack() as changes:
            if self.compiled:
                _keep_compiled_code()
                changes.enter_context(compiled_chains(compiler(device.type, torch.get_num_threads(), deterministic)))
            if self.overlap and method.parallel_branches:
                changes.enter_context(method.cohort.branches_on_streams(device))
            yield


@functools.cache
def compiler(kind: str, threads: int, deterministic: bool) -> Compiler:
    """Return the one compiler of this process for a kind of device, a number of threads and a demand."""
    options: dict[str, Any] = {"compile_threads": 1}  # helpers would be processes that import torch
    if kind == "cpu":  # it is in the code, and without it here the cache would not tell one from another
        options["cpp.threads"] = threads
    return Compiler({**options, "deterministic": True} if deterministic else options)


def choose_execution(settings: ExecutionSettings, device: torch.device, pixels: int, overlap: bool = True) -> Execution:
    """Choose how a run computes its steps; `compile` auto compiles on a CPU where all steps have so many pixels.

    Branches overlap only in a captured step of a run that is alone on its device: several runs fill it without.
    """
    # On a GPU nobody has measured chains yet.
    auto = settings.compile == "auto" and device.type == "cpu" and pixels >= PAID_BACK_PIXELS
    compiled = auto or settings.compile == "on"
    lack = missing_compiler(device) if compiled else None
    if lack is not None and not auto:
        raise UsageError(f"compile on: {lack}, or leave --compile out")
    if lack is not None:
        warn_once(f"compile auto: {lack}; until then this trains without a compiler, more slowly")
    return Execution(compiled and lack is None, overlap and device.type == "cuda")
