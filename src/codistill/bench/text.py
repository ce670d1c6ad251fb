"""What `codistill bench` found, in lines for people."""

from collections.abc import Mapping
from typing import Any


def lines(result: Mapping[str, Any]) -> list[str]:
    """Write a result of `bench` for people."""
    ways = [name for name, chosen in result["execution"].items() if chosen]
    text = [
        f"{result['ms_per_step']:.2f} ms per step of a run, {result['images_per_second']:,.0f} images/s each"
        + (f" ({', '.join(ways)})" if ways else "")
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
        "thrice that in training"
    )
    if "peak_memory_mib" in result:
        text.append(f"peak memory {result['peak_memory_mib']:,.0f} MiB, reserved {result['peak_reserved_mib']:,.0f}")
    else:
        text.append("memory is measured on CUDA only")
    return text
