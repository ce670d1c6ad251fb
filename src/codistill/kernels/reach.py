"""Which tensors Triton's kernels reach."""

import os

from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def reached(tensor: Tensor) -> bool:
    """Say whether kernels can be given a tensor: on CUDA, and anywhere in Triton's interpreter.

    A method that was trained with fused kernels may be used on a CPU afterwards; it then computes as stock ones do.
    """
    return tensor.is_cuda or INTERPRETED
