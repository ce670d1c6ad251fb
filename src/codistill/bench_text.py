"""What `codistill bench` found, in lines for people."""

from collections.abc import Mapping
from typing import Any

from codistill.execution import Execution
from codistill.roofline import MACHINES


def lines(result: Mapping[str, Any]) -> list[str]:
    """Write a result of `bench` for people."""
    step, work = result["ms_per_step"], result["kilobytes_per_image"]
    text = [
        f"{step:.2f} ms per step of a run, {result['images_per_second']:,.0f} images/s each",
        f"computed with {Execution(**result['execution'])}",
    ]
    if "ratio_to_plain" in result:
        text.append(
            f"plain loop: {result['plain_ms_per_step']:.2f} ms per step, "
            f"{result['plain_images_per_second']:,.0f} images/s; ours is {result['ratio_to_plain']:.2f} times as fast"
        )
    if "deterministic_ratio" in result:
        text.append(f"with --deterministic: {result['deterministic_ratio']:.2f} times that speed")
    for unit in ("kernels", "operators"):
        if f"{unit}_per_step" in result:
            text.append(f"{result[f'{unit}_per_step']:,} {unit} per step")
    text.append(
        f"{result['parameters']:,} parameters; an image takes {result['forward_mflop_per_image']:,.0f} MFLOP forward, "
        f"thrice that in training, and at least {work['floor']:,.0f} kB of memory traffic in bf16"
    )
    if "share_of_floor" in result:
        text.append(
            f"floor {result['floor_ms_per_step']:.2f} ms per step: {100 * result['share_of_floor']:.0f} % of it"
        )
    else:
        text.append(f"no share of the floor: its constants are known for {' and '.join(MACHINES)} only")
    if "peak_memory_mib" in result:
        text.append(f"peak memory {result['peak_memory_mib']:,.0f} MiB, reserved {result['peak_reserved_mib']:,.0f}")
    else:
        text.append("memory is measured on CUDA only")
    return text
